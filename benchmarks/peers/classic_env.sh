#!/usr/bin/env bash
# Makes the environment of the methods that are not variational: scanpy's PCA and ComBat, Harmony, MAGIC,
# DESeq2 in Python, scrublet, and the metrics of scib.
#
#   benchmarks/peers/classic_env.sh DIR
#
# Then DIR/bin/python is the peers' Python. PYTHON names the interpreter to start from (python3.11).
python=python3.11
. "$(dirname "$0")/env.sh"
"$dir/bin/python" -m pip install --quiet \
  "scanpy==1.11.5" "harmonypy==2.1.0" "magic-impute==3.0.0" "pydeseq2==0.5.4" "scib-metrics==0.5.10" "scrublet==0.2.3"
"$dir/bin/python" -c 'from importlib import metadata as m; print("scanpy", m.version("scanpy"), "harmonypy", m.version("harmonypy"))'

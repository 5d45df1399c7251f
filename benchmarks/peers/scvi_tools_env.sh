#!/usr/bin/env bash
# Makes the environment in which scvi-tools runs, apart from atlasvi's own.
#
#   benchmarks/peers/scvi_tools_env.sh DIR
#
# Then DIR/bin/python is the peer's Python. PYTHON names the interpreter to start from (python3.11).
python=python3.11
. "$(dirname "$0")/env.sh"
# torch first and alone: scvi-tools asks for no version, and both libraries are to run on the same one.
"$dir/bin/python" -m pip install --quiet "torch==2.13.0"
"$dir/bin/python" -m pip install --quiet "scvi-tools==1.4.2"
"$dir/bin/python" -c 'import scvi, torch; print(f"scvi-tools {scvi.__version__}, torch {torch.__version__}")'

#!/usr/bin/env bash
# Makes the environment in which scDataset runs, apart from atlasvi's own.
#
#   benchmarks/peers/scdataset_env.sh DIR
#
# Then DIR/bin/python is the peer's Python. PYTHON names the interpreter to start from (python3.11).
python=python3.11
. "$(dirname "$0")/env.sh"
# torch first and alone, the version that the other peers have.
"$dir/bin/python" -m pip install --quiet "torch==2.13.0"
"$dir/bin/python" -m pip install --quiet "scDataset==0.3.0" "anndata==0.12.19" "zarr==3.1.6" "zarrs==0.2.3"
"$dir/bin/python" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("scDataset", "anndata", "zarr", "zarrs", "torch")))'

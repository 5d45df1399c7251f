#!/usr/bin/env bash
# Makes the environment in which annbatch runs, apart from atlasvi's own: it needs Python 3.12 or later.
#
#   benchmarks/peers/annbatch_env.sh DIR
#
# Then DIR/bin/python is the peer's Python. PYTHON names the interpreter to start from (python3.12).
# torch is left out: annbatch yields scipy's matrices without it, which spares it a conversion.
python=python3.12
. "$(dirname "$0")/env.sh"
"$dir/bin/python" -m pip install --quiet "annbatch[zarrs,numba]==0.3.1"
"$dir/bin/python" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("annbatch", "anndata", "zarr", "zarrs", "numba")))'

#!/usr/bin/env bash
# Makes the environment in which annbatch runs, apart from atlasvi's own: it needs Python 3.12 or later.
#
#   benchmarks/peers/annbatch_env.sh DIR
#
# Then DIR/bin/python is the peer's Python. PYTHON names the interpreter to start from (python3.12).
# torch is left out: annbatch yields scipy's matrices without it, which spares it a conversion.
set -euo pipefail

if [ "$#" -ne 1 ]; then
  echo "usage: $0 DIR  (the environment to make, for example .peers/annbatch)" >&2
  exit 2
fi
dir=$1
python=${PYTHON:-python3.12}

"$python" -m venv "$dir"
"$dir/bin/python" -m pip install --quiet --upgrade pip
"$dir/bin/python" -m pip install --quiet "annbatch[zarrs,numba]==0.3.1"
"$dir/bin/python" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("annbatch", "anndata", "zarr", "zarrs", "numba")))'

# Sourced by the scripts that make the peers' environments: DIR, the script's one argument, becomes a fresh one.
# PYTHON names the interpreter to start from; `python` is the one that a script takes otherwise.
set -euo pipefail

if [ "$#" -ne 1 ]; then
  echo "usage: $0 DIR  (the environment to make, for example .peers/NAME)" >&2
  exit 2
fi
dir=$1

"${PYTHON:-$python}" -m venv "$dir"
"$dir/bin/python" -m pip install --quiet --upgrade pip

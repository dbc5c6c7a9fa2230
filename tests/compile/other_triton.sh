#!/usr/bin/env bash
# Compile every kernel with another Triton than the pinned one: tests/compile/other_triton.sh VERSION [pytest options]
set -euo pipefail
version=${1:?usage: tests/compile/other_triton.sh VERSION [pytest options]}
shift
cd "$(dirname "$0")/../.."
python=.venv/bin/python
packages=.triton/$version

if [ ! -e "$packages/.ready" ]; then
  "$python" -m pip install --quiet --no-deps --target "$packages" --upgrade "triton==$version"
  touch "$packages/.ready"
fi
export PYTHONPATH=$packages TRITON_CACHE_DIR=.triton/cache-$version
"$python" - "$version" <<'CHECK'
import sys
import triton

if triton.__version__ != sys.argv[1]:
    sys.exit(f"triton is {triton.__version__}, not {sys.argv[1]}")
CHECK
"$python" -m pytest tests/compile "$@"

#!/usr/bin/env bash
# Fetches into benchmarks/wheels/ what gpu.sh needs on a machine without network beside torch, triton and a compiler.
#   bash benchmarks/prepare_gpu.sh [x86_64|aarch64]      the GPU machine's processor; PYTHON picks an interpreter with pip
#
# Under 40 MB, for any Python from 3.10 to 3.13: no wheel here depends on its version. Copy the tree with that folder.
set -euo pipefail
cd "$(dirname "$0")/.."
arch=${1:-x86_64}
case $arch in x86_64 | aarch64) ;; *) sed -n 3p "$0" >&2 && exit 2 ;; esac
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
wheels=benchmarks/wheels
most=$((40 * 1000 * 1000))

download() { "$python" -m pip download -q --no-deps --only-binary=:all: --implementation py --abi none --python-version 3.10 -d "$wheels" "$@"; }

rm -rf "$wheels"
# to build the C++ part; pytest and what it needs (exceptiongroup and tomli on Python 3.10); xdist; hypothesis; Liger,
# whose kernels need neither transformers nor anything else that is not here
download --platform any \
    'setuptools>=77' 'pybind11>=2.13' \
    pytest iniconfig pluggy packaging pygments exceptiongroup tomli typing-extensions \
    'pytest-xdist>=3.6' execnet hypothesis sortedcontainers \
    'liger-kernel==0.8.5'
download --platform "manylinux_2_17_$arch" --platform "manylinux2014_$arch" 'cmake>=3.22' ninja

size=$(find "$wheels" -name '*.whl' -printf '%s\n' | awk '{ total += $1 } END { print total }')
find "$wheels" -name '*.whl' -printf '%9s  %f\n' | sort -rn
echo "$size bytes in $wheels"
[ "$size" -le "$most" ] || { echo "more than $most bytes" >&2 && exit 1; }

#!/usr/bin/env bash
# Makes benchmarks/carried/: what gpu.sh needs on a machine without network beside torch, triton and transformers.
#   bash benchmarks/prepare_gpu.sh [x86_64|aarch64] [PYTHON_VERSION]     the GPU machine's processor and Python (3.12)
#
# The C++ part is built here for that Python, where this machine has it (python3.12) and the same processor: some 3 minutes.
# Otherwise gpu.sh builds it there, for which cmake and ninja are carried. Pure Python packages and Liger are wheels.
# At most 60 MB. Copy the tree with that folder.
set -euo pipefail
cd "$(dirname "$0")/.."
arch=${1:-x86_64}
wanted=${2:-3.12}
case $arch in x86_64 | aarch64) ;; *) sed -n 3p "$0" >&2 && exit 2 ;; esac
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
kept=benchmarks/carried
most=$((60 * 1000 * 1000))
work=$(mktemp -d)
carried=$work/carried # moved where it belongs when it is whole
trap 'rm -rf "$work"' EXIT

download() { "$python" -m pip download -q --no-deps --only-binary=:all: --implementation py --abi none --python-version 3.10 -d "$carried" "$@"; }

mkdir -p "$carried"
# to build the C++ part; pytest and what it needs (exceptiongroup and tomli on Python 3.10); xdist; hypothesis; Liger,
# whose kernels need neither transformers nor anything else that is not here
download --platform any \
    'setuptools>=77' 'pybind11>=2.13' \
    pytest iniconfig pluggy packaging pygments exceptiongroup tomli typing-extensions \
    'pytest-xdist>=3.6' execnet hypothesis sortedcontainers \
    'liger-kernel==0.8.5'
download --platform "manylinux_2_17_$arch" --platform "manylinux2014_$arch" 'cmake>=3.22' ninja

# a shim of pyenv is there for versions that are not, so it is run and not only looked for
candidates=("python$wanted" "$HOME"/.pyenv/versions/"$wanted".*/bin/python)
builder=""
for one in "${candidates[@]}"; do
    "$one" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$wanted')" 2>/dev/null && builder=$one && break
done
if [ "$(uname -m)" != "$arch" ]; then
    echo "the C++ part is not carried: this machine is $(uname -m); it is built on the GPU machine"
elif [ -z "$builder" ]; then
    echo "the C++ part is not carried: no Python $wanted here; it is built on the GPU machine"
else
    "$builder" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -q 'setuptools>=77' 'cmake>=3.22' ninja 'pybind11>=2.13'
    PATH=$work/venv/bin:$PATH "$work/venv/bin/python" setup.py -q egg_info --egg-base "$work" \
        build --build-base "$work/build" --build-lib "$work/site" >"$work/log" 2>&1 || { tail -40 "$work/log" >&2 && exit 1; }
    cp "$work"/site/pocl_fast/_C*.so "$carried/"
    find csrc CMakeLists.txt -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1 >"$carried/sources.sha256"
fi
git describe --always --dirty >"$carried/commit" 2>/dev/null || true

size=$(find "$carried" -type f -printf '%s\n' | awk '{ total += $1 } END { print total }')
find "$carried" -type f -printf '%9s  %f\n' | sort -rn
echo "$size bytes in $kept"
[ "$size" -le "$most" ] || { echo "more than $most bytes" >&2 && exit 1; }
rm -rf "$kept"
mv "$carried" "$kept"

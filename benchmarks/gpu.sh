#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU: builds, runs the GPU tests, measures the fused losses; within 9 minutes.
#   bash benchmarks/gpu.sh [options of loss_gpu.py]      --device cpu: the same path without a GPU, at tiny sizes
#
# With benchmarks/wheels/ (see prepare_gpu.sh) it needs no network: torch, triton and a compiler are taken from PYTHON
# (python3), all else from the wheels, in a temporary folder. Without, `make env` installs everything into .venv first,
# and the 9 minutes count from there. Needs no root. Results go to OUT (benchmarks/results): loss_cuda.json and .png,
# linear_loss.txt, gpu_tests.log. LIMIT: seconds for all of it (525). Exit status 1 if a test failed or a result was wrong.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=$root/benchmarks/wheels
export OUT=${OUT:-$root/benchmarks/results}
limit=${LIMIT:-525}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$root"

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi here"
if compgen -G "$wheels/*.whl" >/dev/null; then
    python=${PYTHON:-python3}
    python=$(command -v "$python") || { echo "no $python here; set PYTHON" >&2 && exit 1; }
    case $python in /*) ;; *) python=$PWD/$python ;; esac
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
    say "install and build, without network"
    "$python" -m pip install -q --no-index --no-deps --no-compile --disable-pip-version-check --no-warn-script-location \
        --find-links "$wheels" --target "$work/site" "$wheels"/*.whl
    export PATH="$work/site/bin:$PATH" PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
    "$python" setup.py -q egg_info --egg-base "$work" build --build-base "$work/build" --build-lib "$work/site" \
        >"$work/build.log" 2>&1 || { tail -40 "$work/build.log" >&2 && exit 1; }
else
    say "make env (on a machine without network: prepare_gpu.sh on another one first)"
    make env
    python=$root/${VENV:-.venv}/bin/python
    "$python" -m pip install -q --no-deps 'liger-kernel==0.8.5'
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
    SECONDS=0
fi
cd "$work"  # not the tree, whose folders would hide what was built
"$python" -c 'from pocl_fast import _C, kernels; print("built for", _C.isa(), "in", kernels.__path__[0])'

status=0
processes=$(($(nproc) > 12 ? 12 : $(nproc)))  # most of the tests' time goes into compiling a few hundred kernels
say "GPU tests, in $processes processes"
PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 timeout --signal=INT --kill-after=10 180 \
    "$python" -m pytest -p xdist -n "$processes" --dist worksteal -q -m gpu -c "$root/pyproject.toml" --rootdir "$root" \
    "$root/tests/reference" "$root/tests/kernels" 2>&1 | tee "$OUT/gpu_tests.log" || status=$?
case $status in
    0) ;;
    5) echo "no test is marked gpu" && status=0 ;;
    124) echo "the tests did not end in 180 s: what follows is measured all the same" && status=1 ;;
    *) echo "tests failed: what follows is measured all the same" && status=1 ;;
esac

say "measuring"
left=$((limit - SECONDS))
budget=$((left - 75 < 360 ? left - 75 : 360))  # a minute is kept for the linear loss
case " $* " in *" --device cpu "* | *" --device=cpu "*) budget=60 ;; esac
timeout --signal=INT --kill-after=15 "$((left - 60))" \
    "$python" "$root/benchmarks/loss_gpu.py" --budget "$budget" "$@" || status=1
left=$((limit - SECONDS))
case " $* " in
    *" --device cpu "* | *" --device=cpu "*)
        linear=(--device cpu --tokens 64 --supervised 32 --vocabulary 1000 --hidden 32 --teacher-hidden 48 --repeats 1) ;;
    *) linear=(--device cuda --tokens 8192 --supervised 8192 --vocabulary 128256 --hidden 2048 --teacher-hidden 4096 --repeats 5) ;;
esac
if [ "$left" -gt 20 ]; then
    say "the linear loss"
    timeout --signal=INT --kill-after=10 "$((left - 10))" "$python" "$root/benchmarks/linear_loss.py" "${linear[@]}" |
        tee "$OUT/linear_loss.txt" || status=1
else
    echo "no time left for the linear loss" && status=1
fi
say "done, exit status $status"
exit "$status"

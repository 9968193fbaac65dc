#!/usr/bin/env bash
# Proves or refutes on a machine with an NVIDIA GPU that pocl-fast computes what it should, and measures it: 8 minutes.
#   bash benchmarks/gpu.sh [--device cpu] [SECTION ...]     all sections, or these; on a CPU the same path at tiny sizes
#   bash benchmarks/gpu.sh tests                            the GPU tests instead, 200 s
#
# Sections, in this order: versions, smoke (float64 against everything that runs on a GPU), loss (ours, Liger, eager),
# sweep (tiles, warps, read-ahead), training, counters (Nsight Compute), linear (the linear loss), compiled (torch.compile).
# Each has a time limit of its own and writes its result as it goes; one that fails ends no other. Exit status 1 if one
# failed or was wrong. Results, at most 8 files, go to OUT (benchmarks/out); benchmarks/results.py keeps them.
#
# Needs no root. Where benchmarks/carried/ is there (prepare_gpu.sh makes it) or PYTHON is set, it needs no network: torch,
# triton and transformers are PYTHON's (python3), the C++ part is the carried one where it fits and is built otherwise.
# Without, `make env` installs everything into .venv first. LIMIT: seconds for all sections (480).
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
carried=$root/benchmarks/carried
all="versions smoke loss sweep training counters linear compiled"
kind=cuda
chosen=""
while [ $# -gt 0 ]; do
    case $1 in
        --device) kind=${2:-} && shift ;;
        --device=*) kind=${1#*=} ;;
        tests) chosen="$chosen tests" ;;
        *) case " $all " in *" $1 "*) chosen="$chosen $1" ;; *) sed -n '3,7p' "$0" >&2 && exit 2 ;; esac ;;
    esac
    shift
done
case $kind in cuda | cpu) ;; *) echo "--device is cuda or cpu, not '$kind'" >&2 && exit 2 ;; esac
chosen=${chosen:-$all}
limit=${LIMIT:-480}
case $limit in '' | *[!0-9]*) echo "LIMIT is a number of seconds, not '$limit'" >&2 && exit 2 ;; esac
export OUT=${OUT:-$root/benchmarks/out} PYTHONUNBUFFERED=1
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && log=$OUT/gpu.log && : >"$log" || { echo "cannot write to OUT, $OUT" >&2 && exit 2; }
[ -f "$OUT/run.json" ] || case " $chosen " in *" versions "*) ;; *) chosen="versions $chosen" ;; esac
work=$(mktemp -d)
running="" # the section's process, which has a process group of its own
trap 'rm -rf "$work"' EXIT
trap '[ -z "$running" ] || { kill -INT "$running"; wait "$running"; }; exit 130' INT
trap '[ -z "$running" ] || { kill -TERM "$running"; wait "$running"; }; exit 143' TERM

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS" | tee -a "$log"; }
stop() { echo "$1" | tee -a "$log" >&2; exit 1; }

# What the C++ part is made of, as one number: a carried build of other sources is not used.
sources() { (cd "$root" && find csrc CMakeLists.txt -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1); }

# Makes pocl_fast importable in $work/site out of this tree, without network.
place() {
    local python=$1 site=$work/site built wheel missing=()
    mkdir -p "$site"
    cp -r "$root/pocl_fast" "$site/pocl_fast" && rm -f "$site"/pocl_fast/_C*.so
    cp -r "$root/kernels" "$site/pocl_fast/kernels"
    mapfile -t missing < <("$python" "$root/benchmarks/gpu_run.py" missing "$carried"/*.whl)
    for wheel in "${missing[@]}"; do # one that fails takes what needs it along, and nothing else
        "$python" -m pip install -q --no-index --no-deps --no-compile --disable-pip-version-check --no-warn-script-location \
            --target "$site" "$wheel" || echo "could not be installed, what needs it is absent: $(basename "$wheel")"
    done
    export PATH="$site/bin:$PATH" PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    for built in "$carried"/_C.*.so; do
        [ -e "$built" ] && [ "$(cat "$carried/sources.sha256" 2>/dev/null)" = "$(sources)" ] || continue
        cp "$built" "$site/pocl_fast/"
        if (cd "$work" && "$python" -c 'from pocl_fast import _C; _C.isa()' 2>&1 | tail -1 && exit "${PIPESTATUS[0]}"); then
            echo "the carried C++ part fits: $(basename "$built")"
            return
        fi
        rm "$site/pocl_fast/$(basename "$built")"
    done
    echo "building the C++ part: no carried build fits $("$python" -V) and these sources"
    cd "$root" && timeout --signal=INT 600 "$python" setup.py -q egg_info --egg-base "$work" build --build-base "$work/build" \
        --build-lib "$work/built" >"$work/build.log" 2>&1 || { tail -40 "$work/build.log"; echo "the C++ part did not build, or not within 600 s"; return 1; }
    cp "$work"/built/pocl_fast/_C*.so "$site/pocl_fast/"
}

if [ -d "$carried" ] || [ -n "${PYTHON:-}" ]; then
    python=$(command -v "${PYTHON:-python3}") || stop "no ${PYTHON:-python3} here; set PYTHON"
    case $python in /*) ;; *) python=$PWD/$python ;; esac
    "$python" -c 'import torch, transformers' || stop "$python has no torch or no transformers: set PYTHON to one that has"
    say "setting up, without network"
    place "$python" > >(tee -a "$log") 2>&1 || stop "could not be set up: see above"
else
    say "make env (on a machine without network: prepare_gpu.sh on another one first)"
    make -C "$root" env > >(tee -a "$log") 2>&1 || stop "make env failed"
    python=$root/${VENV:-.venv}/bin/python
    "$python" -m pip install -q --no-deps 'liger-kernel==0.8.5' || echo "Liger could not be installed: its sides are absent" | tee -a "$log"
    SECONDS=0
fi
if [ -z "${POCL_COMMIT:-}" ] && ! git -C "$root" describe --always >/dev/null 2>&1 && [ -f "$carried/commit" ]; then
    POCL_COMMIT=$(cat "$carried/commit") && export POCL_COMMIT # a copy without its history: as of prepare_gpu.sh
fi
cd "$work" || exit 1 # not the tree, whose folders would hide what was placed

status=0
# section NAME SECONDS COMMAND...: runs it within its limit, and notes how it ended in run.json.
section() {
    local name=$1 most=$2 began=$SECONDS ended=0 left=$((limit - SECONDS - 3)) seconds
    shift 2
    case " $chosen " in *" $name "*) ;; *) return ;; esac
    say "$name"
    [ "$name" = versions ] || rm -f "$OUT/$name.json" # of an earlier run
    seconds=$((most < left ? most : left))
    if [ "$left" -lt 10 ]; then
        ended=no-time
        echo "no time left of $limit s" | tee -a "$log"
    else
        timeout --signal=INT --kill-after=10 "$seconds" "$@" > >(tee -a "$log") 2>&1 &
        running=$!
        wait "$running"
        ended=$?
        running=""
        case $ended in
            124) echo "$name did not end in $seconds s" | tee -a "$log" ;;
            137) [ $((SECONDS - began)) -ge "$seconds" ] && ended=124 && echo "$name did not end in $seconds s" | tee -a "$log" ;;
        esac
    fi
    [ "$ended" = 0 ] || status=1
    "$python" "$root/benchmarks/gpu_run.py" section "$name" $((SECONDS - began)) "$ended" | tee -a "$log"
}
# bench NAME SECONDS SCRIPT ARGUMENTS...: a section that is a script of this folder, on this device.
bench() { section "$1" "$2" "$python" "$root/benchmarks/$3" "${@:4}" --device "$kind"; }

# Of each the most seconds, on a GPU and on a CPU. A script's own budget leaves it time to start and to end.
gpu() { [ "$kind" = cuda ] && echo "$1" || echo "$2"; }
case $kind in
    cuda) linear=(--tokens 8192 --supervised 8192 --vocabulary 128256 --hidden 2048 --teacher-hidden 4096 --repeats 5) ;;
    cpu) linear=(--tokens 64 --supervised 32 --vocabulary 1000 --hidden 32 --teacher-hidden 48 --repeats 1) ;;
esac
bench versions 40 gpu_run.py versions
bench smoke "$(gpu 120 240)" smoke_gpu.py
bench loss "$(gpu 105 120)" loss_gpu.py --sides ours,liger,eager --budget "$(gpu 80 40)"
bench sweep "$(gpu 80 90)" sweep_gpu.py --budget "$(gpu 60 30)"
bench training "$(gpu 110 120)" train_gpu.py --budget "$(gpu 85 60)"
bench counters 45 counters_gpu.py
bench linear "$(gpu 45 60)" linear_loss.py --budget 30 "${linear[@]}"
bench compiled "$(gpu 60 90)" loss_gpu.py --append --sides ours,compiled --objectives forward_kl+CE,jsd+CE \
    --sizes "$(gpu 8192x151936 64x4099)" --budget "$(gpu 45 60)"
case " $chosen " in
    *" tests "*)
        limit=$((SECONDS + 200))
        processes=$(($(nproc) > 12 ? 12 : $(nproc))) # most of the time goes into compiling some 450 kernels
        export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
        section tests 190 "$python" -m pytest -p xdist -n "$processes" --dist worksteal -q --full -m gpu -c "$root/pyproject.toml" \
            --rootdir "$root" "$root/tests/loss/reference" "$root/tests/kernels" "$root"/tests/models/test_packed_{attention,forward}.py
        ;;
esac
say "done, exit status $status; results in $OUT"
exit "$status"

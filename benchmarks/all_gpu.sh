#!/usr/bin/env bash
# Every GPU benchmark in under 9 minutes on one card: operations, one step, whole runs, scaling with steps, batch and size. A
# part that runs out of its time leaves what it had; the others go on. Works from any checkout and any folder:
#
#     benchmarks/all_gpu.sh [FOLDER]     # results go to benchmarks/results, or to FOLDER
#
# Before it, once for each kind of card and for up to 6 minutes more: how our kernels are best cut there and which backend
# is the fastest, for kernels/measured/, which the measurements above then follow:
#
#     benchmarks/all_gpu.sh --tune [FOLDER]
#
# PYTHON names another interpreter. Nothing of the card's settings is touched. Python packages that the machine lacks are
# taken from a folder wheels/ in this checkout, if there is one, and only for this run. To fill it, elsewhere:
#
#     pip download --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#         --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels diffusers pydantic typer rich
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
tune=no
if [ "${1:-}" = --tune ]; then
    tune=yes
    shift
fi
out=$(mkdir -p "${1:-$root/benchmarks/results}" && cd "${1:-$root/benchmarks/results}" && pwd)
python=${PYTHON:-python3}
# The repository root *is* the package `unrolled`, whatever the checkout is called.
view=$(mktemp -d)
trap 'rm -rf "$view"' EXIT
ln -s "$root" "$view/unrolled"
export PYTHONPATH=$view${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

shopt -s nullglob
wheels=("$root"/wheels/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
    mapfile -t missing < <("$python" -c '
import sys
from importlib.metadata import PackageNotFoundError, version

for wheel in sys.argv[1:]:
    try:
        version(wheel.rsplit("/")[-1].split("-")[0])
    except PackageNotFoundError:
        print(wheel)
' "${wheels[@]}")
    if [ ${#missing[@]} -gt 0 ]; then
        "$python" -m pip install -q --no-index --find-links "$root/wheels" --no-deps --target "$view/site" \
            "${missing[@]}" || exit
        export PYTHONPATH=$PYTHONPATH:$view/site
    fi
fi
cd "$view"

failed=0
part() { # seconds, then the command
    local limit=$1
    shift
    echo "== $* (at most $limit s)"
    timeout --signal=INT --kill-after=5 "$limit" "$@" || { echo "== ended with $?"; failed=1; }
}

if [ $tune = yes ]; then
    part 345 "$python" "$root/benchmarks/tune.py" --limit 300 --output "$out/tune.json"
    if [ "$out" != "$root/benchmarks/results" ]; then # from some machines only that folder comes back
        mkdir -p "$out/measured" && cp "$root"/kernels/measured/*.json "$out/measured"
    fi
    exit $failed
fi
part 135 "$python" "$root/benchmarks/operations.py" --seconds 110 --output "$out/operations.json"
part 165 "$python" "$root/benchmarks/unet_step.py" --limit 140 --output "$out/unet_step.json"
part 105 "$python" "$root/benchmarks/pipelines.py" --limit 85 --output "$out/pipelines.json"
part 35 "$python" "$root/benchmarks/pipelines.py" --structures sd-1.5 --steps 10 20 50 --seconds 1 --limit 20 \
    --output "$out/steps.json"
part 95 "$python" "$root/benchmarks/unet_step.py" --scaling --limit 80 --seconds 1 --output "$out/scaling.json"
exit $failed

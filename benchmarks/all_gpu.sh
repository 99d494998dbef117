#!/usr/bin/env bash
# Every GPU benchmark in under 9 minutes on one card: kernels, one step, whole runs, scaling. A part that runs out of its
# time leaves what it had; the others go on. Works from any checkout and any folder:
#
#     benchmarks/all_gpu.sh [FOLDER]     # results go to benchmarks/results, or to FOLDER
#
# PYTHON names another interpreter. Nothing of the card's settings is touched.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mkdir -p "${1:-$root/benchmarks/results}" && cd "${1:-$root/benchmarks/results}" && pwd)
python=${PYTHON:-python3}
# The repository root *is* the package `unrolled`, whatever the checkout is called.
view=$(mktemp -d)
trap 'rm -rf "$view"' EXIT
ln -s "$root" "$view/unrolled"
export PYTHONPATH=$view${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
cd "$view"

failed=0
part() { # seconds, then the command
    local limit=$1
    shift
    echo "== $* (at most $limit s)"
    timeout --signal=INT --kill-after=5 "$limit" "$@" || { echo "== ended with $?"; failed=1; }
}

part 145 "$python" "$root/benchmarks/kernels.py" --seconds 120 --output "$out/kernels.json"
part 165 "$python" "$root/benchmarks/unet_step.py" --limit 140 --output "$out/unet_step.json"
part 115 "$python" "$root/benchmarks/pipelines.py" --limit 95 --output "$out/pipelines.json"
part 95 "$python" "$root/benchmarks/unet_step.py" --scaling --limit 80 --seconds 1 --output "$out/scaling.json"
exit $failed

#!/usr/bin/env bash
# Fifteen minutes on one NVIDIA GPU, without a network or an installation, in two calls (bench/README.md, bench/gpu/plan.py):
#   bash bench/run_gpu.sh first  [OUT_DIR]               200 s: is it right, and the most telling rates
#   bash bench/run_gpu.sh second [OUT_DIR [FIRST_DIR]]   360 s: tests, rivals, counters, tiles; FIRST_DIR has call 1's head.json
#   bash bench/run_gpu.sh all    [OUT_DIR]               1000 s: both, and what neither has time for
#   bash bench/run_gpu.sh --dry-run first|second|all ... the same at toy size on the CPU; measures nothing
# OUT_DIR is what is named, else $OUT, else bench/results/<name of the GPU>. Reads the GPU's settings and changes none.
set -uo pipefail
dry=()
if [ "${1:-}" = --dry-run ]; then dry=(--dry-run); shift; fi
case "${1:-}" in
    first) total=200 ;;
    second) total=360 ;;
    all) total=1000 ;;
    *)
        sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
name=$(nvidia-smi --id=0 --query-gpu=name --format=csv,noheader 2>/dev/null || echo no-gpu)
slug=$(printf '%s' "$name" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-' | sed 's/^-//;s/-$//')
folder=$(realpath -m "${2:-${OUT:-$(dirname "$0")/results/$slug}}")
after=$(realpath -m "${3:-$folder}")
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
mkdir -p "$folder"
nvidia-smi --id=0 --format=csv \
    --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.used 2>/dev/null
"$python" -c 'import torch, triton'  # from a cold disk they take long: once, before many processes want them, and counted
exec "$python" -m bench.gpu "$1" --out "$folder" --after "$after" --seconds $((total - SECONDS)) "${dry[@]}"

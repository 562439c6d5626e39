#!/usr/bin/env bash
# Everything that is measured on one NVIDIA GPU, in under nine minutes, without a network or an installation; what csrc/ holds is
# built first, in this checkout, where nvcc, ninja and pybind11 are found:
#   bash bench/run_gpu.sh [OUT_DIR]             default bench/results/<name of the GPU>
#   TUNE=1 bash bench/run_gpu.sh [OUT_DIR]      ... and measure tile sizes at the end, in less time for the rest
# Reads the GPU's settings and changes none. Afterwards, to have "auto" take csrc/cuda where it was the faster:
#   python -m bench.gpu.wins OUT_DIR/head.json
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/python" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
total=525
tune=0
if [ "${TUNE:-0}" = 1 ]; then tune=175; fi

name=$(nvidia-smi --id=0 --query-gpu=name --format=csv,noheader 2>/dev/null || echo no-gpu)
slug=$(printf '%s' "$name" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-' | sed 's/^-//;s/-$//')
out=${1:-bench/results/$slug}
mkdir -p "$out"

nvidia-smi --id=0 --format=csv \
    --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.used
"$python" -c 'import platform, torch, triton, numpy
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)'

"$python" -m bench.gpu --out "$out" --seconds $((total - tune - SECONDS))
code=$?

if [ "${TUNE:-0}" = 1 ]; then
    if [ $((total - SECONDS)) -ge 152 ]; then
        "$python" -m bench.tune --seconds 150 --out "$out/tiles.json"
    else
        echo "no time left to tune"
    fi
fi
exit $code

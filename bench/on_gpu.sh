#!/usr/bin/env bash
# Everything that wants a GPU, on a bare CUDA machine, in one command: see bench/QUEUE.md.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/on_gpu.py "$@"

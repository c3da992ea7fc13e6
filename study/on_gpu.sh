#!/usr/bin/env bash
# The base model, its plugin and the rows of the study, trained on a bare CUDA machine in one command: see bench/QUEUE.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" study/on_gpu.py "$@"

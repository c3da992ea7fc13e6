#!/usr/bin/env bash
# Everything that wants a GPU, on a bare CUDA machine, in two calls: see bench/QUEUE.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
# What such a machine lacks may have come along. What is there goes first, so that nothing else changes its version.
if compgen -G "wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target build/wheels wheels/*.whl ||
        echo "wheels/: could not be installed; going on without" >&2
    export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD/build/wheels"
fi
exec "$python" bench/on_gpu.py "$@"

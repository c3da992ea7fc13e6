#!/usr/bin/env bash
# Everything that wants a GPU, on a bare CUDA machine, in two calls: see bench/QUEUE.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
# What such a machine lacks may have come along in wheels/; one that does not fit must not cost the others.
for wheel in wheels/*.whl; do
    [ -e "$wheel" ] || continue
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target build/wheels "$wheel" ||
        echo "$wheel: could not be installed; going on without" >&2
done
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD/build/wheels"
exec "$python" bench/gpu_calls.py "$@"

#!/usr/bin/env bash
# One call on a machine with one NVIDIA GPU: correctness, full-size 7B beside PyTorch, a short training.
# Needs jax (CUDA), flax, optax, torch and transformers; under 10 minutes. `--dry-run`: tiny, CPU.
# Results: $OUT if set, else benchmarks/results/. The exit status is 0 only if every section passed.
set -euo pipefail
cd "$(dirname "$0")/.."

# Both frameworks share the card in turn, so neither may take all of its memory in advance.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
exec "$python" -m benchmarks.gpu_suite "$@"

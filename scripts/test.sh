#!/usr/bin/env bash
# Install into .venv and run every check: linter, formatter, types, tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/setup.sh" dev

ruff check .
ruff format --check .
mypy
# One thread for each worker: two processes that both use all cores wait for each other.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
python -m pytest --numprocesses "${WORKERS:-auto}" --dist loadfile --durations 15 "$@"

#!/usr/bin/env bash
# Install into .venv, get a small real Llama (SmolLM2-135M), quantize it with AWQ, prove and measure
# what was written, and let transformers generate from it. Run again, it continues or does nothing.
set -euo pipefail
. "$(dirname "$0")/setup.sh" gguf,interop

python scripts/fetch_smollm2.py
compress run recipes/smollm2-awq.yaml "$@"
python scripts/generate.py out/smollm2-135m-awq "The capital of France is"

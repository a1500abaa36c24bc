"""Load a written checkpoint in transformers, as any user would, and continue a text.

python scripts/generate.py FOLDER "The capital of France is"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: Path) -> Any:
    """The model as transformers loads it, packed weights written out where there is no GPU."""
    options: dict[str, Any] = {"dtype": "auto"}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    packed = config.get("quantization_config", {}).get("quant_method") == "compressed-tensors"
    if packed and not torch.cuda.is_available():
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    written = load(args.folder).generate(**inputs, max_new_tokens=args.tokens, do_sample=False)
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

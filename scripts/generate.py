"""Load a written checkpoint in transformers, as any user would, and continue a text.

python scripts/generate.py FOLDER "The capital of France is"

A checkpoint that carries an attention policy attends by it, with a cache as small as it allows.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from compressor.attention.policy import read_policy
from compressor.attention.serve import attach


def load(folder: Path) -> Any:
    """The model as transformers loads it, packed weights written out where there is no GPU."""
    options: dict[str, Any] = {"dtype": "auto"}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    packed = config.get("quantization_config", {}).get("quant_method") == "compressed-tensors"
    if packed and not torch.cuda.is_available():
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(
        args.device
    )
    model, policy = load(args.folder).to(args.device), read_policy(args.folder)
    length = inputs["input_ids"].shape[1] + args.tokens
    options = attach(model, policy, length=length).options() if policy else {}
    written = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, **options)[0]
    print(tokenizer.decode(written, skip_special_tokens=True))


if __name__ == "__main__":
    main()

"""Load a written checkpoint in transformers, as any user would, and continue a text.

python scripts/generate.py FOLDER "The capital of France is"

A checkpoint that carries an attention policy attends by it, with a cache as small as it allows.
`--context 4000` puts as many tokens of the bundled novel before the prompt.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.bundled import bundled_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.attention.policy import read_policy
from compressor.attention.serve import attach


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
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--context", type=int, default=0, help="tokens before the prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    before = tokenizer(bundled_text("held_out", "fiction")[: 8 * args.context], verbose=False)[
        "input_ids"
    ]
    ids = before[: args.context] + tokenizer(args.prompt)["input_ids"]
    inputs = torch.tensor([ids], device=args.device)
    model = load(args.folder).to(args.device)
    policy = read_policy(args.folder)
    options = (
        {} if policy is None else attach(model, policy, length=len(ids) + args.tokens).options()
    )
    written = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=args.tokens,
        do_sample=False,
        **options,
    )[0]
    print(tokenizer.decode(written[args.context :], skip_special_tokens=True))
    for cache in options.values():
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // policy.heads
        each = 2 * policy.kv_heads * size * cache.layers[0].dtype.itemsize * len(policy.layers)
        whole = each * cache.get_seq_length()
        print(
            f"KV cache of {cache.get_seq_length()} tokens: {cache.nbytes / 1e6:.2f} MB, "
            f"{whole / 1e6:.2f} MB if every head kept all of them"
        )


if __name__ == "__main__":
    main()

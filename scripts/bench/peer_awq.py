"""AWQ by llm-compressor on a CPU, for `job.py`; run by an interpreter that has it.

python peer_awq.py MODEL OUTPUT TEXT SAMPLES LENGTH GROUP_SIZE
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

# Without an accelerator its cache of activations fails where it pins memory.
torch.Tensor.pin_memory = lambda self, *_: self


def main() -> None:
    model_id, output, text = sys.argv[1:4]
    samples, length, group_size = map(int, sys.argv[4:])
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32)
    ids = tokenizer(Path(text).read_text("utf-8")[:400_000], add_special_tokens=False)["input_ids"]
    rows = [ids[i * length : (i + 1) * length] for i in range(samples)]
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**weights, "group_size": group_size}}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": rows, "attention_mask": [[1] * length for _ in rows]}
        ),
        recipe=AWQModifier(ignore=["lm_head"], config_groups={"group": group}),
        max_seq_length=length,
        num_calibration_samples=samples,
    )
    model.save_pretrained(output, save_compressed=True)


if __name__ == "__main__":
    main()

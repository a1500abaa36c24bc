"""Fine-tune a small checkpoint on text of one style, for measuring deltas on a real pair.

    python scripts/fetch_smollm2.py
    python scripts/finetune_smollm2.py ~/.cache/compressor/smollm2-135m FINE novel.txt

transformers' trainer on rows of consecutive tokens, AdamW with a cosine after a short warm-up; in
float32, on a GPU under bfloat16 autocast. The result has the base's dtype. So that it is no worse
than its base on text it has not seen, every sixteenth row is kept for validation: the weights with
the lowest loss there are written, and training ends where that has stopped to fall.
"""

import shutil
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

from compressor.checkpoint.reader import open_checkpoint


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("fine", type=Path, help="folder to write")
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=240, help="at most")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    ids = tokenizer(options.text.read_text("utf-8"), add_special_tokens=False).input_ids
    pieces = torch.tensor(ids).split(options.length)
    rows = [{"input_ids": row, "labels": row} for row in pieces if len(row) == options.length]
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 20),
            bf16=torch.cuda.is_available(),
            eval_strategy="steps",
            eval_steps=20,
            save_steps=20,
            load_best_model_at_end=True,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=[row for i, row in enumerate(rows) if i % 16],
            eval_dataset=rows[::16],
            callbacks=[EarlyStoppingCallback(3)],
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
    if trainer.state.best_metric >= before:
        raise SystemExit("no step is better than the base on unseen rows: try a lower --lr")
    model.to(open_checkpoint(options.base).dtype).save_pretrained(options.fine)
    for path in options.base.glob("*token*"):
        shutil.copyfile(path, options.fine / path.name)


if __name__ == "__main__":
    main()

"""Variants that are ways of attending: perplexity of held-out text, and passkeys that are found."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from variant import Bench, Figures

from compressor.checkpoint.find import locate
from compressor.checkpoint.records import Records
from compressor.evaluate.passkey import Passkey, passkey
from compressor.evaluate.perplexity import evaluate
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Attending


def whole_model(bench: Bench, name: str, *, dtype: torch.dtype | None = None) -> SourceModel:
    """A model by folder, GGUF file or Hub id; if not told otherwise, in its own dtype on a GPU."""
    source = locate(name, fetch=True).source
    own = source.checkpoint.running_dtype(bench.device)
    return SourceModel(source, device=bench.device, dtype=dtype or own)


def token_rows(model: SourceModel, text: str, rows: int, length: int) -> Tensor:
    """Ids [rows, length] from a text's beginning."""
    tokenizer = model.tokenizer()
    text = text[: 12 * rows * length]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < rows * length:
        raise SystemExit(f"the text has {len(ids)} tokens, {rows * length} are needed")
    return torch.tensor(ids[: rows * length]).reshape(rows, length)


def records(bench: Bench, folder: Path | None, *settings: str) -> Records:
    """Where training puts its steps: in `folder`, to go on from there, for these options alone."""
    follows = {name: str(getattr(bench.options, name)) for name in settings}
    return Records(folder or bench.work / "scratch", json.dumps(follows))


class Ways:
    """A model, held-out rows of which `scored` targets count, and passkeys hidden in a text."""

    def __init__(
        self, bench: Bench, model: SourceModel, ids: Tensor, *, haystack: str,
        tasks: Sequence[Passkey], scored: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model, self.ids, self.scored = model, ids, scored
        self.haystack, self.tasks = haystack, tasks
        self.run: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
        self.run["batch"] = bench.options.batch

    def figures(self, way: Attending | None) -> Figures:
        """Perplexity; and over all tasks the share of the passkeys' tokens that are found, also by
        length and depth, and of passkeys that are found whole."""
        source, tokenizer = self.model.source, self.model.tokenizer()
        found = evaluate(source, self.ids, scored=self.scored, attention=way, **self.run)
        sums: Figures = {"perplexity": found.perplexity.value}
        for task in self.tasks:
            keys = passkey(
                source, tokenizer, haystack=self.haystack, task=task, attention=way, **self.run
            )
            values = {"passkey": keys.accuracy.value, "found whole": keys.exact.value}
            values |= {f"{cell.length}@{cell.depth:g}": cell.accuracy for cell in keys.cells}
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / len(self.tasks)
        return sums

"""A model that runs whole, and tokens for it."""

import torch
from torch import Tensor
from variant import Bench

from compressor.checkpoint.find import locate
from compressor.runner.source_model import SourceModel


def whole_model(bench: Bench, name: str) -> SourceModel:
    """A model by folder, GGUF file or Hub id; in its own dtype on a GPU."""
    source = locate(name, fetch=True).source
    dtype = source.checkpoint.running_dtype(bench.device)
    return SourceModel(source, device=bench.device, dtype=dtype)


def token_rows(model: SourceModel, text: str, rows: int, length: int) -> Tensor:
    """Ids [rows, length] from a text's beginning."""
    tokenizer = model.tokenizer()
    text = text[: 12 * rows * length]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < rows * length:
        raise SystemExit(f"the text has {len(ids)} tokens, {rows * length} are needed")
    return torch.tensor(ids[: rows * length]).reshape(rows, length)

"""What a model makes of a text as one vector, which is what heads of later tasks read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.foreign.calls import foreign
from compressor.runner.source_model import SourceModel


@dataclass(frozen=True, slots=True)
class Representation:
    """A whole model in memory.

    kind   what the vector is, in words
    apply  token ids [rows, length] on the device → vectors [rows, hidden]
    """

    kind: str
    apply: Callable[[Tensor], Tensor]
    device: torch.device
    batch: int

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids [rows, length] → vectors [rows, hidden], float32 on the CPU."""
        with torch.inference_mode():
            parts = [self.apply(part.to(self.device)) for part in torch.split(ids, self.batch)]
        return torch.cat([part.float().cpu() for part in parts])


def of_decoder(
    source: Source, *, device: torch.device, dtype: torch.dtype, batch: int
) -> Representation:
    """The state after the last norm, at the last position."""
    model = SourceModel(source, device=device, dtype=dtype).whole()
    return _last_state(model, device, batch)


def _last_state(model: Any, device: torch.device, batch: int) -> Representation:
    decoder = model.get_decoder()

    def apply(ids: Tensor) -> Tensor:
        with foreign("the model does not run"):
            states: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states[:, -1]

    return Representation("final-norm state of the last position", apply, device, batch)


@contextmanager
def _unreported() -> Iterator[None]:
    """Without transformers' own table of weights that are left out: those of another head."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def of_encoder(
    folder: Path, *, device: torch.device, dtype: torch.dtype, batch: int
) -> Representation:
    """The pooler's output, or the first position's state where the checkpoint has no pooler.

    By transformers' own class of config.json's type, from safetensors and without code of the
    folder's. Raises InputError for what is no encoder, or lacks weights.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    with foreign("transformers does not accept this config.json"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False):
        raise InputError(
            f"{config.model_type} is neither a mapped decoder nor an encoder with masked words",
            hint="audit its weights alone: --weights-only",
        )
    with foreign("transformers does not load this model"), _unreported():
        model, info = AutoModel.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise InputError(f"the checkpoint lacks {', '.join(missing[:4])}")
    model = model.to(device).eval()
    pools = getattr(model, "pooler", None) is not None and not info["missing_keys"]

    def apply(ids: Tensor) -> Tensor:
        with foreign("the model does not run"):
            out = model(input_ids=ids)
        pooled: Tensor = out.pooler_output if pools else out.last_hidden_state[:, 0]
        return pooled

    return Representation(
        "pooler's output" if pools else "state of the first position", apply, device, batch
    )

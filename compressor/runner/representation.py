"""What a model makes of a text as one vector, which is what heads of later tasks read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.foreign.calls import foreign
from compressor.runner.encoder import load_encoder
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
    decoder = SourceModel(source, device=device, dtype=dtype).whole().get_decoder()

    def apply(ids: Tensor) -> Tensor:
        with foreign("the model does not run"):
            states: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states[:, -1]

    return Representation("final-norm state of the last position", apply, device, batch)


def of_encoder(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, batch: int
) -> Representation:
    """The pooler's output, or the first position's state where the checkpoint has no pooler. Raises
    InputError for what is no encoder, or lacks weights."""
    encoder = load_encoder(checkpoint, device=device, dtype=dtype)
    missing = [name for name in encoder.missing if not name.startswith("pooler.")]
    if missing:
        raise InputError(f"the checkpoint lacks {', '.join(missing[:4])}")
    model = encoder.model
    pools = getattr(model, "pooler", None) is not None and not encoder.missing

    def apply(ids: Tensor) -> Tensor:
        with foreign("the model does not run"):
            out = model(input_ids=ids)
        pooled: Tensor = out.pooler_output if pools else out.last_hidden_state[:, 0]
        return pooled

    return Representation(
        "pooler's output" if pools else "state of the first position", apply, device, batch
    )

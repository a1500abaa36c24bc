"""An encoder such as BERT or RoBERTa, whole in memory, by transformers' own classes.

No map says what it is made of: parameters are found by what they are, and the checkpoint's names
are those of the model, with or without a prefix.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint.reader import Checkpoint
from compressor.errors import InputError
from compressor.foreign.calls import foreign
from compressor.runner.generation_import import import_generation

BATCH = 16
"""Rows of tokens at a time."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A loaded encoder and the checkpoint that it was read from.

    missing  parameters that the checkpoint lacks
    """

    model: Any
    checkpoint: Checkpoint
    missing: tuple[str, ...]

    def stored_name(self, parameter: Tensor) -> str:
        """The checkpoint's name of a parameter. Raises InputError where it has none."""
        own: str = next(n for n, p in self.model.named_parameters() if p is parameter)
        prefix = f"{self.model.base_model_prefix}."
        bare = own.removeprefix(prefix)
        found = [n for n in (own, bare, prefix + bare) if n in self.checkpoint.entries]
        if not found:
            raise InputError(f"the checkpoint has no {own}, which transformers has in its model")
        return found[0]

    @property
    def table(self) -> str:
        """The name of its table of tokens."""
        return self.stored_name(self.model.get_input_embeddings().weight)

    def narrowing(self) -> list[tuple[str, nn.Linear]]:
        """Linears with more inputs than outputs, by the names of their weights: of each block the
        one that its MLP ends with."""
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        return [
            (self.stored_name(module.weight), module)
            for module in base.modules()
            if isinstance(module, nn.Linear) and module.in_features > module.out_features
        ]


def load_encoder(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, masked_words: bool = False
) -> Encoder:
    """From a checkpoint's tensors as they are read, without code of its folder's.

    masked_words  with the head that says which words are masked
    Raises InputError for what is no encoder.
    """
    import_generation()
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    with foreign("transformers does not accept this config.json"):
        config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False):
        raise InputError(
            f"{config.model_type} is neither a mapped decoder nor an encoder with masked words",
            hint="audit its weights alone: --weights-only",
        )
    kind = (MODEL_FOR_MASKED_LM_MAPPING if masked_words else MODEL_MAPPING)[type(config)]
    with foreign("transformers does not load this model"), _unreported():
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=checkpoint.read(checkpoint.entries),
            dtype=dtype,
            output_loading_info=True,
        )
    return Encoder(model.to(device).eval(), checkpoint, tuple(sorted(info["missing_keys"])))


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


@torch.inference_mode()
def masked_nll(encoder: Encoder, shown: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Negative log-likelihood of each masked token, float64 [rows, length]; 0 elsewhere.

    shown  ids that the model sees [rows, length];  targets  what stood there;  masked  bool, where
    """
    found = torch.zeros(shown.shape, dtype=torch.float64)
    for start in range(0, len(shown), BATCH):
        part = slice(start, start + BATCH)
        hidden, device = masked[part], encoder.model.device
        with foreign("the model does not run"):
            logits = encoder.model(input_ids=shown[part].to(device)).logits
        loss = nn.functional.cross_entropy(
            logits[hidden.to(device)].float(), targets[part][hidden].to(device), reduction="none"
        )
        found[part][hidden] = loss.double().cpu()
    return found


@torch.inference_mode()
def mean_inputs(encoder: Encoder, ids: Tensor) -> dict[str, Tensor]:
    """Mean size of what enters each `narrowing` linear over rows of tokens [rows, length]: the name
    of its weight → float64 [inputs]."""
    sums: dict[str, Tensor] = {}

    def seen(name: str) -> Any:
        def hook(module: nn.Module, inputs: Sequence[Tensor]) -> None:
            size = inputs[0].detach().abs().double().flatten(0, -2).sum(0).cpu()
            sums[name] = sums.get(name, 0) + size

        return hook

    with ExitStack() as hooks:
        for name, module in encoder.narrowing():
            hooks.enter_context(module.register_forward_pre_hook(seen(name)))
        for part in torch.split(ids, BATCH):
            with foreign("the model does not run"):
                encoder.model(input_ids=part.to(encoder.model.device))
    return {name: total / ids.numel() for name, total in sums.items()}

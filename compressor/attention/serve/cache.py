"""A transformers cache that keeps of each KV head what its policy lets later queries see."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from compressor.attention.policy import AttentionPolicy, Group
from compressor.attention.rule import Held
from compressor.attention.serve.stored_cache import LayerRounding
from compressor.errors import InputError


class HeadLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: of each group of heads the keys that its rules keep.

    `steps` is what the current queries may look at: it holds a chunk's own tokens too, and is gone
    when the attention function has taken it.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, groups: Sequence[Group], rounding: LayerRounding | None = None) -> None:
        super().__init__()
        self.groups, self.rounding = groups, rounding
        self.seen = 0
        self.held: list[Held] = []
        self.steps: list[Held] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, on the device and in the dtype of the first keys."""
        self.device, self.dtype = key_states.device, key_states.dtype
        empty = split(key_states[:, :, :0], value_states[:, :, :0], self.groups)
        self.held = [replace(held, memory={}) for held in empty]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in a step's keys and values [rows, kv_heads, length, head_dim]; gives them back, as
        the checkpoint's cache rounds them."""
        if self.rounding is not None:
            key_states, value_states = self.rounding(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.seen = self.seen, self.seen + key_states.shape[2]
        new = split(key_states, value_states, self.groups)
        self.steps = [_joined(old, more, before) for old, more in zip(self.held, new, strict=True)]
        self.held = [
            self._kept(group, step) for group, step in zip(self.groups, self.steps, strict=True)
        ]
        return key_states, value_states

    def _kept(self, group: Group, step: Held) -> Held:
        """What later queries may see, copied so that the rest is freed."""
        positions = step.positions
        if positions is None:
            positions = torch.arange(self.seen) if group.rules else torch.empty(0)
        index = group.kept(positions, self.seen)
        if index is None:
            return step
        at = index.to(step.keys.device)
        return Held(step.keys[:, :, at], step.values[:, :, at], positions[index], step.memory)

    def crop(self, length: int) -> None:
        """Take back the tokens after the first `length`. Raises InputError where heads have already
        forgotten what a shorter text would still see."""
        if length >= self.seen:
            return
        if any(held.positions is not None for held in self.held):
            raise InputError("heads that forget keys cannot take tokens back")
        self.held = [
            replace(held, keys=held.keys[:, :, :length], values=held.values[:, :, :length])
            for held in self.held
        ]
        self.seen = length

    def take(self) -> list[Held]:
        """What the current step's queries may look at, by group of heads, once."""
        if self.steps is None:
            raise RuntimeError("a step was taken before its keys came")
        steps, self.steps = self.steps, None
        return steps

    def get_seq_length(self) -> int:
        """Tokens of the text so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask over the whole text would have, and the place of the first."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (the name in older transformers)."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.held, self.steps = [], None
        self.seen, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        if self.is_initialized:
            at = beam_idx.to(self.device)
            self.held = [_rows(held, at) for held in self.held]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        tensors = [tensor for held in self.held for tensor in (held.keys, held.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def split(keys: Tensor, values: Tensor, groups: Sequence[Group]) -> list[Held]:
    """Keys and values [rows, kv_heads, length, head_dim] by group of heads."""
    if len(groups) == 1:
        return [Held(keys, values)]
    return [Held(keys[:, group.heads], values[:, group.heads]) for group in groups]


def _joined(old: Held, new: Held, seen: int) -> Held:
    positions = old.positions
    if positions is not None:
        more = torch.arange(seen, seen + new.keys.shape[2])
        positions = torch.cat([positions, more])
    return Held(
        torch.cat([old.keys, new.keys], dim=2),
        torch.cat([old.values, new.values], dim=2),
        positions,
        old.memory,
    )


def _rows(held: Held, at: Tensor) -> Held:
    memory = {
        name: kept[at.to(kept.device)]
        if isinstance(kept, Tensor)
        else [deepcopy(kept[row]) for row in at.tolist()]
        for name, kept in (held.memory or {}).items()
    }
    return Held(held.keys[at], held.values[at], held.positions, memory)


class PolicyCache(Cache):  # type: ignore[misc]
    """The cache of one text (or batch of texts of one length) under a policy."""

    def __init__(
        self, policy: AttentionPolicy, rounding: Sequence[LayerRounding] | None = None
    ) -> None:
        own: Sequence[LayerRounding | None] = rounding or [None] * len(policy.layers)
        super().__init__(
            layers=[
                HeadLayer(layer.groups(policy.kv_heads), one)
                for layer, one in zip(policy.layers, own, strict=True)
            ]
        )

    def crop(self, length: int) -> None:
        """Take back the tokens after the first `length`."""
        for layer in self.layers:
            layer.crop(length)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        return sum(layer.nbytes for layer in self.layers)

"""A transformers cache that keeps of each KV head what its policy lets later queries see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from compressor.attention.policy import AttentionPolicy, LayerPolicy


@dataclass(frozen=True, slots=True)
class Held:
    """Keys and values [rows, heads, n, head_dim] with their places in the text, int [n]."""

    keys: Tensor
    values: Tensor
    places: Tensor


class HeadLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: whole texts for full heads, first and recent tokens for streaming ones.

    Between two steps a streaming head holds its sinks and window - 1 tokens; the next query's own
    token makes the window full. `step` is what the current queries may look at: it holds a chunk's
    own tokens too, and is gone when the attention function has taken it.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, layer: LayerPolicy, *, kv_heads: int) -> None:
        super().__init__()
        streaming = layer.streaming.heads if layer.streaming else ()
        self.layer = layer
        self.streaming = list(streaming)
        self.full = [head for head in range(kv_heads) if head not in streaming]
        self.seen = 0
        self.held: Held | None = None
        self.step: Held | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, on the device and in the dtype of the first keys."""
        self.device, self.dtype = key_states.device, key_states.dtype
        self.keys = key_states[:, self.full, :0]
        self.values = value_states[:, self.full, :0]
        self.held = Held(
            key_states[:, self.streaming, :0],
            value_states[:, self.streaming, :0],
            torch.empty(0, dtype=torch.long, device=self.device),
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in a step's keys and values [rows, kv_heads, length, head_dim]; gives them back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[2]
        if self.full:
            self.keys = torch.cat([self.keys, key_states[:, self.full]], dim=2)
            self.values = torch.cat([self.values, value_states[:, self.full]], dim=2)
        if self.layer.streaming is not None:
            assert self.held is not None
            new = torch.arange(self.seen, self.seen + length, device=key_states.device)
            self.step = Held(
                torch.cat([self.held.keys, key_states[:, self.streaming]], dim=2),
                torch.cat([self.held.values, value_states[:, self.streaming]], dim=2),
                torch.cat([self.held.places, new]),
            )
            self.held = self._kept(self.step, self.seen + length)
        self.seen += length
        return key_states, value_states

    def _kept(self, step: Held, seen: int) -> Held:
        """What a query at place `seen` or later may see, copied so that the rest is freed."""
        assert self.layer.streaming is not None
        sinks, window = self.layer.streaming.sinks, self.layer.streaming.window
        total = step.places.shape[0]
        # Places ascend, so what is kept is a beginning and an end.
        recent = min(window - 1, total, max(0, seen - sinks))
        first = min(sinks, total - recent)
        index = torch.cat([torch.arange(first), torch.arange(total - recent, total)])
        index = index.to(step.places.device)
        return Held(step.keys[:, :, index], step.values[:, :, index], step.places[index])

    def take(self) -> Held:
        """What the current step's queries may look at in streaming heads, once."""
        assert self.step is not None
        step, self.step = self.step, None
        return step

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
        self.held = self.step = None
        del self.keys, self.values
        self.seen, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        if self.is_initialized:
            index = beam_idx.to(self.device)
            self.keys, self.values = self.keys[index], self.values[index]
            assert self.held is not None
            keys, values = self.held.keys[index], self.held.values[index]
            self.held = Held(keys, values, self.held.places)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        if self.held is None:
            return 0
        tensors = (self.keys, self.values, self.held.keys, self.held.values)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class PolicyCache(Cache):  # type: ignore[misc]
    """The cache of one text (or batch of texts of one length) under a policy."""

    def __init__(self, policy: AttentionPolicy) -> None:
        super().__init__(
            layers=[HeadLayer(layer, kv_heads=policy.kv_heads) for layer in policy.layers]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        return sum(layer.nbytes for layer in self.layers)

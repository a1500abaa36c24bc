"""Streaming heads: a few first tokens, the sinks, and a recent window (StreamingLLM, arXiv
2309.17453; DuoAttention, arXiv 2410.10819)."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from compressor_kernels.attention.head_attention import head_decode, head_prefill
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from compressor.attention.key_blocks import HALF
from compressor.attention.masked import OwnAttention, both_masks, softmax_attention
from compressor.attention.policy import AttentionPolicy, LayerPolicy, policy_of
from compressor.attention.rope import Rotary, rotated, rotated_back
from compressor.attention.rule import Held, Rule, RuleCall, Seen
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.runner.attention_call import AttentionCall

QUERY_ROWS = 1024
"""Queries computed at a time: a prompt takes no memory of its square."""
KERNEL_DIM = 128
"""The largest head that the kernels of full and streaming heads take."""
GATES = "duo_attention.gates"


class StreamingHeads(Rule):
    """KV heads of a layer that see the first `sinks` tokens and the last `window`.

    window  counts the query's own token: a decoding step reads at most sinks + window keys
    """

    by_slot: ClassVar[bool] = True

    heads: tuple[int, ...] = Field(min_length=1, strict=False)
    sinks: int = Field(ge=0)
    window: int = Field(ge=1)

    @model_validator(mode="after")
    def _is_a_window(self) -> Self:
        if self.sinks >= self.window:
            raise ValueError(f"{self.sinks} sinks are not fewer than the window of {self.window}")
        return self

    def seen(self, call: RuleCall) -> Seen:
        def mask(part: slice) -> Tensor:
            return self._mask(call.own[part], call.positions)[None, None]

        return mask

    def _mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        return token_mask(queries, keys, sinks=self.sinks, window=self.window)

    def kept(self, positions: Tensor, length: int) -> Tensor:
        # Positions ascend, so what is kept is a beginning and an end.
        total = positions.shape[0]
        recent = min(self.window - 1, total, max(0, length - self.sinks))
        first = min(self.sinks, total - recent)
        return torch.cat([torch.arange(first), torch.arange(total - recent, total)])

    def attend(self, call: RuleCall, value: Tensor, own: OwnAttention) -> Tensor:
        q, k, positions = call.query, call.key, call.positions
        out = torch.empty((*q.shape[:3], value.shape[-1]), dtype=q.dtype, device=q.device)
        old = k.shape[2] - q.shape[2]
        first = min(self.sinks, k.shape[2])
        for start in range(0, q.shape[2], QUERY_ROWS):
            stop = min(start + QUERY_ROWS, q.shape[2])
            # No query of this part sees a key, but for sinks, from before the first one's window.
            begin = max(first, old + start - self.window + 1)
            parts = [torch.arange(first), torch.arange(begin, max(begin, old + stop))]
            index = torch.cat(parts).to(q.device)
            at, of_queries = positions[index], positions[old + start : old + stop]
            mask = self._mask(of_queries, at)
            if own.window is not None:
                mask &= of_queries[:, None] - at[None, :] < own.window
            out[:, :, start:stop] = softmax_attention(
                q[:, :, start:stop], k[:, :, index], value[:, :, index], mask, own
            )
        return out

    def beside_full(
        self, query: Tensor, new: Held, full: Held, mine: Held, heads: tuple[list[int], list[int]],
        own: OwnAttention,
    ) -> Tensor | None:  # fmt: skip
        dim, length = query.shape[3], query.shape[2]
        if own.softcap is not None or own.window is not None or query.dtype not in HALF:
            return None
        if dim > KERNEL_DIM or dim % 8:
            return None
        if length == 1:  # a step's streaming keys are all visible to it
            order = torch.tensor([*heads[0], *heads[1]], dtype=torch.int32, device=query.device)
            return head_decode(
                query, full.keys, full.values, mine.keys, mine.values,
                order=order, scale=own.scaling,
            )  # fmt: skip
        if length != mine.keys.shape[2]:
            return None
        kinds = torch.zeros(new.keys.shape[1], dtype=torch.bool, device=query.device)
        kinds[heads[1]] = True
        return head_prefill(
            query, new.keys, new.values,
            streaming=kinds, sink=self.sinks, window=self.window, scale=own.scaling,
        )  # fmt: skip

    def evaluate_by_slot(self, call: AttentionCall) -> Tensor:
        return evaluated_by_slot(call, sinks=self.sinks, window=self.window)

    def attend_by_slot(
        self, call: RuleCall, value: Tensor, own: OwnAttention, tables: Callable[[int], Rotary]
    ) -> Tensor:
        """A query stands at its rank among the keys it may see. For the recent keys of a chunk only
        their distance counts, so they take the slots in which they lie; for the sinks a query takes
        its rank."""
        q, k, positions = call.query, call.key, call.positions
        q_len, k_len = q.shape[2], k.shape[2]
        cos, sin = tables(k_len + self.sinks + self.window)
        slots = torch.arange(k_len, device=q.device)
        first = int((positions < self.sinks).sum())
        rank = call.own.clamp(max=self.sinks + self.window - 1)
        key = rotated(k, (cos[slots], sin[slots]))
        near = rotated(q, (cos[slots[k_len - q_len :]], sin[slots[k_len - q_len :]]))
        far = rotated(q, (cos[rank], sin[rank]))
        zeros = torch.zeros_like
        keys = torch.cat(
            [
                torch.cat([zeros(key[:, :, :first]), key[:, :, first:]], dim=2),
                torch.cat([key[:, :, :first], zeros(key[:, :, first:])], dim=2),
            ],
            dim=-1,
        )
        mask = self._mask(call.own, positions)
        if own.window is not None:
            mask &= call.own[:, None] - positions[None, :] < own.window
        return softmax_attention(torch.cat([near, far], dim=-1), keys, value, mask, own)

    @classmethod
    def describe(cls, rules: Sequence[Self], policy: AttentionPolicy) -> list[str]:
        streaming = sum(len(rule.heads) for rule in rules)
        windows = sorted({(rule.sinks, rule.window) for rule in rules})
        shown = ", ".join(f"{sinks} sinks + {window} recent" for sinks, window in windows)
        return [
            f"{streaming} of {len(policy.layers) * policy.kv_heads} KV heads streaming "
            f"({shown}; positions by {policy.positions})"
        ]


def token_mask(queries: Tensor, keys: Tensor, *, sinks: int, window: int) -> Tensor:
    """Which key a streaming head lets a query see: (j < S or i - j < W) and j <= i.

    queries, keys  positions in the text, int [Tq] and [Tk]. Gives bool [Tq, Tk].
    """
    distance = queries[:, None] - keys[None, :]
    return ((keys < sinks)[None, :] | (distance < window)) & (distance >= 0)


def evaluated_by_slot(call: AttentionCall, *, sinks: int, window: int) -> Tensor:
    """A whole text with every head streaming, positions by cache slot.

    Between recent tokens slots are as far apart as positions in the text. A sink is nearer than in
    the text by what was evicted between, so the sinks appear a second time, in channels of their
    own, for a query that is rotated back by as much: one softmax, and the model's own attention.
    """
    if call.rotary is None:
        raise InputError("slot positions need a rotary embedding, which this model has not")
    length, dim = call.key.shape[2:]
    position = torch.arange(length, device=call.key.device)
    distance = position[:, None] - position[None, :]
    first = min(sinks, length)
    recent = (distance >= 0) & (distance < window) & (position >= sinks)[None, :]
    mask = torch.cat([recent, distance[:, :first] >= 0], dim=1)
    evicted = (position - (sinks + window - 1)).clamp(min=0)
    query = torch.cat([call.query, rotated_back(call.query, evicted, call.rotary)], dim=-1)
    key = torch.cat([pad(call.key, (0, dim)), pad(call.key[:, :, :first], (dim, 0))], dim=2)
    value = torch.cat([call.value, call.value[:, :, :first]], dim=2)
    own = None if call.mask is None else torch.cat([call.mask, call.mask[..., :first]], dim=-1)
    return call.plain(query, key, value, both_masks(own, mask[None, None]))


def evaluated_by_text(call: AttentionCall, *, sinks: int, window: int) -> Tensor:
    """A whole text with every head streaming, positions by place in the text."""
    place = torch.arange(call.key.shape[2], device=call.key.device)
    mask = token_mask(place, place, sinks=sinks, window=window)[None, None]
    return call.plain(call.query, call.key, call.value, both_masks(call.mask, mask))


def streaming_policy(
    layout: ModelLayout, streaming: Tensor, *, sinks: int, window: int, **options: Any
) -> AttentionPolicy:
    """A model's policy from which KV heads stream, bool [layers, kv_heads], with one window.

    options  further fields of the policy
    """
    return policy_of(layout, head_layers(streaming, sinks=sinks, window=window), **options)


def head_layers(
    streaming: Sequence[Sequence[bool]] | Tensor, *, sinks: int, window: int
) -> tuple[LayerPolicy, ...]:
    """Layers from which KV heads stream, [layers, kv_heads], with one window for all."""
    layers = []
    for row in torch.as_tensor(streaming, dtype=torch.bool):
        chosen = tuple(int(i) for i in row.nonzero()[:, 0])
        held = (StreamingHeads(heads=chosen, sinks=sinks, window=window),) if chosen else ()
        layers.append(LayerPolicy(rules=held))
    return tuple(layers)


def streaming_heads(policy: AttentionPolicy) -> Tensor:
    """Which KV heads stream, bool [layers, kv_heads]."""
    mask = torch.zeros(len(policy.layers), policy.kv_heads, dtype=torch.bool)
    for row, layer in zip(mask, policy.layers, strict=True):
        for rule in layer.rules:
            if isinstance(rule, StreamingHeads):
                row[list(rule.heads)] = True
    return mask


def duo_attention_files(
    policy: AttentionPolicy, tensors: Mapping[str, Tensor], *, model: str
) -> dict[str, bytes]:
    """DuoAttention's folder: `full_attention_heads.tsv`, a row of gates for each layer, and
    `config.json` with the window. LServe reads the same.

    Readers choose heads by the quantile of `sparsity`; gates that would give them other heads than
    the policy's (as after a threshold) are written as 1 and 0. `window` counts the query's own
    token, as `recent_size` does in that project's training mask.
    Raises InputError where layers have different windows, positions go by slot, or heads attend by
    other rules, too.
    """
    others = {r.kind for layer in policy.layers for r in layer.rules} - {"streaming"}
    if others:
        raise InputError(
            f"DuoAttention's form has no word for {', '.join(sorted(others))}",
            hint="--form lserve" if others == {"lserve"} else "--form config, where that has one",
        )
    return streaming_files(policy, tensors, model=model)


def streaming_files(
    policy: AttentionPolicy, tensors: Mapping[str, Tensor], *, model: str
) -> dict[str, bytes]:
    """The same of the heads that stream, whatever the others do."""
    rules = [r for layer in policy.layers for r in layer.rules if isinstance(r, StreamingHeads)]
    windows = {(rule.sinks, rule.window) for rule in rules}
    if policy.positions != "text" or len(windows) > 1:
        raise InputError(
            "DuoAttention's form has one window for all layers, and positions by text",
            hint="positions: text",
        )
    if policy.reordered:
        raise InputError(
            "the heads are sorted in the weights; that form counts heads as the model had them",
            hint="learn the policy with reorder: false",
        )
    sinks, window = windows.pop() if windows else (0, 0)
    streaming = streaming_heads(policy)
    share = float(streaming.double().mean())
    gates = tensors.get(GATES)
    if gates is None or not torch.equal(_as_read(gates, share), ~streaming):
        gates = (~streaming).float()
    text = io.StringIO()
    np.savetxt(text, gates.double().numpy(), delimiter="\t")
    about: dict[str, Any] = policy.made_by.get("duo_attention", {})
    config = {
        **{key: value for key, value in about.items() if not isinstance(value, dict)},
        "model_name": model,
        "sink_size": sinks,
        "recent_size": window,
        "sparsity": share,
    }
    return {
        "full_attention_heads.tsv": text.getvalue().encode(),
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def _as_read(gates: Tensor, share: float) -> Tensor:
    """Which heads those readers take as full at a sparsity."""
    if share <= 0:
        return torch.ones_like(gates, dtype=torch.bool)
    if share >= 1:
        return torch.zeros_like(gates, dtype=torch.bool)
    values = gates.double().clamp(0, 1)
    return values >= torch.quantile(values.flatten(), share)


FORMS = {"duo-attention": duo_attention_files}

"""The attention policy: what each layer and KV head of a checkpoint may attend to, and how.

It is stored beside the weights as `attention_policy.json`, tensors that belong to it (gates,
scores) as `attention_policy.safetensors`. A KV head is full, or streaming: it sees a few first
tokens and a recent window (StreamingLLM, arXiv 2309.17453; DuoAttention, arXiv 2410.10819). Heads
that are full may choose blocks of keys by a score (Quest, arXiv 2406.10774; InfLLM-V2; SparDA,
arXiv 2606.04511).
The token mask below is the definition: a runtime may skip whole blocks, but masks by token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import load_file, save
from torch import Tensor

from compressor.errors import InputError
from compressor.foreign.untrusted import parse_json, read_file
from compressor.ir.layout import ModelLayout

POLICY_NAME = "attention_policy.json"
TENSORS_NAME = "attention_policy.safetensors"
VERSION = 1


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StreamingHeads(_Value):
    """KV heads of a layer that see the first `sinks` tokens and the last `window`.

    window  counts the query's own token: a decoding step reads at most sinks + window keys
    """

    heads: tuple[int, ...] = Field(min_length=1, strict=False)
    sinks: int = Field(ge=0)
    window: int = Field(ge=1)

    @model_validator(mode="after")
    def _is_a_window(self) -> Self:
        if self.sinks >= self.window:
            raise ValueError(f"{self.sinks} sinks are not fewer than the window of {self.window}")
        if list(self.heads) != sorted(set(self.heads)) or min(self.heads) < 0:
            raise ValueError(f"heads {list(self.heads)} are not ascending numbers from 0")
        return self


class BlockSelection(_Value):
    """How the full heads of a layer choose blocks of keys for a query.

    scorer       infllm: attention to mean keys;  quest: bounds of a page;  forecast: a projection
    block_size   keys of a block;  top_k  blocks of a query, forced ones included
    kernel_size, stride  of the mean keys (infllm, forecast); quest has none
    init_blocks, local_blocks  first blocks, and blocks before the query's own, always chosen
    per          whether all query heads of a KV head share one choice
    dense_below  texts of fewer keys are attended to whole
    """

    scorer: Literal["infllm", "quest", "forecast"]
    block_size: int = Field(64, ge=1)
    kernel_size: int = Field(32, ge=1)
    stride: int = Field(16, ge=1)
    init_blocks: int = Field(1, ge=0)
    local_blocks: int = Field(32, ge=0)
    top_k: int = Field(96, ge=1)
    per: Literal["kv_head", "query_head"] = "kv_head"
    dense_below: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        forced = self.init_blocks + self.local_blocks + 1
        if forced > self.top_k:
            raise ValueError(
                f"top_k {self.top_k} cannot hold {self.init_blocks} first blocks, "
                f"{self.local_blocks} local ones and the query's own"
            )
        if self.scorer != "quest" and self.block_size % self.stride:
            raise ValueError(f"stride {self.stride} does not divide block_size {self.block_size}")
        return self


class LayerPolicy(_Value):
    """One block. Streaming heads follow their window; `blocks` is for the others."""

    streaming: StreamingHeads | None = None
    blocks: BlockSelection | None = None


class AttentionPolicy(_Value):
    """A whole model's policy.

    heads, kv_heads  of every layer
    positions  what a rotary embedding turns by: text (a token's own place), or slot (its place
               among the keys that are kept, as StreamingLLM does; every head must then stream)
    reordered  whether each layer's KV heads were sorted, full ones first, in the weights
    made_by    pass name → the parameters and figures that the policy came from
    """

    version: Literal[1] = 1
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    positions: Literal["text", "slot"] = "text"
    reordered: bool = False
    layers: tuple[LayerPolicy, ...] = Field(min_length=1, strict=False)
    made_by: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _heads_exist(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} KV heads do not divide {self.heads} heads")
        for number, layer in enumerate(self.layers):
            if layer.streaming and layer.streaming.heads[-1] >= self.kv_heads:
                raise ValueError(
                    f"layer {number} has {self.kv_heads} KV heads, no {layer.streaming.heads[-1]}"
                )
        if self.positions == "slot":
            kinds = {_window(layer, self.kv_heads) for layer in self.layers}
            if len(kinds) > 1 or None in kinds:
                raise ValueError("slot positions need every head streaming, all with one window")
        return self

    @property
    def streaming_share(self) -> float:
        """Share of all KV heads that stream."""
        count = sum(len(layer.streaming.heads) for layer in self.layers if layer.streaming)
        return count / (len(self.layers) * self.kv_heads)

    def streaming_mask(self) -> Tensor:
        """Which KV heads stream, bool [layers, kv_heads]."""
        mask = torch.zeros(len(self.layers), self.kv_heads, dtype=torch.bool)
        for row, layer in zip(mask, self.layers, strict=True):
            if layer.streaming:
                row[list(layer.streaming.heads)] = True
        return mask

    def cached_tokens(self, length: int) -> int:
        """Key/value pairs kept after a text of `length` tokens, over all layers and KV heads: the
        next query's own token makes a window full."""
        total = 0
        for layer in self.layers:
            held = layer.streaming
            kept = min(length, held.sinks + held.window - 1) if held else 0
            streaming = len(held.heads) if held else 0
            total += streaming * kept + (self.kv_heads - streaming) * length
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is None is left out."""
        return self.model_dump(mode="json", exclude_none=True)


def _window(layer: LayerPolicy, kv_heads: int) -> tuple[int, int] | None:
    held = layer.streaming
    return (held.sinks, held.window) if held and len(held.heads) == kv_heads else None


def token_mask(queries: Tensor, keys: Tensor, *, sinks: int, window: int) -> Tensor:
    """Which key a streaming head lets a query see: (j < S or i - j < W) and j <= i.

    queries, keys  places in the text, int [Tq] and [Tk]. Gives bool [Tq, Tk].
    """
    distance = queries[:, None] - keys[None, :]
    return ((keys < sinks)[None, :] | (distance < window)) & (distance >= 0)


def layer_mask(layer: LayerPolicy, *, kv_heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Which key each KV head lets a query see, bool [kv_heads, Tq, Tk], `blocks` left out."""
    causal = queries[:, None] >= keys[None, :]
    mask = causal.expand(kv_heads, *causal.shape).clone()
    held = layer.streaming
    if held is not None:
        mask[list(held.heads)] = token_mask(queries, keys, sinks=held.sinks, window=held.window)
    return mask


def head_layers(
    streaming: Sequence[Sequence[bool]] | Tensor, *, sinks: int, window: int
) -> tuple[LayerPolicy, ...]:
    """Layers from which KV heads stream, [layers, kv_heads], with one window for all."""
    rows = torch.as_tensor(streaming, dtype=torch.bool)
    found = []
    for row in rows:
        chosen = tuple(int(i) for i in row.nonzero()[:, 0])
        held = StreamingHeads(heads=chosen, sinks=sinks, window=window) if chosen else None
        found.append(LayerPolicy(streaming=held))
    return tuple(found)


def combine(first: AttentionPolicy | None, second: AttentionPolicy) -> AttentionPolicy:
    """One policy of two that different passes made. Raises InputError where they overlap."""
    if first is None:
        return second
    shape = (first.heads, first.kv_heads, len(first.layers))
    if shape != (second.heads, second.kv_heads, len(second.layers)):
        raise InputError("two attention policies of one model disagree about its heads")
    if second.reordered and any(layer.streaming or layer.blocks for layer in first.layers):
        raise InputError(
            "a pass that sorts heads in the weights would change which heads an earlier policy "
            "means",
            hint="reorder: false, or learn from a checkpoint without a policy",
        )
    layers = []
    for number, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        for part in ("streaming", "blocks"):
            if getattr(a, part) is not None and getattr(b, part) is not None:
                raise InputError(
                    f"two passes both decide `{part}` of layer {number}",
                    hint="keep one of: " + ", ".join([*first.made_by, *second.made_by]),
                )
        merged = LayerPolicy(streaming=a.streaming or b.streaming, blocks=a.blocks or b.blocks)
        layers.append(merged)
    positions = "slot" if "slot" in (first.positions, second.positions) else "text"
    return first.model_copy(
        update={
            "positions": positions,
            "reordered": first.reordered or second.reordered,
            "layers": tuple(layers),
            "made_by": {**first.made_by, **second.made_by},
        }
    )


def make_policy(data: Mapping[str, Any], *, where: str = POLICY_NAME) -> AttentionPolicy:
    """A policy from plain data. Raises InputError with everything that is wrong."""
    version = data.get("version", VERSION)
    if version != VERSION:
        raise InputError(
            f"{where} has version {version!r}; this program knows {VERSION}",
            hint="a newer release may read it",
        )
    try:
        return AttentionPolicy.model_validate(dict(data))
    except ValidationError as error:
        found = []
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            found.append(f"{path}: {message}" if path else message)
        raise InputError(f"{where}: {'; '.join(found)}") from error


def read_policy(folder: Path) -> AttentionPolicy | None:
    """The policy of a checkpoint folder, or None. Raises InputError for one that is not valid."""
    path = folder / POLICY_NAME
    if not path.is_file():
        return None
    try:
        data = parse_json(read_file(path, what="policy"))
    except ValueError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a mapping")
    return make_policy(data, where=str(path))


def read_policy_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors stored with a checkpoint's policy (`PASS.NAME`); none where there is no file."""
    path = folder / TENSORS_NAME
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except Exception as error:
        raise InputError(f"cannot read {path}: {error}") from error


def policy_files(
    policy: AttentionPolicy, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, bytes]:
    """The files that store a policy: name → content; equal policies give equal bytes."""
    files = {POLICY_NAME: (json.dumps(policy.to_json(), indent=1) + "\n").encode()}
    if tensors:
        ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        files[TENSORS_NAME] = save(ready)
    return files


def check_policy(policy: AttentionPolicy, layout: ModelLayout) -> None:
    """Raises InputError where a policy is not for this model."""
    blocks = [unit for unit in layout.units if unit.kind == "block"]
    if len(policy.layers) != len(blocks):
        raise InputError(
            f"the attention policy is for {len(policy.layers)} layers, the model has {len(blocks)}"
        )
    for unit in blocks:
        shape = unit.attention
        if shape is None or (policy.heads, policy.kv_heads) != (shape.heads, shape.kv_heads):
            has = f"{shape.heads}/{shape.kv_heads}" if shape else "no"
            raise InputError(
                f"the attention policy is for {policy.heads}/{policy.kv_heads} heads, "
                f"{unit.name} has {has}"
            )
    if policy.positions == "slot" and learned_positions(layout):
        raise InputError(
            "slot positions need a rotary embedding; this model adds learned positions to its "
            "input",
            hint="positions: text",
        )


def tensor_problems(policy: AttentionPolicy, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the tensors stored with a policy: [layers, …], nothing but numbers."""
    problems = []
    for name, tensor in tensors.items():
        if tensor.dim() < 1 or tensor.shape[0] != len(policy.layers):
            problems.append(
                f"{name} of {TENSORS_NAME} has shape {list(tensor.shape)}, not one row for each of "
                f"{len(policy.layers)} layers"
            )
        elif not bool(torch.isfinite(tensor.float()).all()):
            problems.append(f"{name} of {TENSORS_NAME} holds NaN or infinity")
    return problems


def learned_positions(layout: ModelLayout) -> bool:
    """Whether the embedding holds a table of positions."""
    return len(layout.embedding.tensors) > 1


def describe(policy: AttentionPolicy) -> list[str]:
    """The policy for people, one line for each thing it says."""
    total = len(policy.layers) * policy.kv_heads
    streaming = int(policy.streaming_mask().sum())
    lines = []
    windows = sorted(
        {(x.streaming.sinks, x.streaming.window) for x in policy.layers if x.streaming}
    )
    if windows:
        shown = ", ".join(f"{sinks} sinks + {window} recent" for sinks, window in windows)
        lines.append(
            f"{streaming} of {total} KV heads streaming ({shown}; positions by {policy.positions})"
        )
    selections = [layer.blocks for layer in policy.layers if layer.blocks]
    for kind in dict.fromkeys(selections):
        count = selections.count(kind)
        lines.append(
            f"{count} of {len(policy.layers)} layers choose {kind.top_k} blocks of "
            f"{kind.block_size} keys by {kind.scorer}, one choice for each {kind.per}"
        )
    if policy.reordered:
        lines.append("KV heads are reordered in the weights, full ones first")
    return lines or ["every head is full"]


def streaming_policy(
    layout: ModelLayout, streaming: Tensor, *, sinks: int, window: int, **options: Any
) -> AttentionPolicy:
    """A model's policy from which KV heads stream, bool [layers, kv_heads], with one window.

    options  further fields of the policy
    """
    shape = next(unit.attention for unit in layout.units if unit.attention is not None)
    return AttentionPolicy(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        layers=head_layers(streaming, sinks=sinks, window=window),
        **options,
    )

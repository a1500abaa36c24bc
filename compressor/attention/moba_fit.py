"""What MoBA (arXiv 2502.13189) would cost a model that was not trained with it, by layer: how much
of attention the best blocks keep, and how well mean keys tell them apart (FlashMoBA, arXiv
2511.11571)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from compressor_kernels.attention.block_routing import mean_keys_ref
from pydantic import ConfigDict
from torch import Tensor
from torch.nn.functional import normalize

from compressor.attention.quality import watch_attention
from compressor.attention.rule import Value
from compressor.ir.layout import UnitLayout
from compressor.runner.attention_call import AttentionCall
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Progress

QUERIES = 128
"""Queries of a row that are looked at: the last ones, which have most blocks to choose from."""
ENOUGH = 0.95


class BlockFit(Value):
    """Of one layer and block size, means over query heads and texts.

    kept       share of attention in the best 1, 2 … blocks by the gate, a query's own counted
    delta_mu   how much nearer a query is to the key that it attends to most than to any other, of
               unit vectors, and of keys outside its own block
    snr        delta_mu · sqrt(head_dim / 2 block): what a gate by mean keys has to go by
    enough     fewest blocks that keep 95 %;  stays_full  whether that is more than half of them
    """

    model_config = ConfigDict(strict=False)

    layer: int
    block: int
    kept: tuple[float, ...]
    delta_mu: float
    snr: float
    enough: int
    stays_full: bool


def fit_blocks(
    model: SourceModel,
    ids: Tensor,
    sizes: Sequence[int],
    *,
    batch: int,
    progress: Progress = lambda name, done, total: None,
) -> list[BlockFit]:
    """Measure block sizes on rows of tokens, one block of the model in memory."""
    curves: dict[tuple[int, int], Tensor] = {}
    gaps: dict[tuple[int, int], float] = {}
    dims: list[int] = []

    def watch(unit: UnitLayout, call: AttentionCall) -> None:
        dims.append(call.query.shape[3])
        weight = call.query.shape[0] / len(ids)
        for size in sizes:
            place = (unit.index, size)
            kept, gap = _of_call(call, size)
            curves[place] = curves.get(place, torch.zeros(())) + kept * weight
            gaps[place] = gaps.get(place, 0.0) + gap * weight

    watch_attention(model, ids, watch, batch=batch, progress=progress)
    found = []
    for (layer, size), curve in curves.items():
        enough = int((curve < ENOUGH).sum()) + 1
        found.append(
            BlockFit(
                layer=layer,
                block=size,
                kept=tuple(curve.tolist()),
                delta_mu=gaps[layer, size],
                snr=gaps[layer, size] * math.sqrt(dims[0] / (2 * size)),
                enough=min(enough, len(curve)),
                stays_full=2 * enough > len(curve),
            )
        )
    return sorted(found, key=lambda fit: (fit.layer, fit.block))


def _of_call(call: AttentionCall, size: int) -> tuple[Tensor, float]:
    """Attention kept by the best blocks, [blocks], and Δμ; means over rows, heads and queries."""
    query, key, tokens = call.query[:, :, -QUERIES:], call.key, call.key.shape[2]
    group = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(group, dim=1).float()
    place = torch.arange(tokens, device=key.device)
    own = place[tokens - query.shape[2] :, None]
    scores = (query.float() @ keys.transpose(-1, -2)) * call.scaling
    share = scores.masked_fill(place > own, -torch.inf).softmax(-1)
    blocks = -(-tokens // size)
    mass = share.new_zeros((*share.shape[:3], blocks))
    mass.scatter_add_(-1, (place // size).expand(share.shape), share)
    means = mean_keys_ref(key, block_size=size).repeat_interleave(group, dim=1)
    gate = query.to(means.dtype) @ means.transpose(-1, -2)
    block = torch.arange(blocks, device=key.device)
    gate = gate.masked_fill(block > own // size, -torch.inf).masked_fill(
        block == own // size, torch.inf
    )
    best = gate.argsort(dim=-1, descending=True, stable=True)
    kept = mass.gather(-1, best).cumsum(-1).mean((0, 1, 2)).cpu()
    alike = normalize(query.float(), dim=-1) @ normalize(keys, dim=-1).transpose(-1, -2)
    past = (place // size < own // size).expand(alike.shape)
    top = share.masked_fill(~past, -1.0).argmax(-1, keepdim=True)
    noise = (alike * past).sum(-1) - alike.gather(-1, top)[..., 0]
    noise = noise / (past.sum(-1) - 1).clamp(min=1)
    there = past.sum(-1) > 1
    gap = (alike.gather(-1, top)[..., 0] - noise)[there]
    return kept, float(gap.mean()) if len(gap) else 0.0


def to_json(fits: Sequence[BlockFit], **about: Any) -> dict[str, Any]:
    """The file: what was measured, and one entry for each layer and block size."""
    return {"version": 1, "attention": "moba", **about, "fits": [f.model_dump() for f in fits]}

"""How well scorers choose blocks, layer by layer: against the teacher's choice, and by the share of
attention that lies in what they chose.

Every block runs over the same rows and attends as the model itself does; the scorers only watch.
Blocks that are chosen whatever their score say nothing of a scorer, so recall leaves them out, and
so do queries that have no more blocks than they may choose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.attention.evaluation import Ahead, rule_call
from compressor.attention.key_blocks import KeyBlocks, recent_blocks
from compressor.ir.unit import Unit
from compressor.methods.sparda.teacher import Teacher
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Execution, sweep

RECENT = "recent"
"""The scorer that needs none: the first blocks, and the last ones."""


@dataclass(frozen=True, slots=True)
class LayerQuality:
    """One scorer in one layer.

    recall  share of the teacher's blocks, forced ones aside, that it chose
    mass    share of all attention that lies in what it chose, forced blocks included
    """

    layer: int
    scorer: str
    recall: float
    mass: float


Sums = tuple[float, float, float, float]
"""Blocks that were hit and that were wanted, attention's mass, and rows of queries."""


@dataclass(slots=True)
class ChoiceMeter:
    """Adds up what scorers chose, call by call; a call for rows that ran before takes their place.

    parts  of each layer and first row: what was added up for parts of the queries, by scorer
    """

    teacher: Teacher
    parts: dict[tuple[int, int], list[tuple[str, Sums]]] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, layer: int, call: AttentionCall, chosen: Mapping[str, Tensor]) -> None:
        """Blocks chosen for all queries of a call, by scorer: [rows, sets, length, K]."""
        rule = self.teacher.selection.blocks
        length, heads = call.key.shape[2], call.query.shape[1]
        count = rule.blocks(length)
        block = torch.arange(count, device=call.key.device)
        parts = self.parts[layer, call.first_row] = []
        for part, behind in self.teacher.parts(call):
            stop = length - behind
            at = slice(stop - part.shape[2], stop)
            own = torch.arange(at.start, stop, device=call.key.device) // rule.block_size
            choosing = own + 1 > rule.top_k
            if not bool(choosing.any()):
                continue
            free = (block >= rule.init_blocks) & (block < (own - rule.local_blocks)[:, None])
            free = free & choosing[:, None]
            wanted = _mask(self.teacher.part_blocks(call, part, behind), count) & free
            mass = _block_mass(call, part, at, rule.block_size) * choosing[:, None]
            for scorer, blocks in chosen.items():
                mine = _mask(blocks[:, :, at], count)
                by_set = wanted.repeat_interleave(mine.shape[1] // wanted.shape[1], dim=1)
                by_head = mine.repeat_interleave(heads // mine.shape[1], 1)
                hit, there = float((mine & by_set).sum()), float(by_set.sum())
                rows = float(choosing.sum()) * heads * part.shape[0]
                parts.append((scorer, (hit, there, float((mass * by_head).sum()), rows)))

    def qualities(self) -> list[LayerQuality]:
        """What was found, in order of layers; nothing where no query had to choose."""
        whole: dict[tuple[int, str], list[Sums]] = {}
        for (layer, _), parts in self.parts.items():
            for scorer, sums in parts:
                whole.setdefault((layer, scorer), []).append(sums)
        found = []
        for (layer, scorer), every in whole.items():
            hit, wanted, mass, rows = (sum(values) for values in zip(*every, strict=True))
            found.append(LayerQuality(layer, scorer, hit / max(wanted, 1.0), mass / max(rows, 1.0)))
        return found


def measure_choices(
    model: SourceModel,
    ids: Tensor,
    teacher: Teacher,
    scorers: Mapping[str, KeyBlocks | None],
    *,
    forecasts: Mapping[str, Tensor] | None = None,
) -> list[LayerQuality]:
    """Measure scorers on rows of token ids [rows, length].

    scorers    name → how blocks are chosen; None for the most recent blocks
    forecasts  forecast tensors by full name, if not those that the model carries
    """
    meter, ahead = ChoiceMeter(teacher), Ahead()

    def watching(unit: Unit) -> AttentionHook:
        layer, name = unit.layout.index, unit.layout.name
        if forecasts is not None:
            own = {n: t for n, t in forecasts.items() if n.startswith(f"{name}.")}
            unit = replace(unit, extra=own)

        def hook(call: AttentionCall) -> Tensor:
            chosen = {}
            for name, rule in scorers.items():
                if rule is None:
                    chosen[name] = recent_blocks(teacher.selection, call.query, call.key)
                    continue
                for index in (layer, layer + 1):
                    ahead.look(rule, index, call, unit)
                chosen[name] = rule.choose(rule_call(call, ahead=ahead.take(rule, layer, call)))
            meter.add(layer, call, chosen)
            return call.plain(call.query, call.key, call.value)

        return hook

    for _ in sweep(model, ids, hook=watching, execution=Execution(1)):
        pass
    return meter.qualities()


def means(qualities: Sequence[LayerQuality]) -> dict[str, dict[str, float]]:
    """Scorer → mean recall and mass over layers."""
    found: dict[str, dict[str, float]] = {}
    for scorer in dict.fromkeys(q.scorer for q in qualities):
        mine = [q for q in qualities if q.scorer == scorer]
        found[scorer] = {
            "recall": sum(q.recall for q in mine) / len(mine),
            "mass": sum(q.mass for q in mine) / len(mine),
        }
    return found


def _mask(blocks: Tensor, count: int) -> Tensor:
    """Chosen blocks [..., K] as bool [..., count]."""
    mask = torch.zeros(*blocks.shape[:-1], count + 1, dtype=torch.bool, device=blocks.device)
    mask.scatter_(-1, torch.where(blocks < 0, count, blocks).long(), True)
    return mask[..., :count]


def _block_mass(call: AttentionCall, part: Tensor, at: slice, block_size: int) -> Tensor:
    """Share of each query's attention in each block, [rows, heads, queries, blocks]."""
    length, groups = call.key.shape[2], call.key.shape[1]
    group = part.shape[1] // groups
    queries = part.view(part.shape[0], groups, group, *part.shape[2:]).float()
    logits = queries @ call.key[:, :, None].float().transpose(-1, -2) * call.scaling
    place = torch.arange(length, device=call.key.device)
    logits = logits.masked_fill_(place > place[at, None], -torch.inf)
    shares = torch.nn.functional.pad(logits.softmax(-1), (0, -length % block_size))
    return shares.view(*shares.shape[:-1], -1, block_size).sum(-1).flatten(1, 2)

"""What the rules of a policy are worth on a text: the share of keys that queries see, and how much
of full attention's mass these hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.attention.evaluation import by_query_head, query_heads, rule_call
from compressor.attention.masked import in_pieces
from compressor.attention.policy import AttentionPolicy
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout
from compressor.runner.attention_call import AttentionCall
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Execution, Progress, sweep

Watch = Callable[[UnitLayout, AttentionCall], None]


@dataclass(frozen=True, slots=True)
class Quality:
    """By layer and query head, fp32 [layers, heads].

    seen  share of the keys at or before a query that it sees, over all queries
    mass  share of full attention that these keys get
    """

    seen: Tensor
    mass: Tensor


def watch_attention(
    model: SourceModel,
    ids: Tensor,
    watch: Watch,
    *,
    batch: int,
    progress: Progress = lambda name, done, total: None,
) -> None:
    """Run rows of tokens through the blocks with their own attention, one block in memory, and show
    every call to `watch`, each row once."""
    for step in sweep(model, ids, execution=Execution(batch, progress=progress)):
        shown, layout = 0, step.layout

        def hook(call: AttentionCall, layout: UnitLayout = layout) -> Tensor:
            nonlocal shown
            # Rows come again, fewer at a time, where memory did not do.
            if call.first_row >= shown:
                watch(layout, call)
                shown = call.first_row + call.query.shape[0]
            return call.plain(call.query, call.key, call.value)

        step.run(hook=hook)


def measurable(policy: AttentionPolicy) -> bool:
    """Whether masks of keys say what a policy is worth for the model that it was made from:
    positions stay, nothing is read ahead, and heads stay where they were."""
    ahead = (
        rule.ahead_tensor(number)
        for number, layer in enumerate(policy.layers)
        for rule in layer.rules
    )
    return policy.positions == "text" and not policy.reordered and not any(ahead)


def measure_policies(
    model: SourceModel,
    policies: Sequence[AttentionPolicy],
    ids: Tensor,
    *,
    progress: Progress = lambda name, done, total: None,
) -> list[Quality]:
    """Measure policies on rows of tokens, with the model's own attention before each layer. Every
    query counts as its rules would have it in decoding, or in a prompt where they are for prompts.

    Raises InputError for a policy that is not `measurable`.
    """
    if not all(measurable(policy) for policy in policies):
        raise InputError("what a policy sees that moves positions or reads ahead is no mask alone")
    shape = (len(policies), len(model.layout.blocks), policies[0].heads)
    seen, held = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)

    def watch(unit: UnitLayout, call: AttentionCall) -> None:
        for number, policy in enumerate(policies):
            counted, mass = _measured(policy, unit.index, call)
            seen[number, unit.index] += counted * call.query.shape[0] / len(ids)
            held[number, unit.index] += mass * call.query.shape[0] / len(ids)

    watch_attention(model, ids, watch, batch=1, progress=progress)
    return [Quality(a.float(), b.float()) for a, b in zip(seen, held, strict=True)]


def _measured(policy: AttentionPolicy, index: int, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Shares of keys and of attention that the heads of a layer see, on the CPU, fp64 [heads]."""
    heads, length = call.query.shape[1], call.key.shape[2]
    group = heads // call.key.shape[1]
    seen, mass = (torch.ones(heads, dtype=torch.float64) for _ in range(2))
    position = torch.arange(length, device=call.key.device)
    for part in policy.layers[index].groups(policy.kv_heads):
        rule = part.acting("decode") or part.acting("prefill")
        if rule is None or not rule.acts(length):
            continue
        own = rule_call(call, part.heads)
        see = rule.seen(own)
        keys = own.key.repeat_interleave(group, dim=1).transpose(-1, -2)

        def shares(query: Tensor, behind: int, see=see, keys=keys) -> Tensor:  # type: ignore[no-untyped-def]
            """Keys seen and mass of each query, [rows, heads, n, 2]."""
            at = slice(length - behind - query.shape[2], length - behind)
            scores = (query @ keys).float() * call.scaling
            past = position <= position[at, None]
            share = scores.masked_fill(~past, -torch.inf).softmax(-1)
            mask = by_query_head(see(at), query.shape[1]) & past
            return torch.stack([mask.sum(-1).expand(share.shape[:3]), (share * mask).sum(-1)], -1)

        found = in_pieces(shares, own.query, own.query.shape[1] * length).double().cpu()
        mine = query_heads(part.heads, group)
        seen[mine] = found[..., 0].sum(2).mean(0) / (length * (length + 1) / 2)
        mass[mine] = found[..., 1].mean((0, 2))
    return seen, mass

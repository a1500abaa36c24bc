"""Attention under a stored policy, as evaluations run it: a hook for each block.

The whole text is one pass under the rules' masks in which every query attends as a decoding step
would: it sees exactly the keys that the step would have been left. What a block says of the next
one's keys is carried from block to block, row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.attention.masked import both_masks, in_pieces
from compressor.attention.policy import AttentionPolicy, Group, check_policy, read_policy
from compressor.attention.rule import Rule, RuleCall, Seen, past_fit
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.unit import Unit
from compressor.runner.activations import Activations
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.source_model import Attending
from compressor.runner.sweep import StreamedModel


def as_stored(
    source: Source,
    attention: Attending | None = None,
    *,
    activations: Activations | None = None,
    longest: int = 0,
) -> StreamedModel:
    """A checkpoint for one run over it, attending as is said or else as the policy in its folder
    says; its hidden states are kept in `activations`. Raises InputError for a policy that is not
    valid, not for this model, or not for texts of `longest` tokens."""
    folder = source.checkpoint.folder
    policy = read_policy(folder) if attention is None and folder.is_dir() else None
    if policy is None:
        return StreamedModel(source, attention, activations)
    check_policy(policy, source.layout)
    check_length(policy, longest)
    return StreamedModel(source, policy_attention(policy))


def check_length(policy: AttentionPolicy, length: int) -> None:
    """Raises InputError where texts of `length` tokens are longer than what a rule was calibrated
    on."""
    for layer in policy.layers:
        for rule in layer.rules:
            if problem := past_fit(rule, length):
                raise problem


def policy_attention(policy: AttentionPolicy) -> Attending:
    """How blocks attend under a policy, in one run over a model."""
    ahead = Ahead()

    def of_block(unit: Unit) -> AttentionHook | None:
        index = unit.layout.index
        groups = policy.layers[index].groups(policy.kv_heads)
        told = [
            (number, rule)
            for number in (index, index + 1)
            if number < len(policy.layers)
            for rule in policy.layers[number].rules
            if (needs := rule.ahead_tensor(number)) is not None and needs[0] == index
        ]
        if not told and not policy.layers[index].rules:
            return None

        def hook(call: AttentionCall) -> Tensor:
            for number, rule in told:
                ahead.look(rule, number, call, unit)
            if policy.positions == "slot":
                return groups[0].rules[0].evaluate_by_slot(call)
            call = _with_keys(call, groups, unit, ahead)
            return under_masks(call, [(g.heads, _seen(g, call, unit, ahead)) for g in groups])

        return hook

    return of_block


@dataclass(slots=True)
class Ahead:
    """What blocks said of the keys of the blocks after them.

    Kept by block, rule and row, so that rows which are run again (with smaller batches, because
    memory did not do) find what was said before.
    """

    said: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)

    def look(self, rule: Rule, index: int, call: AttentionCall, unit: Unit) -> None:
        """Note what this block says for a rule of block `index`, where it has the tensor for it."""
        needs = rule.ahead_tensor(index)
        if needs is None or needs[0] != unit.layout.index:
            return
        weight = next((t for n, t in unit.extra.items() if n.endswith(f".{needs[1]}")), None)
        if weight is None:
            return
        if call.hidden is None:
            raise InputError(f"{rule.kind} needs the attention's input, which is not known here")
        weight = weight.to(call.key.device, call.key.dtype)
        kv_heads = call.key.shape[1]
        said = rule.look_ahead(call.hidden, weight, kv_heads=kv_heads, rotary=call.rotary)
        for row, values in enumerate(said.cpu()):
            self.said[index, rule.kind, call.first_row + row] = values

    def take(self, rule: Rule, index: int, call: AttentionCall) -> Tensor | None:
        """What was said for a rule of block `index` and these rows, [rows, kv_heads, length, …]."""
        for key in [key for key in self.said if key[0] < index]:
            del self.said[key]
        rows = range(call.first_row, call.first_row + call.query.shape[0])
        said = [self.said.get((index, rule.kind, row)) for row in rows]
        if any(values is None for values in said):
            return None
        return torch.stack([x for x in said if x is not None]).to(call.key.device, call.key.dtype)


def _with_keys(
    call: AttentionCall, groups: Sequence[Group], unit: Unit, ahead: Ahead
) -> AttentionCall:
    """The call with the keys that rules' heads have."""
    key = call.key
    for group in groups:
        for rule in group.rules:
            own = call.key[:, group.heads]
            said = _said(rule, call, unit, ahead)
            theirs = rule.own_keys(own, None if said is None else said[:, group.heads])
            if theirs is not own:
                key = key.index_copy(1, torch.tensor(group.heads, device=key.device), theirs)
    return replace(call, key=key)


def _said(rule: Rule, call: AttentionCall, unit: Unit, ahead: Ahead) -> Tensor | None:
    """What was said for a rule; InputError where the checkpoint lacks its tensor."""
    needs = rule.ahead_tensor(unit.layout.index)
    said = None if needs is None else ahead.take(rule, unit.layout.index, call)
    if needs is not None and said is None:
        raise InputError(
            f"{unit.layout.name} attends by {rule.kind}, whose tensor the checkpoint lacks",
            hint=f"the attention of block {needs[0]} should carry {needs[1]}",
        )
    return said


def _seen(group: Group, call: AttentionCall, unit: Unit, ahead: Ahead) -> Seen | None:
    """The mask of some heads; None where they see everything."""
    rule = group.acting("decode") or group.acting("prefill")
    if rule is None or not rule.acts(call.key.shape[2]):
        return None
    if problem := past_fit(rule, call.key.shape[2]):
        raise problem
    said = _said(rule, call, unit, ahead)
    return rule.seen(rule_call(call, group.heads, said))


def rule_call(
    call: AttentionCall, heads: Sequence[int] | None = None, ahead: Tensor | None = None
) -> RuleCall:
    """A block's call as a rule for some KV heads (None: all) sees it."""
    query, key = call.query, call.key
    if heads is not None and len(heads) < key.shape[1]:
        query = query[:, query_heads(heads, query.shape[1] // key.shape[1])]
        key = key[:, heads]
        ahead = None if ahead is None else ahead[:, heads]
    positions = torch.arange(key.shape[2], device=key.device)
    return RuleCall(query, key, positions, call.scaling, ahead)


def under_masks(call: AttentionCall, seen: Sequence[tuple[Sequence[int], Seen | None]]) -> Tensor:
    """The model's own attention where KV heads see what their masks say (all keys, if None), [rows,
    length, heads, head_dim]; some queries at a time."""
    if all(mask is None for _, mask in seen):
        return call.plain(call.query, call.key, call.value)
    heads, length = call.query.shape[1], call.key.shape[2]
    group = heads // call.key.shape[1]
    position = torch.arange(length, device=call.key.device)

    def attend(query: Tensor, behind: int) -> Tensor:
        part = slice(length - behind - query.shape[2], length - behind)
        causal = (position[part, None] >= position)[None, None]
        masks = [(of, causal if see is None else see(part)) for of, see in seen]
        if len(masks) == 1:
            mask = by_query_head(masks[0][1], heads)
        else:
            rows = max(mask.shape[0] for _, mask in masks)
            mask = torch.empty(
                (rows, heads, query.shape[2], length), dtype=torch.bool, device=query.device
            )
            for of, some in masks:
                mask[:, query_heads(of, group)] = by_query_head(some, len(of) * group)
        own = None if call.mask is None else call.mask[..., part, :]
        return call.plain(query, call.key, call.value, both_masks(own, mask)).transpose(1, 2)

    return in_pieces(attend, call.query, heads * length).transpose(1, 2)


def by_query_head(mask: Tensor, heads: int) -> Tensor:
    """A mask [rows, sets, n, keys] for each query head, unless it is one for all."""
    sets = mask.shape[1]
    return mask if sets == 1 else mask.repeat_interleave(heads // sets, dim=1)


def query_heads(kv_heads: Sequence[int], group: int) -> list[int]:
    """The query heads that share some KV heads."""
    return [head * group + member for head in kv_heads for member in range(group)]

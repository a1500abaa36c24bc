"""The attention policy: which rules each layer's KV heads attend by.

It is stored beside the weights as `attention_policy.json`, tensors that belong to it (gates,
scores) as `attention_policy.safetensors`. What a rule does stands in its file in `rules/`; a KV
head without a rule sees everything. Rules' masks are the definition: a runtime may skip whole
blocks, but masks by token.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors.torch import load_file, save
from torch import Tensor

from compressor.attention.rule import Phase, Rule, Value, make_rule
from compressor.checkpoint.reader import load_json
from compressor.errors import InputError
from compressor.ir.frozen import messages
from compressor.ir.layout import AttentionShape, ModelLayout

POLICY_NAME = "attention_policy.json"
TENSORS_NAME = "attention_policy.safetensors"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Group:
    """KV heads of a layer that attend by the same rules: one for each phase, or none."""

    heads: list[int]
    rules: tuple[Rule, ...]

    def acting(self, phase: Phase) -> Rule | None:
        """The rule of a phase; where none is for drafts, that of decoding."""
        for rule in self.rules:
            if phase in rule.phases:
                return rule
        return self.acting("decode") if phase == "draft" else None

    def kept(self, positions: Tensor, length: int) -> Tensor | None:
        """`Rule.kept` of all phases together."""
        stay = []
        for rule in {self.acting("prefill"), self.acting("decode")}:
            index = None if rule is None else rule.kept(positions, length)
            if index is None:
                return None
            stay.append(index)
        return stay[0] if len(stay) == 1 else torch.unique(torch.cat(stay))


class LayerPolicy(Value):
    """One block: its rules, those that name their heads first."""

    rules: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _one_rule_at_a_time(self) -> Self:
        ordered = tuple(sorted(self.rules, key=lambda rule: (rule.heads is None, rule.decides)))
        object.__setattr__(self, "rules", ordered)
        for number, rule in enumerate(ordered):
            for other in ordered[:number]:
                shared = rule.heads == other.heads or {*(rule.heads or ())} & {*(other.heads or ())}
                if rule.decides == other.decides or (shared and rule.phases & other.phases):
                    raise ValueError(f"{other.kind} and {rule.kind} are for the same heads")
        return self

    def groups(self, kv_heads: int) -> tuple[Group, ...]:
        """All KV heads, by the rules that they attend by."""
        by_rules: dict[tuple[Rule, ...], list[int]] = {}
        for head in range(kv_heads):
            named = tuple(rule for rule in self.rules if rule.heads and head in rule.heads)
            rest = tuple(rule for rule in self.rules if rule.heads is None)
            by_rules.setdefault(named or rest, []).append(head)
        return tuple(Group(heads, rules) for rules, heads in by_rules.items())

    def to_json(self) -> dict[str, Any]:
        """Plain data: an entry for each rule."""
        return {rule.decides: rule.to_json() for rule in self.rules}


class AttentionPolicy(Value):
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
            most = max((rule.heads[-1] for rule in layer.rules if rule.heads), default=0)
            if most >= self.kv_heads:
                raise ValueError(f"layer {number} has {self.kv_heads} KV heads, no {most}")
            for rule in layer.rules:
                if (problem := rule.misfit(self.heads, self.kv_heads)) is not None:
                    raise ValueError(f"layer {number}: {problem}")
                if self.positions == "text" and not rule.by_text:
                    raise ValueError(f"layer {number}: {rule.kind} needs slot positions")
        if self.positions == "slot":
            kinds = {group.rules for layer in self.layers for group in layer.groups(self.kv_heads)}
            if len(kinds) > 1 or not all(len(k) == 1 and k[0].by_slot for k in kinds):
                raise ValueError("slot positions need every head streaming, all with one window")
        return self

    def cached_tokens(self, length: int) -> int:
        """Key/value pairs kept after a text of `length` tokens, over all layers and KV heads: the
        next query's own token makes a window full."""
        positions = torch.arange(length)
        kept: dict[tuple[Rule, ...], int] = {}
        total = 0
        for layer in self.layers:
            for group in layer.groups(self.kv_heads):
                if group.rules not in kept:
                    index = group.kept(positions, length)
                    kept[group.rules] = length if index is None else len(index)
                total += len(group.heads) * kept[group.rules]
        return total

    def whole_heads(self) -> list[list[bool]]:
        """Of which KV heads every key stays, by layer."""
        rows = []
        for layer in self.layers:
            row = [True] * self.kv_heads
            for group in layer.groups(self.kv_heads):
                for head in group.heads:
                    row[head] = group.kept(torch.arange(1), 1) is None
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is None is left out."""
        data = self.model_dump(mode="json", exclude_none=True, exclude={"layers"})
        made_by = data.pop("made_by")
        return {**data, "layers": [layer.to_json() for layer in self.layers], "made_by": made_by}


def combine(
    first: AttentionPolicy | None, second: AttentionPolicy, *, certain: bool = True
) -> AttentionPolicy:
    """One policy of two that different passes made. Raises InputError where they overlap, or where
    one of them leaves no head to the other.

    certain  false: the heads are the most that may come of what is still to be learned
    """
    if first is None:
        return second
    shape = (first.heads, first.kv_heads, len(first.layers))
    if shape != (second.heads, second.kv_heads, len(second.layers)):
        raise InputError("two attention policies of one model disagree about its heads")
    if second.reordered and any(layer.rules for layer in first.layers):
        raise InputError(
            "a pass that sorts heads in the weights would change which heads an earlier policy "
            "means",
            hint="reorder: false, or learn from a checkpoint without a policy",
        )
    layers = []
    hint = "keep one of: " + ", ".join([*first.made_by, *second.made_by])
    for number, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        for part in [rule.decides for rule in a.rules]:
            if part in [rule.decides for rule in b.rules]:
                raise InputError(f"two passes both decide `{part}` of layer {number}", hint=hint)
        try:
            merged = LayerPolicy(rules=(*a.rules, *b.rules))
        except ValidationError as error:
            raise InputError(f"layer {number}: {messages(error)[0]}", hint=hint) from error
        layers.append(merged)
    positions = first.positions if first.positions == "slot" else second.positions
    try:
        both = AttentionPolicy(
            heads=first.heads,
            kv_heads=first.kv_heads,
            positions=positions,
            reordered=first.reordered or second.reordered,
            layers=tuple(layers),
            made_by={**first.made_by, **second.made_by},
        )
    except ValidationError as error:
        raise InputError(messages(error)[0], hint=hint) from error
    if certain or positions == "slot":
        _all_act(both, hint)
    return both


def _all_act(policy: AttentionPolicy, hint: str) -> None:
    """Raises InputError where heads that others name leave none to a rule for the rest."""
    acting = {
        rule.kind
        for layer in policy.layers
        for group in layer.groups(policy.kv_heads)
        for rule in group.rules
    }
    for layer in policy.layers:
        for rule in layer.rules:
            if rule.kind not in acting:
                raise InputError(
                    f"{rule.kind} would decide nothing: every KV head attends by "
                    f"{' and '.join(sorted(acting))}",
                    hint=hint,
                )


def make_policy(data: Mapping[str, Any], *, where: str = POLICY_NAME) -> AttentionPolicy:
    """A policy from plain data. Raises InputError with everything that is wrong."""
    version = data.get("version", VERSION)
    if version != VERSION:
        raise InputError(
            f"{where} has version {version!r}; this program knows {VERSION}",
            hint="a newer release may read it",
        )
    given = data.get("layers")
    layers, problems = [], []
    for number, entry in enumerate(given if isinstance(given, list) else ()):
        layer, wrong = _read_layer(entry)
        layers.append(layer)
        problems += [f"layers.{number}{problem}" for problem in wrong]
    values = {**data, "layers": layers if isinstance(given, list) else given}
    try:
        policy = AttentionPolicy.model_validate(values)
    except ValidationError as error:
        problems += messages(error)
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")
    return policy


def _read_layer(entry: Any) -> tuple[LayerPolicy, list[str]]:
    """A layer's rules, and what is wrong with them."""
    if not isinstance(entry, Mapping):
        return LayerPolicy(), [" is not a mapping"]
    rules, problems = [], []
    for part, values in entry.items():
        if values is None:
            continue
        try:
            if not isinstance(values, Mapping):
                raise InputError("not a mapping")
            rules.append(make_rule(part, values))
        except InputError as error:
            problems.append(f".{part}: {error.message}")
    try:
        return LayerPolicy(rules=tuple(rules)), problems
    except ValidationError as error:
        return LayerPolicy(), [*problems, *(f": {message}" for message in messages(error))]


def read_policy(folder: Path) -> AttentionPolicy | None:
    """The policy of a checkpoint folder, or None. Raises InputError for one that is not valid."""
    path = folder / POLICY_NAME
    if not path.is_file():
        return None
    return make_policy(load_json(path, what="policy"), where=str(path))


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
        for rule in policy.layers[unit.index].rules:
            rule.check(unit)
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
    rules = [rule for layer in policy.layers for rule in layer.rules]
    lines = []
    for kind in sorted({type(rule) for rule in rules}, key=lambda kind: _first(kind, rules)):
        lines += kind.describe([rule for rule in rules if type(rule) is kind], policy)
    if policy.reordered:
        lines.append("KV heads are reordered in the weights, full ones first")
    return lines or ["every head is full"]


def _first(kind: type[Rule], rules: list[Rule]) -> tuple[bool, int]:
    """Rules that name their heads come before those that do not, else as layers do."""
    at = next(number for number, rule in enumerate(rules) if type(rule) is kind)
    return rules[at].heads is None, at


def attention_shape(layout: ModelLayout) -> AttentionShape:
    """The heads that all blocks have. Raises InputError where they differ."""
    shapes = {unit.attention for unit in layout.units if unit.kind == "block"}
    (shape,) = shapes if len(shapes) == 1 else (None,)
    if shapes == {None}:
        raise InputError("blocks of this model have no attention by head, as a policy has it")
    if shape is None:
        raise InputError("blocks of this model differ in their heads: one policy cannot hold them")
    return shape


def rule_policy(
    layout: ModelLayout,
    rule: Rule,
    *,
    made_by: Mapping[str, Any],
    dense: Collection[int] = (),
    positions: Literal["text", "slot"] = "text",
) -> AttentionPolicy:
    """Every block attends by one rule, but for the `dense` ones. Raises InputError where a policy
    cannot describe the model."""
    blocks = sum(unit.kind == "block" for unit in layout.units)
    layers = [LayerPolicy(rules=() if index in dense else (rule,)) for index in range(blocks)]
    return policy_of(layout, layers, made_by=dict(made_by), positions=positions)


def policy_of(
    layout: ModelLayout, layers: Iterable[LayerPolicy], **options: Any
) -> AttentionPolicy:
    """The policy by which a model's blocks attend as `layers` say; `options` are its other fields.
    Raises InputError where a policy cannot describe the model."""
    shape = attention_shape(layout)
    policy = AttentionPolicy(
        heads=shape.heads, kv_heads=shape.kv_heads, layers=tuple(layers), **options
    )
    check_policy(policy, layout)
    return policy

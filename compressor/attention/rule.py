"""What an attention rule is: which keys the queries of some KV heads see, and what it needs for it.

A rule is a file of `rules/`, called as the rule is, with its class. The mask is the
definition: evaluations and running models attend under it, unless the rule brings a faster way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from compressor.attention.masked import OwnAttention, in_pieces, softmax_attention
from compressor.attention.rope import Rotary
from compressor.errors import InputError
from compressor.ir.frozen import class_of, messages
from compressor.ir.layout import UnitLayout

if TYPE_CHECKING:
    from compressor.attention.policy import AttentionPolicy
    from compressor.runner.attention_call import AttentionCall

Phase = Literal["prefill", "decode", "draft"]
"""Several tokens at once, one token, or tokens that the model only proposes."""

Seen = Callable[[slice], Tensor]
"""Which keys a range of queries sees: bool [rows or 1, heads or kv_heads or 1, n, Tk]."""


class Value(BaseModel):
    """A frozen value that is stored in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Held:
    """Keys and values [rows, kv_heads, n, head_dim] of some heads, with their positions in the
    text, int [n] on the CPU; None: 0, 1, 2 …

    memory  what rules keep from step to step, tensors [rows, …] or lists of rows by name; None
            without a cache
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    memory: dict[str, Any] | None = None

    def on_device(self) -> Tensor:
        """The positions, where the keys are."""
        if self.positions is None:
            return torch.arange(self.keys.shape[2], device=self.keys.device)
        return self.positions.to(self.keys.device)


@dataclass(frozen=True, slots=True)
class RuleCall:
    """One call of a layer's attention as a rule sees it: its own heads, after the rotary embedding.

    query      [rows, heads, Tq, head_dim], of the last Tq tokens
    key        [rows, kv_heads, Tk, head_dim]
    positions  of the keys in the text, int [Tk], ascending; the last Tq are the queries'
    scaling    factor of the products of query and key
    ahead      what `Rule.look_ahead` gave for these heads, or None
    memory     what the rule kept in earlier calls of the same text, to be changed in place: tensors
               [rows, …] or lists of rows; None where a whole text is one call
    """

    query: Tensor
    key: Tensor
    positions: Tensor
    scaling: float
    ahead: Tensor | None = None
    memory: dict[str, Any] | None = None

    @property
    def own(self) -> Tensor:
        """Positions of the queries, int [Tq]."""
        return self.positions[self.key.shape[2] - self.query.shape[2] :]


class Rule(Value):
    """Which keys a query sees in some KV heads of a layer.

    heads  KV heads that it is for, ascending; None: those that no other rule of the layer names
    """

    part: ClassVar[str] = ""
    """The key of a layer's entry in the file; rules of one part exclude each other. "": `kind`."""
    phases: ClassVar[frozenset[Phase]] = frozenset(("prefill", "decode"))
    """When it acts; at other times its heads see every key that is kept."""
    by_slot: ClassVar[bool] = False
    """Whether positions may be cache slots: `evaluate_by_slot` and `attend_by_slot`."""
    by_text: ClassVar[bool] = True
    """Whether they may be places in the text: `seen`."""
    title: ClassVar[str] = ""
    """What plots call it. "": `kind`."""

    heads: tuple[int, ...] | None = Field(None, min_length=1, strict=False)

    @model_validator(mode="after")
    def _heads_ascend(self) -> Self:
        if self.heads is not None:
            heads = list(self.heads)
            if heads != sorted(set(heads)) or heads[0] < 0:
                raise ValueError(f"heads {heads} are not ascending numbers from 0")
        return self

    @property
    def kind(self) -> str:
        """The name of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def decides(self) -> str:
        """`part`, or `kind` where there is none."""
        return self.part or self.kind

    # What the attention is.

    def seen(self, call: RuleCall) -> Seen:
        """The mask: which keys the queries of a call see, none of them after the query itself."""
        raise NotImplementedError

    def watch(self, call: RuleCall) -> None:
        """Learn for `call.memory` from tokens that are being verified, whatever attends then."""

    def acts(self, length: int) -> bool:
        """Whether it does anything in a text of `length` tokens."""
        return True

    def kept(self, positions: Tensor, length: int) -> Tensor | None:
        """State of a cache: which of the keys at `positions` (int [n] on the CPU) queries after the
        first `length` tokens may still see, as indices in order; None: all of them."""
        return None

    def ahead_tensor(self, index: int) -> tuple[int, str] | None:
        """State across blocks: the block, and the last part of the name of the tensor in its
        attention, that `look_ahead` needs for this rule in block `index`."""
        return None

    def look_ahead(
        self, hidden: Tensor, weight: Tensor, *, kv_heads: int, rotary: Rotary | None
    ) -> Tensor:
        """What the input of an attention [rows, length, hidden] says of the keys that the rule is
        to see, [rows, kv_heads, length, …]; weight is `ahead_tensor`'s."""
        raise NotImplementedError

    def own_keys(self, key: Tensor, ahead: Tensor | None) -> Tensor:
        """What its heads have for keys in every phase, from the model's own [rows, kv_heads, Tk,
        head_dim] and what `look_ahead` gave."""
        return key

    # Ways of computing it.

    def attend(self, call: RuleCall, value: Tensor, own: OwnAttention) -> Tensor:
        """Attention in a running model, [rows, heads, Tq, head_dim]: under the mask."""
        seen, q_len, heads = self.seen(call), call.query.shape[2], call.query.shape[1]

        def part(query: Tensor, behind: int) -> Tensor:
            at = slice(q_len - behind - query.shape[2], q_len - behind)
            mask = seen(at)
            if mask.shape[1] > 1:
                mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
            if own.window is not None:
                mask = mask & (call.own[at, None] - call.positions < own.window)
            return softmax_attention(query, call.key, value, mask, own)

        return in_pieces(part, call.query, heads * call.key.shape[2])

    def beside_full(
        self, query: Tensor, new: Held, full: Held, mine: Held, heads: tuple[list[int], list[int]],
        own: OwnAttention,
    ) -> Tensor | None:  # fmt: skip
        """Attention of a whole layer in one kernel, where its other heads see all keys; None where
        no kernel takes that.

        new    the call's own keys and values, of all heads
        full, mine  what is held for heads without a rule, and for the rule's own
        heads  the KV heads of the two
        """
        return None

    def evaluate_by_slot(self, call: AttentionCall) -> Tensor:
        """`seen` for a whole text whose positions are cache slots, [rows, length, heads, head_dim];
        all heads are the rule's."""
        raise NotImplementedError

    def attend_by_slot(
        self, call: RuleCall, value: Tensor, own: OwnAttention, tables: Callable[[int], Rotary]
    ) -> Tensor:
        """`attend` where positions are cache slots and nothing is rotated yet; tables(n) are the
        rotary embedding's for n slots."""
        raise NotImplementedError

    # What is checked, said and written.

    @property
    def fitted(self) -> int | None:
        """Keys of the longest text that its numbers were calibrated on; None: they are for any."""
        return None

    def misfit(self, heads: int, kv_heads: int) -> str | None:
        """What is wrong with it in a layer of so many heads, or None."""
        return None

    def check(self, unit: UnitLayout) -> None:
        """Raises InputError where it is not for this block."""

    def config(self) -> dict[str, Any]:
        """Entries of config.json from which other runtimes read the same."""
        return {}

    @classmethod
    def describe(cls, rules: Sequence[Self], policy: AttentionPolicy) -> list[str]:
        """Lines for people on all rules of this kind in a policy of so many layers."""
        return [f"{share_of(rules, policy)} attend by {rules[0].kind}"]

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is None is left out."""
        return self.model_dump(mode="json", exclude_none=True)


def share_of(rules: Sequence[Rule], policy: AttentionPolicy) -> str:
    """How many of a policy's layers have one of these rules, for people."""
    return f"{len(rules)} of {len(policy.layers)} layers"


def past_fit(rule: Rule, length: int) -> InputError | None:
    """What is said of a text of `length` keys, more than a rule was calibrated on."""
    if rule.fitted is None or length <= rule.fitted:
        return None
    return InputError(
        f"{rule.kind}: a text of {length} tokens is longer than the {rule.fitted} that its "
        "thresholds were calibrated on",
        hint=f"calibration: {{length: {length}}} in the recipe, or shorter texts",
    )


def rule_names() -> list[str]:
    """Names of all rules, from the package's folder itself."""
    folders = importlib.import_module("compressor.attention.rules").__path__
    return sorted({path.stem for f in folders for path in Path(f).glob("*.py")} - {"__init__"})


def rule_module(name: str) -> Any:
    """The file of the rule called `name`; InputError names the known ones."""
    if name not in rule_names():
        known = ", ".join(rule_names())
        raise InputError(f"unknown attention rule {name!r}", hint=f"one of: {known}")
    return importlib.import_module(f"compressor.attention.rules.{name}")


def rule_class(name: str) -> type[Rule]:
    """The class of the rule called `name`."""
    return class_of(rule_module(name), Rule)


def make_rule(part: str, data: Mapping[str, Any]) -> Rule:
    """A rule from an entry of a layer. A part that several rules may decide names its rule as
    `scorer`. Raises InputError with everything that is wrong."""
    values = dict(data)
    name = values.pop("scorer", part)
    rule = rule_class(str(name))
    if (rule.part or name) != part:
        raise InputError(f"the rule {name} stands under {rule.part or name!r}")
    try:
        return rule.model_validate(values)
    except ValidationError as error:
        raise InputError("; ".join(messages(error))) from error

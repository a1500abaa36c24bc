"""What a map reads in config.json: sizes, and what they make of each other.

Configs come from strangers, so each size is checked before anything is built from it.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compressor.arch.schema import MapFile, Section
from compressor.errors import InputError

ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
"""What a measure may hold beside names and numbers."""


CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k")
"""Keys under which families have how many experts see a token."""


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """A config as a map reads it.

    known  sizes by name: those that the map names, and those that follow from them
    """

    arch: MapFile
    config: Mapping[str, Any]
    known: Mapping[str, int]

    def value(self, key: str, index: int | None = None) -> Any:
        """What config.json says under a key; of a list with an item for each block, that of one."""
        if index is not None and key in self._of_block(index):
            return self._of_block(index)[key]
        value = self.arch.value(self.config, key)
        if isinstance(value, list) and index is not None:
            return value[index] if index < len(value) else None
        return value

    @property
    def chosen_experts(self) -> int:
        """How many experts a token is sent to; 0 where config.json does not say."""
        said = (self.arch.value(self.config, key) for key in CHOSEN)
        return next((count for count in said if type(count) is int and count > 0), 0)

    def holds(self, when: Mapping[str, Any], index: int | None = None) -> bool:
        """Whether config.json says all of that (of a block)."""
        return all(self.value(key, index) == value for key, value in when.items())

    def is_last(self, key: str | None, index: int) -> bool:
        """Whether a block is one of the last, of which a key says how many there are. Raises
        InputError where that is no number of blocks behind others."""
        count, layers = 0 if key is None else self.value(key) or 0, self.size("layers")
        if type(count) is not int or not 0 <= count < layers:
            raise InputError(
                f"config.json: {key} is {count!r}, not a number of blocks that come after others, "
                f"of {layers}"
            )
        return key is None or layers - count <= index

    def size(self, measure: str) -> int:
        """A size by name, or what a measure makes of several. Raises InputError."""
        return self._computed(ast.parse(measure, mode="eval").body)

    def _computed(self, node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return ARITHMETIC[type(node.op)](self._computed(node.left), self._computed(node.right))
        return self._named(node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)

    def _of_block(self, index: int) -> Mapping[str, Any]:
        """What config.json says of one block alone."""
        blocks = self.arch.value(self.config, "per_layer_config")
        own = blocks.get(str(index)) if isinstance(blocks, dict) else None
        return own if isinstance(own, dict) else {}

    def of_block(self, section: Section, index: int) -> ConfigReader:
        """The same config for a block that has this section, whose sizes may be others."""
        own = {}
        for name, key in section.sizes.items():
            value = self.size(key) if key in self.known or not key.isidentifier() else None
            value = self.value(key, index) if value is None else value
            if value is not None:
                own[name] = _count(key, value)
        # What config.json says of one block counts before what it says of blocks of its kind.
        own |= {
            name: _count(key, self._of_block(index)[key])
            for name, key in self.arch.sizes.items()
            if isinstance(key, str) and key in self._of_block(index)
        }
        return replace(self, known=_with_heads({**self.known, **own})) if own else self

    def _named(self, name: str) -> int:
        if name not in self.known:
            keys = self.arch.sizes.get("ff" if name == "gate_up" else name, name)
            keys = (keys,) if isinstance(keys, str) else keys
            for key in keys:
                if (said := self.value(key)) is not None:
                    raise InputError(f"config.json: {key} is {said!r}, and the files have some")
            raise InputError(f"config.json lacks {' or '.join(keys)}")
        return self.known[name]


NUMBERS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
"""What arithmetic for a twin's config may hold beside keys and numbers."""


MAX_TEXT = 200
"""Characters of such arithmetic."""


def computed(text: str, config: Mapping[str, Any]) -> float:
    """A number from keys of config.json. Raises InputError for what is none there, ValueError for
    text that is no arithmetic."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in NUMBERS:
            return NUMBERS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if not isinstance(node, ast.Name):
            raise ValueError(f"{text!r} is no arithmetic of keys")
        found = config.get(node.id)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise InputError(f"config.json: {node.id} is {found!r}, not a number")
        return float(found)

    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise ValueError(f"{str(text)[:40]!r} is no arithmetic of keys")
    try:
        made = value(ast.parse(text, mode="eval").body)
    except (ArithmeticError, SyntaxError) as error:
        raise InputError(f"config.json: {text} has no value: {error}") from error
    if isinstance(made, complex) or not math.isfinite(made):
        raise InputError(f"config.json: {text} is {made}")
    return made


NONE = ("experts", "layer_ff", "shared", "shared_ff")
"""Sizes that are 0 where a model has no such thing."""


def read_sizes(arch: MapFile, config: Mapping[str, Any]) -> ConfigReader:
    """The sizes of a model. Raises InputError for one that is no count, or is needed and lacks."""
    known: dict[str, int] = {}
    reader = ConfigReader(arch, config, known)
    measures: dict[str, str] = {}
    for name, keys in arch.sizes.items():
        for key in (keys,) if isinstance(keys, str) else keys:
            if not key.isidentifier():
                measures.setdefault(name, key)
                continue
            value = reader.value(key)
            # A size that follows from others may be "auto".
            if value in (None, "auto") or name in known or (name in NONE and value == 0):
                continue
            # What each block is tells how many there are.
            per_block = name == "layers" and isinstance(value, (list, str))
            known[name] = _count(key, len(value) if per_block else value)
    for name, measure in measures.items():
        if name not in known:
            known[name] = reader.size(measure)
    heads, hidden = reader.size("heads"), reader.size("hidden")
    known.setdefault("kv_heads", heads)
    known.setdefault("head_dim", max(hidden // heads, 1))
    reader.size("layers")
    return replace(reader, known=_with_heads(known))


def _count(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {key} is {value!r}, not a count")
    return value


def _with_heads(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes with those that follow from others."""
    heads, kv_heads, head_dim = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
    if heads % kv_heads:
        raise InputError(f"config.json: {kv_heads} key heads do not divide {heads} query heads")
    q, kv = heads * head_dim, kv_heads * head_dim
    found = {**sizes, "q": q, "kv": kv, "qkv": q + 2 * kv, "group": heads // kv_heads}
    return found | ({"gate_up": 2 * sizes["ff"]} if "ff" in sizes else {})


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """How many ids config.json says that there are."""
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else None

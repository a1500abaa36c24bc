"""What units give to later blocks beside hidden states, as tensors [rows, ...] by name:

ARGUMENT             an output of the block before
ARGUMENT/BLOCK       what the model makes of a row's tokens for each block
ARGUMENT/KEY/NUMBER  tensors of a mapping, which some blocks fill and later ones read
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.arch.runtime_names import Handing


def argument_of(name: str) -> str:
    """The argument of a layer that a name belongs to."""
    return name.partition("/")[0]


def of_tokens(handing: Handing, arguments: Mapping[int, Mapping[str, Any]]) -> dict[str, Tensor]:
    """What blocks are given of their rows' tokens: block → argument → value."""
    return {
        f"{name}/{index}": given[name]
        for name, kind in handing.items()
        if kind == "tokens"
        for index, given in arguments.items()
    }


def taken(handing: Handing, index: int, rows: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of block `index`, out of what its rows have by name."""
    found: dict[str, Any] = {}
    for argument, kind in handing.items():
        name = f"{argument}/{index}" if kind == "tokens" else argument
        if kind == "filled":
            found[argument] = _mapping(argument, rows)
        elif name in rows:
            found[argument] = rows[name]
    return found


def _mapping(argument: str, rows: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    several: dict[str, list[Any]] = {}
    for name in sorted(rows):  # of a few tensors each, so that their numbers sort as text
        if argument_of(name) == argument:
            several.setdefault(name.split("/")[1], []).append(rows[name])
    return {key: tuple(values) for key, values in several.items()}


def made(
    handing: Handing, given: Mapping[str, Any], outputs: Sequence[Any], before: Mapping[str, Any]
) -> dict[str, Any]:
    """What a block adds: its outputs, and what it filled that was not there `before`."""
    found = {name: outputs[kind] for name, kind in handing.items() if isinstance(kind, int)}
    for argument, kind in handing.items():
        for key, values in given[argument].items() if kind == "filled" else ():
            for number, value in enumerate(values):
                found[f"{argument}/{key}/{number}"] = value
    return {name: value for name, value in found.items() if "/" not in name or name not in before}


def still_handed(handing: Handing, index: int, rows: Mapping[str, Any]) -> dict[str, Any]:
    """What goes on past block `index`: not what it alone was given."""
    taken_here = {argument for argument, kind in handing.items() if isinstance(kind, int)}
    taken_here |= {f"{argument}/{index}" for argument in handing}
    return {name: value for name, value in rows.items() if name not in taken_here}


def collect(
    parts: dict[str, list[Tensor]],
    some: Mapping[str, Tensor],
    device: torch.device,
    *,
    known: Collection[str] = (),
) -> None:
    """Add what came for some rows, but for what all rows are `known` to have."""
    for name, tensor in some.items():
        if name not in known:
            parts.setdefault(name, []).append(tensor.to(device))


def joined(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """What came for some rows at a time, for all; the parts are given up one after the other."""
    return {name: torch.cat(parts.pop(name)) for name in list(parts)}

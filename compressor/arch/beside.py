"""Linears beside the text model: in towers of images or sounds, in what projects those, in layers
for several tokens at once. Nothing here runs them, so that only methods without data round them,
where a recipe names their role."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from compressor.arch.free import EMBEDDING, in_parts, linear_of
from compressor.ir.layout import Linear, UnitLayout, bias_name, is_weight

KINDS = {
    "mtp": r"(^|\.)mtp|^model\.layers\.",
    "projector": r"projector|merger|(^|\.)embed_(vision|audio)\.",
    "audio": r"(^|\.)audio",
    "tower": "",
}
"""Kind of a part → how names in it are told; the first that fits counts."""


def kind_of(name: str) -> str:
    """The kind of the part that a tensor beside the text model belongs to."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to: its path up to a number, or up to two names."""
    path = name.split(".")
    until = next((i for i, part in enumerate(path) if part.isdigit()), len(path) - 2)
    return ".".join(path[: max(1, min(until, 2))])


def units_beside(
    carried: Iterable[str], headers: Mapping[str, Sequence[int] | None]
) -> Iterator[UnitLayout]:
    """Units of bounded size for tensors that are carried over, one part of the model after another.
    One is called as its part is; more of a part are numbered."""
    by_part = sorted(carried, key=lambda name: (part_of(name), name))
    for part, names in groupby(by_part, part_of):
        pieces = in_parts(list(names), headers)
        for number, piece in enumerate(pieces):
            yield UnitLayout(
                name=part if len(pieces) == 1 else f"{part}[{number}]",
                kind="beside",
                index=number,
                tensors=(),
                linears=_linears_beside(piece, headers),
                carried=tuple(piece),
            )


def _linears_beside(
    carried: Iterable[str], headers: Mapping[str, Sequence[int] | None]
) -> tuple[Linear, ...]:
    """The linears among tensors that are carried over; embeddings, convolutions, routers and
    matrices of few rows are none, nor is what torch's MultiheadAttention multiplies with itself."""
    found = []
    for name in carried:
        path, shape = name.rpartition(".")[0], headers[name]
        if f"{path.rpartition('.')[0]}.in_proj_weight" in headers:
            continue
        embeds = EMBEDDING.search(path.rpartition(".")[2])
        if embeds or not is_weight(name) or shape is None or len(shape) != 2:
            continue
        linear = linear_of(path, (shape[0], shape[1]), bias_name(path) in headers)
        if linear is not None and linear.role != "router":
            role = f"{kind_of(name)}.linear"
            rows = (replace(linear.rows[0], role=role),)
            found.append(replace(linear, role=role, rows=rows))
    return tuple(found)

"""Checkpoints without a map: linears by the shape and the name of their weights, in units of a
bounded size that follow the names. Nothing is known of how the model computes, so nothing of it
runs.

What is no plain matrix stays as it is: norms, embeddings, convolutions, stacked experts. So do
routers, indexers and gates of few rows, which are linears that no method rounds, and what embeds
time, text or patches and makes the output of a diffusion transformer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from compressor.arch.schema import MapFile
from compressor.errors import InputError
from compressor.ir.layout import (
    Linear,
    ModelLayout,
    Rows,
    Sizes,
    TensorRef,
    UnitLayout,
    bias_name,
    is_weight,
    weight_name,
)

UNIT = 2**29
"""Elements after which a unit ends, if the module that holds them does."""

FEW = 16
"""Rows of a matrix that gates others."""

EMBEDDING = re.compile(r"embed|^(wte|wpe)$|position")
EMBEDDER = re.compile(r"(embed[^.]*|(^|\.)norm_out)\.")
"""A linear inside of what embeds, or scales what leaves a diffusion transformer."""

ROUTER = re.compile(
    r"(^|\.)(gate|wg|shared_expert_gate|in_proj_(a|b|ba))$|(^|\.)(indexer|[^.]*router[^.]*)(\.|$)"
)
CONVOLUTION = re.compile(r"conv|norm")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$|^(proj_out|final_layer\.linear)$")
FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w1", "w3"), "w13"),
}
"""Last name of a linear → that of the module which runtimes make of it and its siblings."""

Headers = Mapping[str, Sequence[int] | None]


class FreeMap(MapFile):
    """What stands for a map where there is none."""

    free: ClassVar[bool] = True

    def layout(self, config: Mapping[str, Any], headers: Headers) -> ModelLayout:
        """The units of a checkpoint with these tensors (name → shape)."""
        return lay_free(self.model_type, config=config, headers=headers)

    def has_module(self, path: str) -> bool:
        """Every name is taken as it is."""
        return True


def free_map(model_type: str) -> FreeMap:
    """The map of no architecture."""
    data = {
        "model_type": model_type,
        "sizes": dict.fromkeys(("layers", "hidden", "vocab", "heads"), "none"),
        "embedding": {"token": ""},
        "layer": "",
        "attention": ({},),
        "mlp": ({},),
        "head": {"norm": {"name": "", "role": "norm.final", "size": "hidden"}, "linear": ""},
        "runtime": {"layers": "", "embedding": "", "norm": "", "lm_head": ""},
    }
    return FreeMap.model_validate(data)


def lay_free(model_type: str, *, config: Mapping[str, Any], headers: Headers) -> ModelLayout:
    """Units over a checkpoint's names alone. Raises InputError where no linear is found."""
    vocabulary = config.get("vocab_size")
    names = sorted(headers, key=_natural)
    linears: dict[str, Linear] = {}
    first: list[str] = []
    for name in names:
        path, shape = name.rpartition(".")[0], headers[name]
        if EMBEDDING.search(path.rpartition(".")[2]):
            first.append(name)
        elif is_weight(name) and shape is not None and len(shape) == 2:
            found = linear_of(path, (shape[0], shape[1]), bias_name(path) in headers)
            if found is not None:
                linears[name] = found
    if not linears:
        raise InputError(
            "no tensor of this checkpoint looks like the weight of a linear",
            hint="without a map, those are two-dimensional and called NAME.weight",
        )
    head = [name for name, linear in linears.items() if linear.role == "lm_head"][-1:]
    last = [n for n in names if n in head or (head and n == bias_name(linears[head[0]].name))]
    ends = {*first, *last}
    parts = in_parts([n for n in names if n not in ends], headers)
    units = [
        _unit("embedding", 0, first, {}),
        *(_unit(f"part.{i}", i, part, linears) for i, part in enumerate(parts)),
        _unit("head", 0, last, linears),
    ]
    tied = config.get("tie_word_embeddings") is True and not head
    return ModelLayout(
        model_type=model_type,
        units=tuple(units),
        sizes=Sizes(hidden=1, vocabulary=vocabulary if isinstance(vocabulary, int) else 1),
        tied=next((n for n in first if is_weight(n)), None) if tied else None,
    )


def linear_of(path: str, shape: tuple[int, int], bias: bool) -> Linear | None:
    """The linear of a matrix, or None for what is none."""
    parent, _, leaf = path.rpartition(".")
    if CONVOLUTION.search(leaf) or EMBEDDER.search(path):
        return None
    fused = f"{parent}.{FUSED[leaf]}" if leaf in FUSED else ""
    role = "linear"
    if HEAD.search(path):
        role = "lm_head"
    elif ROUTER.search(path) or shape[0] < FEW:
        role = "router"
    return Linear(
        path,
        role,
        *shape,
        site=fused or path,
        bias=bias,
        rows=(Rows(role, 0, shape[0]),),
        fused=fused,
        tensor=TensorRef(weight_name(path)),
        bias_tensor=TensorRef(bias_name(path)) if bias else None,
    )


def in_parts(names: Sequence[str], headers: Headers) -> list[list[str]]:
    """Names in runs of about `UNIT` elements; what runtimes fuse stays together."""
    found: list[list[str]] = []
    size, module = 0, None
    for name in names:
        parent = name.rpartition(".")[0].rpartition(".")[0]
        if not found or (size >= UNIT and parent != module):
            found.append([])
            size = 0
        found[-1].append(name)
        size, module = size + math.prod(headers[name] or ()), parent
    return found


def _unit(name: str, index: int, names: Sequence[str], linears: Mapping[str, Linear]) -> UnitLayout:
    own = [linears[n] for n in names if n in linears]
    known = {n for linear in own for n in (linear.weight_name, linear.bias_name)}
    kinds: dict[str, Literal["embedding", "head"]] = {"embedding": "embedding", "head": "head"}
    return UnitLayout(
        name=name,
        kind=kinds.get(name, "block"),
        index=index,
        tensors=tuple(names),
        linears=tuple(own),
        others=tuple(n for n in names if n not in known),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

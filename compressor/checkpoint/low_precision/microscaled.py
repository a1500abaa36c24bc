"""MXFP4 and MXFP8 as others lay them out, seen as a format has them: the same codes and scales
under other names, so that they are decoded, cast and moved by what reads that format. gpt-oss's has
each expert by itself, the others are compressed-tensors.

gpt-oss    X_blocks uint8 [experts, out, in/32, 16] and X_scales [experts, out, in/32] of stacked
           experts, X_bias; rows of gate_up_proj are gate and up by turns
ModelOpt   weight (uint8 [out, in/2] of MXFP4, float8 [out, in] of MXFP8) and weight_scale
MiniMax    `mxfp8`: weight float8 [out, in] and weight_scale or weight_scale_inv, bytes all the same
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.parts import PartsCheckpoint
from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.safetensors import Entry
from compressor.checkpoint.wrapper import wrapped
from compressor.errors import InputError
from compressor.formats.base import ModelSchemes, get_format
from compressor.ir.layout import is_weight
from compressor.ir.qtensor import MXFP4, MXFP8, QuantSpec
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape

STACK = re.compile(r"(?P<experts>.*\.experts)\.(?P<name>gate_up_proj|down_proj)_blocks")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
LEAVES = ("blocks", "scales", "bias")
ALGORITHMS = {"mxfp8": MXFP8, "mxfp4": MXFP4, "w4a8_mxfp4_fp8": MXFP4}
"""ModelOpt's names, in lower case, and MiniMax's."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor as part of a stored one: all of it, or each `turns`-th row of an expert from `turn`
    on."""

    name: str
    expert: int | None = None
    turn: int = 0
    turns: int = 1

    def read(self, stored: Tensor) -> Tensor:
        """The piece of it."""
        if self.expert is None:
            return stored
        return stored[self.expert, self.turn :: self.turns].contiguous()

    def entry(self, stored: Entry) -> Entry:
        """What the header would say of it."""
        shape = stored.spec.shape
        if self.expert is not None:
            rows, *inner = shape[1:]
            shape = (rows // self.turns, *inner)
        return replace(stored, spec=TensorShape(stored.spec.dtype, shape))


def as_one_by_one(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names and config of a format, where it is one of these; else
    itself. Raises InputError for parts that do not fit together."""
    declared = checkpoint.config.get("quantization_config")
    entry = declared if isinstance(declared, dict) else {}
    method = str(entry.get("quant_method", "")).lower()
    spec = ALGORITHMS.get(str(entry.get("quant_algo", method)).lower())
    if any(STACK.fullmatch(name) for name in checkpoint.entries):
        said = {**entry, "quant_method": "mxfp4"}
        return _seen(checkpoint, dict(_stacked(checkpoint)), said)
    if spec is not None and method in ("modelopt", "mxfp8"):
        pieces = dict(_renamed(checkpoint, spec))
        return _seen(checkpoint, pieces, _said(checkpoint, pieces, spec))
    return checkpoint


def _stacked(checkpoint: Checkpoint) -> Iterator[tuple[str, Piece]]:
    """gpt-oss's experts one by one: name → where it is."""
    for blocks, entry in checkpoint.entries.items():
        found = STACK.fullmatch(blocks)
        if found is None:
            continue
        shape = entry.spec.shape
        scales = checkpoint.entries.get(blocks.removesuffix("blocks") + "scales")
        fits = entry.spec.dtype == torch.uint8 and len(shape) == 4 and shape[-1] == 16
        if not fits or scales is None or scales.spec.shape != shape[:-1]:
            raise InputError(
                f"{blocks} {list(shape)} and its scales are not uint8 [experts, out, in/32, 16] "
                "and [experts, out, in/32]",
                hint="a shard or the scales are missing",
            )
        parts = PARTS[found["name"]]
        for leaf in LEAVES:
            stored = f"{found['experts']}.{found['name']}_{leaf}"
            for expert in range(shape[0] if stored in checkpoint.entries else 0):
                for turn, part in enumerate(parts):
                    name = f"{found['experts']}.{expert}.{part}.{leaf}"
                    yield name, Piece(stored, expert, turn, len(parts))


def _renamed(checkpoint: Checkpoint, spec: QuantSpec) -> Iterator[tuple[str, Piece]]:
    """Linears with a byte of a scale for each 32 inputs: name → where it is."""
    codes, leaf = (torch.uint8, "weight_packed") if spec.bits == 4 else (None, "weight")
    for name, entry in checkpoint.entries.items():
        if not is_weight(name):
            continue
        path = name.rpartition(".")[0]
        scale = next(
            (
                s
                for s in ("weight_scale", "weight_scale_inv")
                if f"{path}.{s}" in checkpoint.entries
            ),
            None,
        )
        if scale is None or entry.spec.dtype != (codes or torch.float8_e4m3fn):
            continue
        yield f"{path}.{leaf}", Piece(name)
        yield f"{path}.weight_scale", Piece(f"{path}.{scale}")


def _said(checkpoint: Checkpoint, pieces: Mapping[str, Piece], spec: QuantSpec) -> dict[str, Any]:
    """What compressed-tensors says of these weights."""
    paths = {name.removesuffix(".weight_scale") for name in pieces if name.endswith("_scale")}
    stored = {piece.name for piece in pieces.values()}
    plain = {n.rpartition(".")[0] for n in checkpoint.entries if is_weight(n) and n not in stored}
    schemes = {path: Scheme(weight=spec) for path in sorted(paths)}
    schemes |= {path: Scheme() for path in sorted(plain - paths)}
    return get_format("compressed-tensors").config(ModelSchemes(schemes))


def _seen(
    checkpoint: Checkpoint, pieces: Mapping[str, Piece], said: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint with pieces in place of what they are taken from, and what is said of them."""
    used = {piece.name for piece in pieces.values()}
    paths = {name.removesuffix(".weight_scale") for name in pieces if name.endswith("_scale")}
    beside = {f"{path}.input_scale" for path in paths}  # inputs are rounded as the model runs
    entries = {n: e for n, e in checkpoint.entries.items() if n not in used | beside}
    entries |= {name: piece.entry(checkpoint.entries[piece.name]) for name, piece in pieces.items()}
    config = {**checkpoint.config, "quantization_config": said}
    return wrapped(
        PartsCheckpoint, checkpoint, entries=entries, config=config, inner=checkpoint, parts=pieces
    )

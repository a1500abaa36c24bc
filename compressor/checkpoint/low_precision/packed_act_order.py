"""compressed-tensors `pack-quantized` whose groups are spread over the inputs (`actorder: group`).

Beside what that layout holds, weight_g_idx [in] names the group of each input:
w[o, i] = (q[o, i] - zero[o, g_idx[i]]) · scale[o, g_idx[i]]. A -1 in it says that
groups are in order, as a trivial one does; those checkpoints are the format's. Other codes have no
order by group that another format could keep, so they are read as floats.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.low_precision.base import Stored
from compressor.checkpoint.reader import Checkpoint
from compressor.errors import InputError
from compressor.formats.base import get_format
from compressor.formats.shared.words import WORD
from compressor.ir.layout import weight_name
from compressor.ir.qtensor import QuantSpec
from compressor.ir.tensor import TensorShape

ORDER, PACKED = "weight_g_idx", "weight_packed"


class PackedActOrder:
    """`quant_method: compressed-tensors` with packed integers in another order."""

    inert: tuple[str, ...] = ()

    def claims(self, declared: Mapping[str, Any] | None, checkpoint: Checkpoint) -> bool:
        """Where some weight_g_idx is not i // group_size; it is not looked at where it is not
        here."""
        if declared is None or declared.get("quant_method") != "compressed-tensors":
            return False
        names = [n for n in checkpoint.entries if n.endswith(f".{ORDER}")]
        if names and not checkpoint.entries[names[0]].file.is_file():
            return True
        return any(self._spread(name, checkpoint) for name in names)

    def _spread(self, name: str, checkpoint: Checkpoint) -> bool:
        scales = checkpoint.entries.get(name.removesuffix(ORDER) + "weight_scale")
        shape = checkpoint.entries[name].spec.shape
        if scales is None or len(scales.spec.shape) != 2 or len(shape) != 1:
            return False  # the format says what is amiss
        return not _in_order(checkpoint.read([name])[name], groups=scales.spec.shape[1])

    def describe(self, declared: Mapping[str, Any] | None) -> str:
        """compressed-tensors in activation order."""
        return "compressed-tensors in activation order"

    def stored(
        self, declared: Mapping[str, Any] | None, checkpoint: Checkpoint
    ) -> dict[str, Stored]:
        """Every linear with a `weight_packed`. Raises InputError for parts that do not fit."""
        assert declared is not None
        names = [n for n in checkpoint.entries if n.endswith(f".{PACKED}")]
        headers: dict[str, dict[str, TensorShape]] = {
            n.removesuffix(f".{PACKED}"): {} for n in names
        }
        for name, entry in checkpoint.entries.items():
            path, _, leaf = name.rpartition(".")
            if path in headers and leaf.startswith("weight"):
                headers[path][leaf] = entry.spec
        schemes = get_format("compressed-tensors").schemes(_in_any_order(declared), headers)
        found = {}
        for path, parts in headers.items():
            spec = schemes.linears[path].weight
            if (
                spec is None
                or spec.element != "int"
                or any(len(p.shape) > 2 for p in parts.values())
            ):
                raise InputError(f"{path}: packed weights of this kind are not read")
            shape = (parts[PACKED].shape[0], _columns(parts, spec))
            local = {leaf: f"{path}.{leaf}" for leaf in parts}
            decode = partial(_ordered, spec=spec, shape=shape)
            found[weight_name(path)] = Stored(local, shape, decode)
        return found


def without_order(declared: Mapping[str, Any] | None, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without a weight_g_idx, which says nothing where the layout claims none."""
    if declared is None or declared.get("quant_method") != "compressed-tensors":
        return checkpoint
    kept = {n: e for n, e in checkpoint.entries.items() if not n.endswith(f".{ORDER}")}
    return replace(checkpoint, entries=kept) if len(kept) < len(checkpoint.entries) else checkpoint


def _columns(parts: Mapping[str, TensorShape], spec: QuantSpec) -> int:
    """Inputs of a linear, from headers alone."""
    if ORDER in parts:
        return parts[ORDER].shape[0]
    if spec.group_size is not None:
        return parts["weight_scale"].shape[-1] * spec.group_size
    return parts[PACKED].shape[-1] * WORD // spec.bits


def _ordered(parts: Mapping[str, Tensor], *, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    packed = dict(parts)
    order = packed.pop(ORDER, None)
    q = get_format("compressed-tensors").decode(packed, spec)
    if q.shape != shape:
        raise InputError(f"weight_shape says {list(q.shape)}, its parts {list(shape)}")
    groups = q.scales.shape[1]
    if order is None or _in_order(order, groups=groups):
        return q.dequantize()
    order = order.long()
    if bool((order < 0).any() or (order >= groups).any()):
        raise InputError(f"{ORDER} names groups beyond its {groups}")
    codes = q.codes.float()
    codes -= 2 ** (spec.bits - 1) if q.zeros is None else q.zeros.float()[:, order]
    return codes.mul_(q.scales.float()[:, order])


def _in_order(order: Tensor, *, groups: int) -> bool:
    size = max(-(-order.numel() // max(groups, 1)), 1)
    plain = torch.arange(order.numel()) // size
    return bool((order == -1).any()) or torch.equal(order.long(), plain)


def _in_any_order(declared: Mapping[str, Any]) -> dict[str, Any]:
    """The declaration without `actorder`, which the stored order says."""
    groups = declared.get("config_groups")
    if not isinstance(groups, Mapping):
        return dict(declared)
    plain = {
        key: {**group, "weights": {k: v for k, v in group["weights"].items() if k != "actorder"}}
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
        else group
        for key, group in groups.items()
    }
    return {**declared, "config_groups": plain}


LAYOUT = PackedActOrder()

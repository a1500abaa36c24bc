"""GPTQ whose groups are spread over the inputs (`desc_act`): g_idx names the group of each input.

qweight [in·bits/32, out], qzeros [groups, out·bits/32], scales [groups, out], g_idx [in]:
w[o, i] = (q[o, i] - zero[g_idx[i], o]) · scale[g_idx[i], o]. Codes have no order by group that
another format could keep, so such a checkpoint is read as floats. A trivial g_idx is the format's.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.low_precision.base import Stored
from compressor.checkpoint.reader import Checkpoint
from compressor.errors import InputError
from compressor.formats.shared.words import WORD, unpack_words
from compressor.ir.layout import weight_name

BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GPTQActOrder:
    """`quant_method: gptq` with `desc_act: true` and groups that are not in order."""

    inert: tuple[str, ...] = ()

    def claims(self, declared: Mapping[str, Any] | None, checkpoint: Checkpoint) -> bool:
        """Where some g_idx is not i // group_size; it is not looked at where it is not here."""
        if declared is None or declared.get("quant_method") != "gptq":
            return False
        names = [n for n in checkpoint.entries if n.endswith(".g_idx")]
        if declared.get("desc_act") is not True or not names:
            return False
        if not checkpoint.entries[names[0]].file.is_file():
            return True
        size = declared.get("group_size")
        if type(size) is not int or size < 1:
            return False
        return any(
            not torch.equal(g_idx.long(), torch.arange(g_idx.numel()) // size)
            for name in names
            for g_idx in checkpoint.read([name]).values()
        )

    def describe(self, declared: Mapping[str, Any] | None) -> str:
        """gptq in activation order."""
        return "gptq in activation order"

    def stored(
        self, declared: Mapping[str, Any] | None, checkpoint: Checkpoint
    ) -> dict[str, Stored]:
        """Every linear with a `qweight`. Raises InputError for parts of other shapes."""
        assert declared is not None
        bits, marker = declared.get("bits"), declared.get("checkpoint_format") or "gptq"
        if bits not in BITS:
            raise InputError(f"quantization_config.bits is {bits!r}, not one of {BITS}")
        if marker not in ("gptq", "gptq_v2"):
            raise InputError(f"quantization_config.checkpoint_format {marker!r} is not known here")
        found = {}
        for name in [n for n in checkpoint.entries if n.endswith(".qweight")]:
            path = name.removesuffix(".qweight")
            parts = {leaf: f"{path}.{leaf}" for leaf in PARTS}
            for part in parts.values():
                if part not in checkpoint.entries:
                    raise InputError(f"the checkpoint lacks {part}")
            shapes = {k: checkpoint.entries[p].spec.shape for k, p in parts.items()}
            words, out = shapes["qweight"] if len(shapes["qweight"]) == 2 else (0, 0)
            columns, groups = words * WORD // bits, shapes["scales"][0] if shapes["scales"] else 0
            if (
                shapes["g_idx"] != (columns,)
                or shapes["scales"] != (groups, out)
                or shapes["qzeros"] != (groups, out * bits // WORD)
            ):
                raise InputError(f"{path}: its parts do not fit together: {shapes}")
            decode = partial(_ordered, bits=bits, shift=1 if marker == "gptq" else 0)
            found[weight_name(path)] = Stored(parts, (out, columns), decode)
        return found


def _ordered(parts: Mapping[str, Tensor], *, bits: int, shift: int) -> Tensor:
    """The weight; `shift` was subtracted from zero points before they were stored."""
    order, scales = parts["g_idx"].long(), parts["scales"].float()
    groups, out = scales.shape
    if bool((order < 0).any() or (order >= groups).any()):
        raise InputError(f"g_idx names groups beyond its {groups}")
    codes = unpack_words(parts["qweight"].t(), bits, order.numel()).float()
    zeros = unpack_words(parts["qzeros"], bits, out).float() + shift
    codes -= zeros.t()[:, order]
    return codes.mul_(scales.t()[:, order])


LAYOUT = GPTQActOrder()

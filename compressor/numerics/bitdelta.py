"""A fine-tune's weight as its base's plus a few sign matrices, each with one scale.

W = W_base + sum over k of scales[k] * S_k, S_k = +-1 (BitDelta, arXiv 2402.10193). One sign is the
published method; further ones repeat it on what is left. The reference takes the difference in
the checkpoint's dtype and rounds the scaled signs to it before adding; here both happen in float32
and only the sum is rounded, which is closer to the fine-tune.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from compressor_kernels.linear.bitdelta import pack_signs, unpack_signs
from torch import Tensor
from torch.nn.functional import embedding

SIGNS, SCALES = "delta_signs", "delta_scales"
"""Names of a linear's tensors in a delta checkpoint."""


@dataclass(frozen=True, slots=True)
class SignDelta:
    """The difference of one weight [out, in] to its base's.

    signs        int32 [bits, ceil(in / 32), out], as `pack_signs` lays them out
    scales       float32 [bits], multipliers of +-1
    in_features  inputs; the bits beyond them are zero and mean nothing
    """

    signs: Tensor
    scales: Tensor
    in_features: int

    def dense(self) -> Tensor:
        """The difference, float32 [out, in]."""
        total: Tensor | None = None
        for signs, scale in zip(self.signs, self.scales.float(), strict=True):
            part = _spread(signs, _octets(self.signs.device) * scale, self.in_features)
            total = part if total is None else total + part
        assert total is not None
        return total

    def merged(self, base: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], added up in float32 and rounded once."""
        return (base.float() + self.dense()).to(dtype)


@lru_cache
def _octets(device: torch.device) -> Tensor:
    """What the eight weights of a byte are, float32 [256, 8] of +1 and -1."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return ((bits & 1) * 2 - 1).float()


def _spread(signs: Tensor, table: Tensor, in_features: int) -> Tensor:
    """Packed signs [words, out] as the table's values [out, in], a byte at a time: several times
    faster than bit by bit, and few steps where a GPU waits for them."""
    octets = signs.t().clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return embedding(octets.int(), table).flatten(1)[:, :in_features]


def sign_delta(difference: Tensor, *, bits: int) -> SignDelta:
    """Signs of a difference [out, in], then of what they leave, with the scales that leave least.

    The mean magnitude is the scale of +-1 with the smallest squared error. Zero counts as positive.
    """
    left = difference.float().clone()
    signs, scales = [], []
    for _ in range(bits):
        packed = pack_signs(left)
        scale = left.abs().mean(dtype=torch.float64).float()
        signs.append(packed)
        scales.append(scale)
        left -= unpack_signs(packed, in_features=left.shape[1]) * scale
    return SignDelta(torch.stack(signs), torch.stack(scales), left.shape[1])


def fit_scales(delta: SignDelta, difference: Tensor, gram: Tensor) -> SignDelta:
    """The same signs with the scales that change this layer's outputs least.

    gram  X^T X [in, in] of the layer's inputs. The squared error of the output is quadratic in the
    scales, so its minimum is solved for; inputs that no token reached leave the scales alone.
    """
    dense = [unpack_signs(s, in_features=delta.in_features).float() for s in delta.signs]
    gram = gram.to(dense[0].device, torch.float32)
    seen = [s @ gram for s in dense]
    target = torch.stack([_product(s, difference.float()) for s in seen])
    system = torch.stack([torch.stack([_product(s, other) for other in dense]) for s in seen])
    if not float(system.diagonal().min()) > 0:
        return delta
    # Signs of later rounds are nearly, never exactly, independent of earlier ones.
    solved = torch.linalg.lstsq(system.cpu(), target.cpu().unsqueeze(1)).solution[:, 0]
    return replace(delta, scales=solved.float().to(delta.scales.device))


def merge(base: Tensor, signs: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`SignDelta.merged` with a gradient for the scales [bits]; only packed signs are kept."""
    out: Tensor = _Merge.apply(base, signs, scales, dtype)  # type: ignore[no-untyped-call]
    return out


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, signs: Tensor, scales: Tensor, dtype: torch.dtype) -> Any:
        ctx.save_for_backward(signs)
        ctx.in_features = base.shape[1]
        return SignDelta(signs, scales.detach(), base.shape[1]).merged(base, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (signs,) = ctx.saved_tensors
        dense = (_spread(s, _octets(s.device), ctx.in_features) for s in signs)
        return None, None, torch.stack([_product(s, grad).float() for s in dense]), None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the elementwise product of two matrices, rows in float32 and their sum in float64."""
    return (a.float() * b.float()).sum(1).sum(dtype=torch.float64)

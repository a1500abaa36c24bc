"""How exact a kernel's product has to be."""

import torch
from torch import Tensor


def assert_close(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | float = 0.0,
    rounded_weight: bool = False,
) -> None:
    """As exact as fp32 sums rounded once, or as weights rounded to x's dtype before that.

    weight  [out, in] in float64
    """
    expected = x.double() @ weight.mT + bias
    # What sums may lose, against the sum of magnitudes; the interpreter truncates bf16 stores.
    step = torch.finfo(y.dtype).eps
    magnitudes = x.double().abs() @ weight.abs().mT
    loss = torch.finfo(x.dtype).eps if rounded_weight else 1e-5
    assert ((y.double() - expected).abs() <= step * expected.abs() + loss * magnitudes).all()

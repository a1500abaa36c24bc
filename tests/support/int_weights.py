"""Integer weights that hold every value their spec allows, for tests of formats."""

import torch

from compressor.ir.qtensor import QTensor, QuantSpec


def weight(bits, strategy, group, zero, shape, dtype, *, seed=0):
    """A QTensor that has every code, both ends of the zero points and scales of all magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(
        element="int", bits=bits, strategy=strategy, group_size=group, zero=zero, scale_dtype=dtype
    )
    groups = spec.scale_shape(*shape)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    codes[0, :] = 2**bits - 1
    codes[-1, : shape[1] // 2] = 0
    exponents = torch.randint(-10, 4, groups, generator=generator)
    scales = (torch.rand(groups, generator=generator) + 1) * torch.exp2(exponents.float())
    zeros = None
    if zero == "subtract":
        zeros = torch.randint(0, 2**bits, groups, generator=generator, dtype=torch.uint8)
        zeros.view(-1)[0], zeros.view(-1)[-1] = 0, 2**bits - 1
    return QTensor(spec=spec, codes=codes, scales=scales.to(dtype), zeros=zeros)


def same(a: QTensor, b: QTensor) -> bool:
    return (
        a.spec == b.spec
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.scales, b.scales)
        and (a.zeros is None) == (b.zeros is None)
        and (a.zeros is None or torch.equal(a.zeros, b.zeros))
    )

"""SignRound's grids, gradients and steps against AutoRound's own functions."""

import pytest
import torch

from compressor.ir.qtensor import QuantSpec
from compressor.methods.signround import SignRounding
from compressor.numerics.learned_floats import learned_elements, learned_scales
from compressor.numerics.learned_grid import (
    as_qtensor,
    grouped,
    learned_grid,
    learned_steps,
    range_of,
)
from tests.support.golden_files import vectors

ZEROS = {"sym": "none", "asym": "subtract"}


def learned(weight, given, spec):
    """Steps, scales, zeros, what they stand for, and the gradients of values and both shares."""
    groups = grouped(weight, spec)
    value = given["value"].to(weight.dtype).view(groups.shape).clone().requires_grad_()
    shares = [
        given[f"{end}_scale.g{spec.group_size}"].to(weight.dtype).view(groups.shape[:2]).clone()
        for end in ("min", "max")
    ]
    low, high = (share.requires_grad_() for share in shares)
    scales, zeros = learned_grid(range_of(groups), low, high, spec)
    steps = learned_steps(groups, value, scales, zeros, spec)
    made = (steps * scales[..., None]).flatten(1)
    (made * given["upstream"].to(weight.dtype)).sum().backward()
    return (steps, scales, zeros), made, [x.grad.flatten() for x in (value, low, high)]


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ZEROS)
def test_grids_and_gradients_are_those_of_autoround(kind, bits, size):
    given, case = vectors("rounding/int_grids"), f"{kind}.b{bits}.g{size}"
    spec = QuantSpec("int", bits, "group", size, zero=ZEROS[kind], scale_dtype=torch.float16)
    (steps, scales, zeros), made, gradients = learned(given["weight"], given, spec)
    assert torch.equal(made, given[f"{case}.wq"])
    assert torch.equal(as_qtensor(steps, scales, zeros, spec).dequantize(), made)
    assert torch.equal(scales.flatten(), given[f"{case}.scale"].flatten())
    if zeros is not None:
        assert torch.equal(zeros.flatten(), given[f"{case}.zp"].flatten())
    assert torch.equal(gradients[0], given[f"{case}.grad_value"].flatten())
    for ours, end in zip(gradients[1:], ("min", "max"), strict=True):
        # Theirs passes through float16, ours does not.
        theirs = given[f"{case}.grad_{end}"].flatten()
        assert ((ours - theirs).abs() <= 0.1 * theirs.abs() + 1e-4 * theirs.abs().max()).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ZEROS)
def test_gradients_are_exact(kind, bits):
    given = vectors("rounding/int_dtypes") | {
        name: tensor
        for name, tensor in vectors("rounding/int_grids").items()
        if "." not in name or name.endswith("scale.g64")
    }
    spec = QuantSpec("int", bits, "group", 64, zero=ZEROS[kind], scale_dtype=torch.float32)
    _, made, gradients = learned(given["weight"], given, spec)
    exact = f"{kind}.b{bits}.f64_s64"
    assert (made - given[f"{exact}.wq"]).abs().max() <= 4e-8
    for ours, end in zip(gradients[1:], ("min", "max"), strict=True):
        theirs = given[f"{exact}.grad_{end}"].flatten()
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("case", ["sym4", "asym4", "sym2", "asym2"])
def test_steps_are_those_of_autoround(case):
    given = {
        name.removeprefix(f"{case}."): tensor
        for name, tensor in vectors("rounding/sign_trace").items()
        if name.startswith(f"{case}.")
    }
    weight, x = given["weight"], given["x"]
    size = given["value_after1"].shape[1]
    zero = ZEROS[case[:-1]]
    spec = QuantSpec("int", int(case[-1]), "group", size, zero=zero, scale_dtype=torch.float16)
    rounding, losses, wanted = SignRounding(weight, spec, ranges=True), [], x @ weight.T
    for step in range(10):
        for parameter in rounding.parameters():
            parameter.grad = None
        loss = (x @ rounding.weight().T - wanted).square().mean()
        losses.append(loss.item())
        (1000 * loss).backward()
        with torch.no_grad():
            rounding.descend(0.1 * (1 - step / 10))
        if step == 0:
            after = given["value_after1"].flatten()
            assert torch.equal(rounding.offsets.detach().flatten(), after)
    assert losses[0] == pytest.approx(given["losses"][0].item(), rel=1e-4)
    # Later ones may differ by the signs of gradients near zero.
    assert min(losses) <= 1.02 * given["losses"].min()


@pytest.mark.parametrize(("kind", "size"), [("nv_fp4", 16), ("mx_fp4", 32)])
def test_float_grids_and_gradients_are_those_of_autoround(kind, size):
    given = vectors("rounding/fp4")
    groups = given["weight"].view(6, -1, size)
    offsets = given["value"].view(groups.shape).clone().requires_grad_()
    share = given[f"max_scale.g{size}"].clone().requires_grad_()
    divisor = given["nv.global_scale"].view(1, 1) if kind == "nv_fp4" else None
    scales = learned_scales(groups.abs().amax(-1), share, divisor)
    elements = learned_elements(groups, offsets, scales, divisor)
    made = elements * (scales if divisor is None else scales / divisor)[..., None]
    (made.flatten(1) * given["upstream"]).sum().backward()
    # Equal but for the order in which two scales are multiplied. A block of zeros has the least
    # scale here; with AutoRound's its offsets become weights.
    filled = [row for row in range(6) if row != 2]
    wanted = given[f"{kind}.wq"][filled]
    assert torch.allclose(made.flatten(1)[filled], wanted, rtol=3e-7, atol=0)
    usable = (scales > 2.0**-126)[..., None].expand(groups.shape).flatten(1)
    theirs = given[f"{kind}.grad_value"]
    assert torch.allclose(offsets.grad.flatten(1)[usable], theirs[usable], rtol=1e-5, atol=0)
    theirs = given[f"{kind}.grad_max"]
    known = theirs.isfinite()
    assert (share.grad[~known] == 0).all()
    bound = 1e-4 * theirs[known].abs().max()
    assert ((share.grad - theirs)[known].abs() <= 1e-3 * theirs[known].abs() + bound).all()

"""SmoothQuant's migration and its W8A8 quantizers equal the published code's.

That code takes the dead channel 5 to a scale of 1e-5, which overflows in float16; ours keeps 1.
"""

import pytest
import torch

from compressor.ir.layout import Fold, Linear, UnitLayout
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import ActivationSpec
from compressor.numerics import quantize
from compressor.numerics.activations import fake_quantize_activation
from compressor.numerics.folding import fold
from compressor.numerics.migration import smooth_scales
from tests.support.golden_files import vectors

DEAD = 5


@pytest.mark.parametrize("dtype, rtol", [("fp32", 1e-6), ("fp16", 2e-3)])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("alpha", [0.5, 0.75, 0.85])
def test_migration(dtype, rtol, norm, alpha):
    golden = vectors(f"quant/smoothquant_smooth_{dtype}")
    names = [f"fc{i}" for i in range(3)]
    tensors = {f"{n}.weight": golden[f"{n}.weight"] for n in ("ln", *names)}
    if norm == "layernorm":
        tensors["ln.bias"] = golden["ln.bias"]
    layout = UnitLayout(
        name="block",
        kind="block",
        index=0,
        tensors=tuple(tensors),
        linears=tuple(
            Linear(n, "mlp.up", *tensors[f"{n}.weight"].shape, site="mlp.in") for n in names
        ),
    )
    weights = [tensors[f"{n}.weight"] for n in names]
    scales = smooth_scales(golden["act_scales"], weights, alpha)
    assert scales[DEAD] == 1
    found = fold(tensors, Fold("mlp.in", "ln", "norm"), layout, scales)
    alive = torch.arange(64) != DEAD
    for name, tensor in found.items():
        expected = golden.get(f"{norm}.a{alpha}.{name}")
        if expected is None:
            continue
        ours, theirs = tensor[..., alive].float(), expected[..., alive].float()
        assert bool(theirs.isfinite().all())
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=6e-8 if rtol > 1e-4 else 0)
        assert torch.equal(tensor[..., DEAD], tensors[name][..., DEAD])


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("inputs", ["token", "tensor"])
def test_w8a8(weights, inputs):
    golden = vectors("quant/smoothquant_w8a8_fp32")
    q = quantize(golden["weight"], QuantSpec("int", 8, weights), narrow=True)
    torch.testing.assert_close(q.dequantize(), golden[f"weight.per_{weights}"], rtol=1e-6, atol=0)
    if weights == "channel":
        codes = golden["weight.per_channel.codes_i8"]
        assert torch.equal(q.codes.to(torch.int16) - 128, codes.to(torch.int16))
        torch.testing.assert_close(q.scales, golden["weight.per_channel.scale"], rtol=1e-7, atol=0)
    # Theirs takes a dynamic scale per tensor over the whole batch, ours over each row of tokens.
    x = golden["x"] if inputs == "token" else golden["x"].flatten(0, 1)
    seen = fake_quantize_activation(x, ActivationSpec("int8", inputs)).view(golden["x"].shape)
    torch.testing.assert_close(seen, golden[f"x.per_{inputs}"], rtol=1e-6, atol=0)
    out = torch.nn.functional.linear(seen, q.dequantize(), golden["bias"])
    wanted = golden[f"linear.w_per_{weights}.a_per_{inputs}.outq_0"]
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_w8a8_in_half_precision(dtype):
    """Theirs casts its rounded quotients to int8 as they are. A scale that bfloat16 rounded down
    leaves a quotient of 128 where a positive weight is the largest, and that wraps to -128; ours
    saturates at 127. Everything else is equal."""
    golden = vectors(f"quant/smoothquant_w8a8_{dtype}")
    weight, theirs = golden["weight"], golden["weight.per_channel.codes_i8"].int()
    spec = QuantSpec("int", 8, "channel", scale_dtype=weight.dtype)
    q = quantize(weight, spec, narrow=True, arithmetic=weight.dtype)
    assert torch.equal(q.scales, golden["weight.per_channel.scale"])
    wrapped = (theirs == -128) & (weight > 0)
    assert torch.equal(q.codes.int() - 128, torch.where(wrapped, 127, theirs))
    assert bool((weight[wrapped] / q.scales.expand_as(weight)[wrapped] > 127).all())

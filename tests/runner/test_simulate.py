"""Fake quantization of inputs and of the KV cache, alone and inside a block."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.checkpoint.source import Source, open_source
from compressor.errors import InputError
from compressor.evaluate.perplexity import evaluate
from compressor.formats.base import ModelSchemes
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.numerics.activations import fake_quantize_activation, fake_quantize_kv

CPU = torch.device("cpu")


def sample(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= 30
    return x


def test_int8_per_token_is_on_a_grid_of_255_steps() -> None:
    x = sample(3, 5, 64)
    found = fake_quantize_activation(x, ActivationSpec("int8", "token"))
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    expected = (x.double() / scale).round() * scale
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert found.dtype == x.dtype and not found.equal(x)


def test_what_shares_a_scale() -> None:
    x = sample(2, 4, 32)
    for row in range(2):
        alone = fake_quantize_activation(x[row : row + 1], ActivationSpec("int8", "tensor"))
        both = fake_quantize_activation(x, ActivationSpec("int8", "tensor"))
        assert alone.equal(both[row : row + 1]), "a row of tokens does not depend on its batch"
    grouped = fake_quantize_activation(x, ActivationSpec("fp8_e4m3", "group", 16))
    halves = [
        fake_quantize_activation(half, ActivationSpec("fp8_e4m3", "token"))
        for half in (x[..., :16], x[..., 16:])
    ]
    assert grouped.equal(torch.cat(halves, -1))


def test_fp8_keeps_three_bits_of_mantissa_and_never_overflows() -> None:
    x = sample(2, 8, 64)
    found = fake_quantize_activation(x, ActivationSpec("fp8_e4m3", "token"))
    large = x.abs() > x.abs().amax(-1, keepdim=True) / 2**10
    assert ((found - x).abs()[large] <= x.abs()[large] / 16 * 1.0001).all()
    clipped = fake_quantize_activation(
        x * 1e4, ActivationSpec("fp8_e4m3", "static"), torch.tensor([0.01])
    )
    assert clipped.isfinite().all() and clipped.abs().max() <= 4.48 * 1.0001


def test_zeros_stay_zero() -> None:
    zero = torch.zeros(2, 3, 16)
    for element in ("int8", "fp8_e4m3"):
        for mode in ("token", "tensor"):
            assert fake_quantize_activation(zero, ActivationSpec(element, mode)).equal(zero)
    head = torch.full((1, 2, 3, 8), 0.5)
    assert fake_quantize_kv(head, KVSpec("int4", "token_head")).equal(head), "a constant is exact"


def test_int4_keys_are_within_half_a_step_of_their_range() -> None:
    x = sample(2, 3, 7, 32)
    found = fake_quantize_kv(x, KVSpec("int4", "token_head"))
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    assert ((found - x).abs() <= step * 0.51 + 2e-2).all()
    assert all(len(row.unique()) <= 16 for row in found.reshape(-1, 32))


def test_a_scale_for_each_head_is_its_own() -> None:
    x = sample(1, 2, 5, 16)
    scales = torch.tensor([0.1, 0.5]).view(2, 1, 1)
    both = fake_quantize_kv(x, KVSpec("int8", "head"), scales)
    for head, scale in enumerate((0.1, 0.5)):
        alone = fake_quantize_kv(x[:, head : head + 1], KVSpec("int8"), torch.tensor([scale]))
        assert alone.equal(both[:, head : head + 1])


def test_what_is_missing_or_unknown_is_refused() -> None:
    x = sample(1, 2, 3, 16)
    with pytest.raises(InputError, match="stored scale"):
        fake_quantize_kv(x, KVSpec("fp8_e4m3"))
    with pytest.raises(InputError, match="stored scale"):
        fake_quantize_kv(x, KVSpec("int8", "head"), torch.ones(3))
    with pytest.raises(InputError, match="stored scale"):
        fake_quantize_activation(x, ActivationSpec("int8", "static"))
    with pytest.raises(InputError, match="groups of 5"):
        fake_quantize_activation(x, ActivationSpec("int8", "group", 5))


def quantized_inputs(source: Source, spec: ActivationSpec, role: str) -> Source:
    """The source as if the inputs of linears of a role were quantized."""
    linears = {
        linear.name: Scheme(input=spec if linear.role.startswith(role) else None)
        for linear in source.layout.linears
    }
    return replace(source, schemes=ModelSchemes(linears=linears))


@pytest.mark.parametrize(
    ("model_type", "role"),
    [
        ("llama", "attn.q"),
        ("llama", "mlp.down"),
        ("llama", "lm_head"),
        ("mixtral", "expert.gate"),
        ("qwen3_moe", "expert.down"),
    ],
)
def test_inputs_are_quantized_where_the_checkpoint_says(
    model_type: str, role: str, tiny_model: Callable[..., Path]
) -> None:
    source = open_source(tiny_model(model_type))
    ids = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(5))
    coarse = quantized_inputs(source, ActivationSpec("int8", "token"), role)
    found = evaluate(coarse, ids, device=CPU, dtype=torch.float32, against=source)
    assert found.kl is not None and 0 < found.kl.value < 0.01


def test_experts_one_by_one_compute_what_they_compute_together(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.runner.simulate.StoredInput.__call__", lambda self, x: x)
    ids = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(5))
    for model_type in ("mixtral", "qwen3_moe"):
        source = open_source(tiny_model(model_type))
        looped = quantized_inputs(source, ActivationSpec("int8", "token"), "expert")
        found = evaluate(looped, ids, device=CPU, dtype=torch.float32, against=source)
        assert found.blocks[-1].error < 1e-10


@pytest.mark.parametrize("element", ["int4", "fp8_e4m3"])
def test_the_cache_is_quantized_where_the_checkpoint_says(
    element: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny_model("qwen3"))
    per = "token_head" if element == "int4" else "tensor"
    schemes = replace(source.schemes, kv=KVSpec(element, per))  # type: ignore[arg-type]
    read = Source.read_unit

    def with_scales(self: Source, unit: object, **options: bool) -> object:
        found = read(self, unit, **options)  # type: ignore[arg-type]
        scales = {
            f"{found.layout.name}.self_attn.{x}_scale": torch.tensor([0.02]) for x in ("k", "v")
        }
        return replace(found, extra=scales)

    monkeypatch.setattr(Source, "read_unit", with_scales)
    ids = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(5))
    found = evaluate(
        replace(source, schemes=schemes), ids, device=CPU, dtype=torch.float32, against=source
    )
    assert found.kl is not None and 0 < found.kl.value < 0.5

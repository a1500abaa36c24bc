"""Rotation, SmoothAttention, reordering and int8 inputs equal deepcompressor's."""

import pytest
import torch

from compressor.ir.scheme import ActivationSpec
from compressor.numerics.activations import fake_quantize_activation
from compressor.numerics.channel_order import head_order, salience_order
from compressor.numerics.hadamard import rotation
from compressor.numerics.smooth_attention import smooth_attention_scales
from tests.support.golden_files import vectors

HEAD_DIM = 16


@pytest.mark.parametrize("size", [16, 64, 96, 128])
def test_hadamard_matrices(size):
    expected = vectors("quant/qoq_rotation")[f"hadamard_{size}_fp64"]
    atol = 1e-12 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(rotation(size).matrix(), expected.double(), atol=atol, rtol=0)


def test_another_hadamard_matrix_of_order_160():
    """The reference takes one of order 40 times one of order 4, we 20 times 8: both are flat."""
    expected = vectors("quant/qoq_rotation")["hadamard_160_fp64"].double()
    ours = rotation(160).matrix()
    assert ours[0, 0] > 0 and not torch.allclose(ours, expected, atol=1e-3)
    for matrix in (ours, expected):
        torch.testing.assert_close(
            matrix.abs(), torch.full_like(matrix, 160**-0.5), atol=1e-4, rtol=0
        )
        eye = torch.eye(160, dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, eye, atol=1e-3, rtol=0)


def test_rotated_weights():
    golden = vectors("quant/qoq_rotation")
    inputs = rotation(golden["rot.w"].shape[1]).right(golden["rot.w"])
    torch.testing.assert_close(inputs, golden["rot.in"], atol=1e-6, rtol=0)
    weight = golden["rot.w2"]
    heads = weight.T.reshape(weight.shape[1], -1, HEAD_DIM)
    outputs = rotation(HEAD_DIM).right(heads).reshape(weight.T.shape).T
    torch.testing.assert_close(outputs, golden["rot.out_head16"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_smooth_attention(beta):
    golden = vectors("quant/qoq_smoothattn_reorder")
    keys, queries = (golden[name].abs().amax(0).view(-1, HEAD_DIM) for name in ("k_acts", "q_acts"))
    repeat = queries.shape[0] // keys.shape[0]
    scales = smooth_attention_scales(keys, alpha=0.5, queries=queries, beta=beta)
    by_query = scales.repeat_interleave(repeat, 0).reshape(-1)
    tag = f"a0.5_b{beta}"
    torch.testing.assert_close(by_query, golden[f"scale_{tag}"], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        golden["wq"] * by_query[:, None], golden[f"wq_{tag}"], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        golden["wk"] / scales.reshape(-1, 1), golden[f"wk_{tag}"], rtol=1e-6, atol=0
    )


def test_spans_of_keys_and_queries():
    golden = vectors("quant/qoq_smoothattn_reorder")
    keys, queries = (golden[name].abs().amax(0).view(-1, HEAD_DIM) for name in ("k_acts", "q_acts"))
    repeat = queries.shape[0] // keys.shape[0]
    ours = smooth_attention_scales(keys, alpha=1.0).repeat_interleave(repeat, 0)
    torch.testing.assert_close(ours.reshape(-1), golden["k_span"], rtol=1e-6, atol=0)
    inverse = smooth_attention_scales(
        torch.ones_like(keys), alpha=0.0, queries=queries, beta=1.0
    ).repeat_interleave(repeat, 0)
    torch.testing.assert_close(1 / inverse.reshape(-1), golden["q_span"], rtol=1e-6, atol=0)


def test_orders_of_channels():
    golden = vectors("quant/qoq_smoothattn_reorder")
    metric = golden["reorder.metric"]
    assert torch.equal(salience_order(metric), golden["reorder.seq"])
    by_head = head_order(metric, head_dim=HEAD_DIM, repeat=2).repeat_interleave(2, 0)
    starts = torch.arange(by_head.shape[0])[:, None] * HEAD_DIM
    assert torch.equal((by_head + starts).reshape(-1), golden["reorder.heads4_rep2_seq"])


def test_int8_inputs():
    """The reference rounds its scale to float16; ours stays float32, as the kernels have it."""
    golden = vectors("quant/qoq_kv4_a8")
    x = golden["x_fp16"]
    scale = (x.float().abs().amax(1, keepdim=True) / 127).half()
    assert torch.equal(scale.flatten(), golden["a8.scale"])
    codes = (x.float() / scale.float()).round().clamp(-127, 127)
    assert torch.equal(codes.to(torch.int8), golden["a8.codes_i8"])
    made = fake_quantize_activation(x, ActivationSpec("int8", "token"))
    step = scale.float().expand_as(x)
    assert ((made.float() - golden["a8.dequant"].float()).abs() <= step * 1.01).all()
    same = (made.float() / step).round() == golden["a8.codes_i8"]
    assert same.float().mean() > 0.99

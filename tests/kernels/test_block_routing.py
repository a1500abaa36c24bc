"""MoBA's kernels against plain references."""

import pytest
import torch
from compressor_kernels.attention.block_attention import block_attention_ref
from compressor_kernels.attention.block_routing import (
    gated_blocks,
    gated_blocks_ref,
    mean_keys,
    routed_attention,
)
from compressor_kernels.attention.block_selection import BlockRule

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(("q_len", "tokens"), [(150, 150), (37, 201), (1, 65)])
def test_kernels(q_len, tokens, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("compressor_kernels.attention.block_routing.HELD", 3 * 2 * q_len * 3 * 24)
    q, k, v = (
        randn(1, q_len, 4, 24).transpose(1, 2),
        randn(1, 2, tokens, 24),
        randn(1, 2, tokens, 24),
    )
    rule = BlockRule(block_size=16, init_blocks=0, local_blocks=0, top_k=3)
    means = mean_keys(k, block_size=16)
    blocks = gated_blocks(q, means, rule, tokens=tokens)
    want = gated_blocks_ref(q, means.half(), rule, tokens=tokens)
    assert torch.equal(blocks, want)
    out = routed_attention(q, k, v, blocks, block_size=16)
    want = block_attention_ref(q, k, v, blocks, block_size=16)
    torch.testing.assert_close(out, want, atol=6e-3, rtol=6e-3)


@pytest.mark.gpu
def test_published_shapes_on_a_device():
    torch.manual_seed(1)
    tokens = 8300
    q, k, v = (randn(1, n, tokens, 128, dtype=torch.bfloat16) for n in (8, 2, 2))
    rule = BlockRule(block_size=128, init_blocks=0, local_blocks=0, top_k=8)
    means = mean_keys(k, block_size=128)
    blocks = gated_blocks(q, means, rule, tokens=tokens)
    want = gated_blocks_ref(q, means.bfloat16(), rule, tokens=tokens)
    assert (blocks != want).any(-1).float().mean() < 0.02  # gates in bf16 tie
    out = routed_attention(q, k, v, blocks, block_size=128)
    want = block_attention_ref(q, k, v, blocks, block_size=128)
    torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)

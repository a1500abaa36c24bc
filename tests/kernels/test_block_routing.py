"""MoBA's kernels against plain references."""

import pytest
import torch
from compressor_kernels.attention.block_attention import block_attention_ref
from compressor_kernels.attention.block_routing import (
    RouteTiles,
    gated_blocks,
    gated_blocks_ref,
    mean_keys,
    mean_keys_ref,
    route,
    route_ref,
    routed_attention,
)
from compressor_kernels.attention.block_selection import BlockRule

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(
    ("q_len", "tokens", "size", "top_k"),
    [(150, 150, 16, 3), (37, 201, 48, 2), (1, 65, 16, 5), (40, 40, 16, 1), (70, 513, 256, 3)],
)
def test_kernels(q_len, tokens, size, top_k, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("compressor_kernels.attention.block_routing.HELD", 3 * 2 * q_len * 3 * 24)
    q, k, v = (
        randn(1, q_len, 4, 24).transpose(1, 2),
        randn(1, 2, tokens, 24),
        randn(1, 2, tokens, 24),
    )
    rule = BlockRule(block_size=size, init_blocks=0, local_blocks=0, top_k=top_k)
    means = mean_keys(k, block_size=size)
    torch.testing.assert_close(means, mean_keys_ref(k, block_size=size))
    blocks = gated_blocks(q, means, rule, tokens=tokens)
    want = gated_blocks_ref(q, means.half(), rule, tokens=tokens)
    assert torch.equal(blocks, want)
    tiles = RouteTiles(rows=16, span=32, num_warps=4)
    out = routed_attention(q, k, v, blocks, block_size=size, tiles=tiles)
    want = block_attention_ref(q, k, v, blocks, block_size=size)
    torch.testing.assert_close(out, want, atol=6e-3, rtol=6e-3)


def test_the_best_of_many_blocks_and_equal_gates():
    """More blocks than are read at once, and gates in whole numbers, of which many are the same."""
    torch.manual_seed(1)
    q = torch.randint(-1, 2, (1, 2, 300, 16), device=DEVICE).half()
    means = torch.randint(-1, 2, (1, 1, 300, 16), device=DEVICE).float()
    rule = BlockRule(block_size=1, init_blocks=0, local_blocks=0, top_k=6)
    blocks = gated_blocks(q, means, rule, tokens=300)
    assert torch.equal(blocks, gated_blocks_ref(q, means, rule, tokens=300))


def test_queries_by_block(monkeypatch):
    torch.manual_seed(2)
    monkeypatch.setattr("compressor_kernels.attention.block_routing.TALLIED", 64)
    blocks = torch.randint(-1, 11, (2, 3, 77, 4), device=DEVICE, dtype=torch.int32)
    ours, theirs = route(blocks, 12), route_ref(blocks, 12)
    assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.offsets, theirs.offsets)
    for lane in range(6):
        for start, many in zip(
            ours.offsets.flatten(0, 1)[lane].tolist(),
            ours.counts.flatten(0, 1)[lane].tolist(),
            strict=True,
        ):
            some = slice(start, start + many)
            mine = ours.entries.flatten(0, 1)[lane, some].sort().values
            assert torch.equal(mine, theirs.entries.flatten(0, 1)[lane, some])


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

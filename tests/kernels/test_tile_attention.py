"""XAttention's estimate and attention over its tiles: kernels against plain references."""

import pytest
import torch
from compressor_kernels.attention.antidiagonal import (
    antidiagonal_sums,
    antidiagonal_sums_ref,
    covering_blocks,
    covering_blocks_ref,
)
from compressor_kernels.attention.tile_attention import (
    density,
    tile_attention,
    tile_attention_ref,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(
    ("q_len", "k_len", "block", "stride"),
    [(200, 200, 32, 8), (77, 301, 64, 16), (33, 64, 32, 8), (5, 5, 16, 4), (129, 300, 128, 16)],
)
def test_kernels(q_len, k_len, block, stride):
    torch.manual_seed(0)
    q = randn(1, q_len, 4, 24).transpose(1, 2)
    k, v = randn(1, 2, k_len, 24), randn(1, 2, k_len, 24)
    where = {"block_size": block, "stride": stride, "scale": 0.7}
    sums = antidiagonal_sums(q, k, **where)
    torch.testing.assert_close(sums, antidiagonal_sums_ref(q, k, **where), atol=2e-3, rtol=2e-3)
    first = (k_len - q_len) // block
    share = torch.tensor([0.0, 0.5, 0.9, 1.0])
    chosen = covering_blocks(sums, share, first=first)
    assert torch.equal(chosen, covering_blocks_ref(sums, share, first=first))
    out = tile_attention(q, k, v, chosen, block_size=block)
    want = tile_attention_ref(q, k, v, chosen, block_size=block)
    torch.testing.assert_close(out, want, atol=4e-3, rtol=4e-3)


def test_everything_chosen_is_full_attention():
    torch.manual_seed(1)
    q, k, v = (randn(1, n, 90, 32) for n in (4, 2, 2))
    sums = antidiagonal_sums_ref(q, k, block_size=16, stride=4)
    torch.testing.assert_close(sums[:, :, :5].sum(-1), torch.full((1, 4, 5), 4.0, device=DEVICE))
    chosen = covering_blocks_ref(sums, torch.ones(4))
    full = torch.ones_like(chosen)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
    )
    out = tile_attention(q, k, v, full, block_size=16)
    torch.testing.assert_close(out.float(), want, atol=4e-3, rtol=4e-3)
    assert density(full).tolist() == [1.0] * 4 and density(full, kv_heads=2).tolist() == [1.0] * 2


def test_a_threshold_of_nothing_leaves_the_first_and_the_own_block():
    sums = torch.rand(1, 2, 5, 5, device=DEVICE).tril()
    for choose in (covering_blocks, covering_blocks_ref):
        chosen = choose(sums, torch.zeros(2)).cpu()
        assert torch.equal(chosen[0, 0], torch.eye(5).bool() | (torch.arange(5) == 0))


def test_equal_and_empty_blocks():
    """Weights of which many are the same or nothing: the lower block joins first."""
    torch.manual_seed(4)
    sums = (torch.randint(0, 3, (2, 4, 40, 77), device=DEVICE) / 4).tril(37)
    share = torch.tensor([0.2, 0.5, 0.99, 1.0])
    chosen = covering_blocks(sums, share, first=37)
    assert torch.equal(chosen, covering_blocks_ref(sums, share, first=37))


def test_covering_blocks_are_the_fewest():
    torch.manual_seed(2)
    sums = torch.rand(1, 3, 6, 9).tril(3)
    share = torch.tensor([0.4, 0.7, 0.95])
    chosen = covering_blocks_ref(sums, share, first=3)
    for head in range(3):
        for row in range(6):
            line, mine = sums[0, head, row].double(), chosen[0, head, row]
            goal = share[head].double() * line.sum()
            free = [j for j in range(1, row + 3) if mine[j]]
            assert line[mine].sum() >= goal - 1e-9
            assert not free or line[mine].sum() - min(line[j] for j in free) < goal


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [8, 16])
def test_published_shapes_on_a_device(stride):
    torch.manual_seed(3)
    tokens = 8200
    q, k, v = (randn(1, n, tokens, 128, dtype=torch.bfloat16) for n in (8, 2, 2))
    where = {"block_size": 128, "stride": stride}
    sums = antidiagonal_sums(q, k, **where)
    want = antidiagonal_sums_ref(q, k, **where)
    torch.testing.assert_close(sums, want, atol=2e-2, rtol=2e-2)
    share = torch.full((8,), 0.3)
    chosen = covering_blocks(sums, share)
    assert torch.equal(chosen, covering_blocks_ref(sums, share))
    out = tile_attention(q, k, v, chosen, block_size=128)
    want = tile_attention_ref(q, k, v, chosen, block_size=128)
    torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)

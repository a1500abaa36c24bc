"""Attention that skips tiles: the kernels against the definition, the definition against loops."""

import math

import pytest
import torch
from compressor_kernels.attention.head_attention import full_decode_ref
from compressor_kernels.attention.skip_softmax import (
    SkipTiles,
    skip_decode,
    skip_prefill,
    skip_softmax_ref,
    tile_gaps_ref,
    visited_tiles,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def sinking(groups: int, tokens: int, dim: int, dtype: torch.dtype = torch.float16):
    """Queries that attend to a first key most of all, so that later tiles are skipped."""
    q, k, v = (randn(2, n, tokens, dim, dtype=dtype) for n in (2 * groups, groups, groups))
    q[..., 0] = 9.0
    k[:, :, 0, 0] = 9.0
    return q, k, v


@pytest.mark.parametrize(("q_len", "k_len"), [(90, 90), (33, 97), (16, 64)])
def test_prefill(q_len, k_len):
    torch.manual_seed(0)
    q, k, v = sinking(2, k_len, 24)
    where = {"threshold": 0.01, "scale": 0.3}
    done = skip_prefill(q[:, :, -q_len:], k, v, **where, tiles=SkipTiles(rows=16, keys=16))
    want = skip_softmax_ref(q[:, :, -q_len:], k, v, **where, rows=16, keys=16)
    assert torch.equal(done.tiles, want.tiles)
    assert 0.2 < (want.tiles == 1).sum() / (want.tiles >= 0).sum() < 0.95
    torch.testing.assert_close(done.out, want.out, atol=4e-3, rtol=4e-3)


def test_decode():
    torch.manual_seed(1)
    q, k, v = sinking(2, 300, 24)
    q = q[:, :, :1]
    done = skip_decode(q, k, v, threshold=0.01, tiles=SkipTiles(keys=16))
    assert done.splits > 1
    where = {"rows": 1, "keys": 16, "packed": True, "splits": done.splits}
    want = skip_softmax_ref(q, k, v, threshold=0.01, **where)
    assert torch.equal(done.tiles, want.tiles) and bool((want.tiles == 1).any())
    torch.testing.assert_close(done.out, want.out, atol=4e-3, rtol=4e-3)
    lengths = torch.tensor([300, 41], dtype=torch.int32, device=DEVICE)
    tiny = torch.tensor([1e-30, 1e-30])  # nothing is skipped
    done = skip_decode(q, k, v, threshold=tiny, lengths=lengths, tiles=SkipTiles(keys=16))
    want = full_decode_ref(q, k, v, lengths=lengths)
    torch.testing.assert_close(done.out, want, atol=4e-3, rtol=4e-3)
    assert (done.tiles[1, 0, 0] == 0).sum() == 3 and not bool((done.tiles == 1).any())


def test_gaps_by_a_loop():
    torch.manual_seed(2)
    q, k = torch.randn(1, 1, 10, 4).double(), torch.randn(1, 1, 13, 4).double()
    gaps = tile_gaps_ref(q, k, rows=4, keys=4, scale=0.5)
    for i in range(3):
        for j in range(4):
            worst = -math.inf
            for row in range(4 * i, min(4 * i + 4, 10)):
                scores = [0.5 * float(q[0, 0, row] @ k[0, 0, key]) for key in range(row + 4)]
                mine = scores[4 * j : 4 * j + 4]
                if mine:
                    worst = max(worst, max(mine) - max(scores[: 4 * j], default=-math.inf))
            assert gaps[0, 0, i, j] == pytest.approx(worst)
            assert visited_tiles(10, 13, rows=4, keys=4)[i, j] or worst == -math.inf


@pytest.mark.gpu
def test_published_shapes_on_a_device():
    torch.manual_seed(3)
    q, k, v = sinking(2, 4100, 128, torch.bfloat16)
    done = skip_prefill(q, k, v, threshold=0.001, scale=0.2)
    want = skip_softmax_ref(q, k, v, threshold=0.001, scale=0.2, rows=128, keys=128)
    assert (done.tiles != want.tiles).float().mean() < 0.01  # a gap may lie at the threshold
    torch.testing.assert_close(done.out, want.out, atol=2e-2, rtol=2e-2)
    done = skip_decode(q[:, :, -1:], k, v, threshold=0.001, scale=0.2)
    where = {"rows": 1, "keys": 128, "packed": True, "splits": done.splits}
    want = skip_softmax_ref(q[:, :, -1:], k, v, threshold=0.001, scale=0.2, **where)
    torch.testing.assert_close(done.out, want.out, atol=2e-2, rtol=2e-2)

"""Decoding over chosen pages: beside streaming heads, from quantized caches, and their choice."""

import pytest
import torch
from compressor_kernels.attention.block_pages import (
    page_bounds,
    page_bounds_ref,
    page_scores,
    page_scores_ref,
)
from compressor_kernels.attention.head_attention import (
    DecodeTiles,
    full_decode_ref,
    head_decode,
    head_decode_ref,
)
from compressor_kernels.attention.quantized_cache import (
    kv4_decode,
    kv4_decode_ref,
    kv8_decode,
    kv8_decode_ref,
    quantize_kv4,
    quantize_kv8,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def pages() -> torch.Tensor:
    """Of 2 texts and 2 KV heads, at most 9 of 10 pages; the last has 5 keys."""
    rows = [[0, 3, 4, 9, -1, -1], [1, 9, -1, -1, -1, -1], [0, 1, 2, 5, 7, 9], [9] + [-1] * 5]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE).view(2, 2, 6)


def test_pages_beside_streaming_heads():
    torch.manual_seed(0)
    q, k, v = randn(2, 6, 1, 24), randn(2, 2, 149, 24), randn(2, 2, 149, 24)
    near = [randn(2, 1, 33, 24) for _ in range(2)]
    where = {
        "order": torch.tensor([0, 2, 1], dtype=torch.int32, device=DEVICE),
        "blocks": pages(),
        "block_size": PAGE,
    }
    tiles = DecodeTiles(block_n=PAGE)
    out = head_decode(q, k, v, *near, **where, tiles=tiles)
    want = head_decode_ref(q, k, v, *near, **where)
    torch.testing.assert_close(out, want, atol=4e-3, rtol=4e-3)
    keys = [*range(16), *range(48, 80), *range(144, 149)]
    plain = full_decode_ref(q[:1, :2], k[:1, :1, keys], v[:1, :1, keys])
    torch.testing.assert_close(out[:1, :2], plain, atol=4e-3, rtol=4e-3)
    with pytest.raises(ValueError, match="do not fit"):
        head_decode(q, k, v, *near, **where)  # tiles of 64 keys


def test_pages_of_quantized_caches():
    torch.manual_seed(1)
    q, k, v = randn(2, 4, 1, 32), randn(2, 2, 149, 32), randn(2, 2, 149, 32)
    where = {"blocks": pages(), "block_size": PAGE}
    scale = torch.tensor([0.04])
    codes = [quantize_kv8(x, scale, dtype=torch.int8) for x in (k, v)]
    scales = {"k_scale": scale, "v_scale": scale}
    out = kv8_decode(q, *codes, **scales, **where, tiles=DecodeTiles(block_n=16))
    want = kv8_decode_ref(q, *codes, **scales, **where)
    torch.testing.assert_close(out, want, atol=4e-3, rtol=4e-3)
    (k4, k_params), (v4, v_params) = quantize_kv4(k), quantize_kv4(v)
    params = {"k_params": k_params, "v_params": v_params}
    out = kv4_decode(q, k4, v4, **params, **where)
    want = kv4_decode_ref(q, k4, v4, **params, **where)
    torch.testing.assert_close(out, want, atol=4e-3, rtol=4e-3)
    assert not torch.allclose(want, kv4_decode_ref(q, k4, v4, **params), atol=1e-2)


@pytest.mark.parametrize("group_max", [False, True])
def test_a_page_is_worth_its_best_logical_page(group_max):
    torch.manual_seed(2)
    q, k = randn(2, 4, 1, 24), randn(2, 2, 149, 24)
    bounds = page_bounds(k, page_size=4)
    where = {"group_max": group_max, "per_page": 4}
    scores = page_scores(q, *bounds, **where)
    want = page_scores_ref(q, *page_bounds_ref(k, page_size=4), **where)
    assert scores.shape[-1] == 10
    torch.testing.assert_close(scores, want, atol=1e-2, rtol=1e-2)
    logical = page_scores_ref(q, *bounds, group_max=group_max)
    torch.testing.assert_close(want[..., 0], logical[..., :4].amax(-1))
    torch.testing.assert_close(want[..., 9], logical[..., 36:].amax(-1))
    soft = page_scores_ref(q, *bounds, **where, soft=0.1)
    torch.testing.assert_close(soft[..., 0], (logical[..., :4] * 0.1).exp().sum(-1).log() * 10)
    torch.testing.assert_close(
        page_scores(q, *bounds, **where, soft=0.1), soft, atol=1e-2, rtol=1e-2
    )
    with pytest.raises(ValueError, match="positive"):
        page_scores_ref(q, *bounds, **where, soft=0.0)


@pytest.mark.gpu
def test_published_shapes_on_a_device():
    torch.manual_seed(3)
    q, k, v = (
        randn(2, n, t, 128, dtype=torch.bfloat16) for n, t in ((32, 1), (8, 20011), (8, 20011))
    )
    near = [randn(2, 0, 300, 128, dtype=torch.bfloat16) for _ in range(2)]
    order = torch.arange(8, dtype=torch.int32, device=DEVICE)
    blocks = torch.stack([torch.randperm(313, device=DEVICE)[:64].sort().values for _ in range(16)])
    where = {"order": order, "blocks": blocks.int().view(2, 8, 64), "block_size": 64}
    out = head_decode(q, k, v, *near, **where)
    torch.testing.assert_close(out, head_decode_ref(q, k, v, *near, **where), atol=2e-2, rtol=2e-2)

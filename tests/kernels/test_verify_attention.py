"""Verification that leaves shares of keys behind, and draft steps over chosen keys."""

import pytest
import torch
from compressor_kernels.attention.block_attention import block_attention, block_attention_ref
from compressor_kernels.attention.head_attention import full_decode_ref, head_prefill_ref
from compressor_kernels.attention.verify_attention import (
    critical_keys,
    critical_keys_ref,
    key_shares,
    key_shares_ref,
    verify_attention,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(q, k, v, atol):
    done = verify_attention(q, k, v)
    full = torch.zeros(k.shape[1], dtype=torch.bool, device=DEVICE)
    want = head_prefill_ref(q, k, v, streaming=full, sink=0, window=1)
    torch.testing.assert_close(done.out, want, atol=atol, rtol=atol)
    shares = key_shares(done)
    torch.testing.assert_close(shares, key_shares_ref(q, k), atol=1e-3, rtol=2e-2)
    return shares


@pytest.mark.parametrize(("q_len", "tokens"), [(5, 333), (9, 40), (1, 70)])
def test_shares(q_len, tokens):
    torch.manual_seed(0)
    q, k, v = randn(2, 4, q_len, 24), randn(2, 2, tokens, 24), randn(2, 2, tokens, 24)
    shares = check(q, k, v, 4e-3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 2, device=DEVICE), atol=1e-3, rtol=0)


def test_a_draft_step_reads_the_critical_keys():
    torch.manual_seed(1)
    q, k, v = randn(1, 4, 1, 24), randn(1, 2, 200, 24), randn(1, 2, 200, 24)
    keys = critical_keys_ref(key_shares_ref(q, k), length=199, recent=3, budget=20)
    assert keys.shape == (1, 2, 20) and keys[0, 0, -3:].tolist() == [196, 197, 198]
    keys = torch.cat([keys, torch.full_like(keys[..., :1], 199)], -1)
    out = block_attention(q, k, v, keys[:, :, None], block_size=1)
    want = block_attention_ref(q, k, v, keys[:, :, None], block_size=1)
    torch.testing.assert_close(out, want, atol=4e-3, rtol=4e-3)
    at = keys[0, 0].long()
    plain = full_decode_ref(q[:, :2], k[:, :1, at], v[:, :1, at])
    torch.testing.assert_close(want[:, :2], plain, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("length", "recent", "budget"),
    [(199, 3, 20), (200, 10, 200), (200, 10, 5), (7, 9, 5), (150, 1, 2), (120, 0, 119)],
)
def test_critical_keys(length, recent, budget, monkeypatch):
    """Of shares as they come and of shares of which many are the same."""
    torch.manual_seed(3)
    monkeypatch.setattr("compressor_kernels.attention.verify_attention.PART", 32)
    some = torch.rand(2, 2, 200, device=DEVICE).pow(6) / 3
    for shares in (some, (some * 64).round() / 64, torch.zeros_like(some)):
        where = {"length": length, "recent": recent, "budget": budget}
        keys = critical_keys(shares, **where)
        assert torch.equal(keys, critical_keys_ref(shares, **where))


@pytest.mark.gpu
def test_published_shapes_on_a_device():
    torch.manual_seed(2)
    q, k, v = (
        randn(2, n, t, 128, dtype=torch.bfloat16) for n, t in ((32, 9), (8, 9011), (8, 9011))
    )
    shares = check(q, k, v, 2e-2)
    for where in (
        {"length": 9010, "recent": 10, "budget": 450},
        {"length": 9011, "recent": 11, "budget": 4000},
    ):
        assert torch.equal(critical_keys(shares, **where), critical_keys_ref(shares, **where))

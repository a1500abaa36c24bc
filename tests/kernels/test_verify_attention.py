"""Verification that leaves shares of keys behind, and draft steps over chosen keys."""

import pytest
import torch
from compressor_kernels.attention.block_attention import block_attention, block_attention_ref
from compressor_kernels.attention.head_attention import full_decode_ref, head_prefill_ref
from compressor_kernels.attention.verify_attention import (
    ChoiceTiles,
    critical_keys,
    critical_keys_ref,
    key_shares,
    key_shares_ref,
    verified_keys,
    verify_attention,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(q, k, v, atol, *, limit, kept=None):
    """The interpreter cuts bf16 off and loses E4M3's carry; few weights make a mean here."""
    done = verify_attention(q, k, v, kept=kept)
    full = torch.zeros(k.shape[1], dtype=torch.bool, device=DEVICE)
    want = head_prefill_ref(q, k, v, streaming=full, sink=0, window=1)
    torch.testing.assert_close(done.out, want, atol=atol, rtol=atol)
    shares = key_shares(done)
    want = key_shares_ref(q, k)
    error = ((shares.float() - want).norm() / want.norm()).item()
    assert error < limit
    return done, shares


@pytest.mark.parametrize("kept", [torch.float16, None])
@pytest.mark.parametrize(("q_len", "tokens"), [(5, 333), (9, 40), (1, 70)])
def test_shares(q_len, tokens, kept):
    torch.manual_seed(0)
    q, k, v = randn(2, 4, q_len, 24), randn(2, 2, tokens, 24), randn(2, 2, tokens, 24)
    done, shares = check(q, k, v, 4e-3, limit=8e-3 if kept else 6e-2, kept=kept)
    whole = torch.ones(2, 2, device=DEVICE)
    torch.testing.assert_close(shares.float().sum(-1), whole, atol=4e-2, rtol=0)
    where = {"length": tokens - 1, "recent": q_len, "budget": tokens // 3}
    assert torch.equal(verified_keys(done, **where), critical_keys_ref(shares, **where))


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


@pytest.mark.parametrize("seed", range(6))
def test_critical_keys(seed):
    """Of shares as they come, of shares of which many are the same or next to each other, of the
    least and the largest; odd lengths, parts that are not full, all keys, none."""
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(1, 260, (), generator=generator))
    some = torch.rand(1, 2, tokens, generator=generator).pow(6) / 3
    near = torch.randint(0x3700, 0x3704, some.shape, generator=generator, dtype=torch.int16)
    kinds = {
        "as they come": some.bfloat16(),
        "half precision": some.half(),
        "few values": ((some * 64).round() / 64).bfloat16(),
        "neighbours": near.view(torch.bfloat16),
        "none": torch.zeros_like(some).bfloat16(),
        "all or nothing": (some > 0.01).bfloat16(),
    }
    for at, (kind, shares) in enumerate(kinds.items()):
        shares = shares.to(DEVICE)
        length = int(torch.randint(0, tokens + 1, (), generator=generator)) if at else tokens
        recent, budget = torch.randint(0, tokens + 9, (2,), generator=generator).tolist()
        where = {"length": length, "recent": recent // (1 + at % 3), "budget": budget}
        keys = critical_keys(shares, **where, tiles=ChoiceTiles(part=32, num_warps=4))
        assert torch.equal(keys, critical_keys_ref(shares, **where)), (kind, where)


@pytest.mark.gpu
def test_published_shapes_on_a_device():
    torch.manual_seed(2)
    q, k, v = (
        randn(2, n, t, 128, dtype=torch.bfloat16) for n, t in ((32, 9), (8, 9011), (8, 9011))
    )
    done, shares = check(q, k, v, 2e-2, limit=1e-2)
    for where in (
        {"length": 9010, "recent": 10, "budget": 450},
        {"length": 9011, "recent": 11, "budget": 4000},
    ):
        want = critical_keys_ref(shares, **where)
        assert torch.equal(critical_keys(shares, **where), want)
        assert torch.equal(verified_keys(done, **where), want)

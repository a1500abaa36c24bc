"""SparseSpec: drafts over chosen keys, and the choice that a verification leaves."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup, different, first_rows, nbytes
from compressor_kernels.attention import verify_attention
from compressor_kernels.attention.block_attention import (
    BlockTiles,
    block_attention,
    block_attention_ref,
)
from compressor_kernels.attention.head_attention import (
    full_decode,
    full_decode_ref,
    head_prefill,
)
from torch import Tensor

VERIFIES = [
    verify_attention.VerifyTiles(*x)
    for x in ((64, 4, 2, 4), (32, 4, 2, 6), (32, 4, 3, 8), (32, 4, 4, 4), (16, 4, 4, 8))
]
SHARES = [
    verify_attention.ShareTiles(*x) for x in ((16, 2), (16, 4), (32, 2), (32, 8), (64, 4), (64, 8))
]
CHOICES = [
    verify_attention.ChoiceTiles(*x)
    for x in ((2048, 2), (2048, 4), (4096, 2), (4096, 8), (8192, 4), (8192, 8))
]
GATHERS = [
    BlockTiles(block_n, warps, stages, per_sm)
    for block_n, warps in ((16, 1), (16, 2), (32, 2), (32, 4))
    for stages, per_sm in ((4, 8), (5, 4), (5, 5), (5, 8), (7, 4), (7, 7))
]


def drafts(setup: Setup) -> Iterator[Case]:
    """SparseSpec: eight draft steps and the choice that they need, beside eight full steps."""
    batch, heads, groups, dim, tokens, stride = setup.pick(
        (8, 32, 8, 128, 65536, 8), (2, 4, 2, 32, 512, 2)
    )
    budget = tokens // 20
    q = setup.randn(batch, heads, stride + 1, dim)
    k, v = (setup.randn(batch, groups, tokens, dim) for _ in range(2))
    shape = f"{batch}x{heads}/{groups}x{tokens}"
    one = q[:, :, :1].contiguous()
    none = torch.zeros(groups, dtype=torch.bool, device=setup.device)
    done = verify_attention.verify_attention(q, k, v)

    # The token that is drafted, too, which is the last and newer than the choice.
    where = {"length": tokens, "recent": stride + 3, "budget": budget + 1}
    shares = verify_attention.key_shares(done)
    chosen = verify_attention.verified_keys(done, **where)[:, :, None]
    # Shares are read by two counts and by what takes the best of them.
    shares_moved = nbytes(done.kept, done.tops, shares)
    choice_moved = 3 * nbytes(shares) + nbytes(chosen)
    # Keys and values at chosen places.
    draft_moved = nbytes(chosen) * (1 + 2 * dim * k.element_size() // chosen.element_size())

    def round_of_drafts(i: int) -> Tensor:
        keys = verify_attention.verified_keys(done, **where)[:, :, None]
        for _ in range(stride):
            out = block_attention(one, k, v, keys, block_size=1)
        return out

    def full_steps(i: int) -> None:
        for _ in range(stride):
            full_decode(one, k, v)

    want = partial(block_attention_ref, one[:1], k[:1], v[:1], chosen[:1], block_size=1)
    case = partial(Case, shape=shape)
    yield case(
        f"SparseSpec, {stride} draft steps over {budget} keys and their choice",
        round_of_drafts,
        want,
        limit=6e-3,
        error=first_rows,
        moved=shares_moved + choice_moved + stride * draft_moved,
        peers={"as many full steps": Peer(full_steps)},
        targets={"as many full steps": 10.0},
        note=lambda: "the verification, which leaves its weights, is timed below",
    )
    yield case(
        "SparseSpec's choice alone, shares of keys included",
        lambda i: verify_attention.verified_keys(done, **where),
        lambda: verify_attention.critical_keys_ref(shares, **where),
        limit=0.0,
        error=lambda out, want: different([out], [want]),
        moved=shares_moved + choice_moved,
    )
    yield case(
        "SparseSpec's shares alone",
        lambda i, tiles=None: verify_attention.key_shares(done, tiles=tiles),
        lambda: verify_attention.key_shares_ref(q[:1], k[:1]),
        limit=setup.pick(1e-2, 6e-2),  # the interpreter loses E4M3's carry
        error=first_rows,
        moved=shares_moved,
        tiles=SHARES if not setup.tiny else (),
    )
    yield case(
        "SparseSpec's best keys alone",
        lambda i, tiles=None: verify_attention.critical_keys(shares, **where, tiles=tiles),
        lambda: verify_attention.critical_keys_ref(shares, **where),
        limit=0.0,
        error=lambda out, want: different([out], [want]),
        moved=choice_moved,
        tiles=CHOICES if not setup.tiny else (),
        peers={"by a sort": Peer(lambda i: verify_attention.critical_keys_ref(shares, **where))},
    )
    yield case(
        "SparseSpec, a draft step alone",
        lambda i, tiles=None: block_attention(one, k, v, chosen, block_size=1, tiles=tiles),
        want,
        limit=6e-3,
        error=first_rows,
        moved=draft_moved,
        peers={"our full decode": Peer(lambda i: full_decode(one, k, v))},
        tiles=GATHERS if not setup.tiny else (),
    )
    yield case(
        f"SparseSpec, verification of {stride + 1} tokens, which leaves its weights",
        lambda i, tiles=None: verify_attention.verify_attention(q, k, v, tiles=tiles).out,
        lambda: head_prefill(q, k, v, streaming=none, sink=0, window=1),
        limit=1e-2,
        moved=nbytes(k, v, done.kept, done.tops),
        tiles=VERIFIES if not setup.tiny else (),
        peers={"our full decode": Peer(lambda i: full_decode(one, k, v))},
    )
    yield case(
        "our full decode, beside SparseSpec",
        lambda i: full_decode(one, k, v),
        lambda: full_decode_ref(one[:1], k[:1], v[:1]),
        limit=1e-2,
        error=first_rows,
        moved=nbytes(k, v),
    )

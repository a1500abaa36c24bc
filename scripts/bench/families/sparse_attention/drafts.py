"""SparseSpec: drafts over chosen keys, and the choice that a verification leaves."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup, different, first_rows, nbytes
from compressor_kernels.attention import verify_attention as kernel
from compressor_kernels.attention.block_attention import block_attention, block_attention_ref
from compressor_kernels.attention.head_attention import full_decode_ref, head_prefill
from torch import Tensor


def drafts(setup: Setup) -> Iterator[Case]:
    """SparseSpec: eight draft steps and the choice that they need, beside eight full steps."""
    *sides, stride = setup.pick((8, 32, 8, 65536, 128, 8), (2, 4, 2, 512, 32, 2))
    groups, tokens, dim = sides[2:]
    budget = tokens // 20
    step = setup.heads(*sides)
    k, v = step.k, step.v
    q = setup.randn(sides[0], sides[1], stride + 1, dim)
    none = torch.zeros(groups, dtype=torch.bool, device=setup.device)
    done = kernel.verify_attention(q, k, v)

    # The token that is drafted, too, which is the last and newer than the choice.
    where = {"length": tokens, "recent": stride + 3, "budget": budget + 1}

    def choose() -> Tensor:
        return kernel.verified_keys(done, **where)

    def draft(keys: Tensor) -> Tensor:
        return block_attention(step.q, k, v, keys, block_size=1)

    def round_of_drafts(i: int) -> Tensor:
        keys = choose()[:, :, None]
        return [draft(keys) for _ in range(stride)][-1]

    def full_steps(i: int) -> None:
        for _ in range(stride):
            step.full.run(0)

    shares, chosen = kernel.key_shares(done), choose()[:, :, None]
    best = partial(kernel.critical_keys_ref, shares, **where)
    want = partial(block_attention_ref, *step.first, chosen[:1], block_size=1)
    # Shares are read by two counts and by what takes the best of them.
    shares_moved = nbytes(done.kept, done.tops, shares)
    choice_moved = 3 * nbytes(shares) + nbytes(chosen)
    # Keys and values at chosen places.
    draft_moved = nbytes(chosen) * (1 + 2 * dim * k.element_size() // chosen.element_size())
    case = partial(Case, shape=step.shape, limit=1e-2)
    same = partial(case, limit=0.0, error=different)
    first = partial(case, error=first_rows)
    ours = {"our full decode": step.full}
    yield first(
        f"SparseSpec, {stride} draft steps over {budget} keys and their choice",
        round_of_drafts,
        want,
        moved=shares_moved + choice_moved + stride * draft_moved,
        peers={"as many full steps": Peer(full_steps)},
        targets={"as many full steps": 10.0},
        note=lambda: "the verification, which leaves its weights, is timed below",
    )
    yield same(
        "SparseSpec's choice alone, shares of keys included",
        lambda i: choose(),
        best,
        moved=shares_moved + choice_moved,
    )
    yield first(
        "SparseSpec's shares alone",
        lambda i: kernel.key_shares(done),
        lambda: kernel.key_shares_ref(q[:1], k[:1]),
        limit=setup.pick(1e-2, 6e-2),  # the interpreter loses E4M3's carry
        moved=shares_moved,
    )
    yield same(
        "SparseSpec's best keys alone",
        lambda i: kernel.critical_keys(shares, **where),
        best,
        moved=choice_moved,
        peers={"by a sort": Peer(lambda i: best())},
    )
    yield first(
        "SparseSpec, a draft step alone",
        lambda i: draft(chosen),
        want,
        moved=draft_moved,
        peers=ours,
    )
    yield case(
        f"SparseSpec, verification of {stride + 1} tokens, which leaves its weights",
        lambda i: kernel.verify_attention(q, k, v).out,
        lambda: head_prefill(q, k, v, streaming=none, sink=0, window=1),
        moved=nbytes(k, v, done.kept, done.tops),
        peers=ours,
    )
    yield first(
        "our full decode, beside SparseSpec",
        step.full.run,
        lambda: full_decode_ref(*step.first),
        moved=nbytes(k, v),
    )

"""Block selection and the forecast's loss against vectors of the published implementations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from compressor_kernels.block_attention import block_attention_ref
from compressor_kernels.block_memory import memory_blocks, represent_blocks
from compressor_kernels.block_pages import page_bounds_ref, page_scores_ref
from compressor_kernels.block_selection import BlockRule, top_blocks_ref
from compressor_kernels.block_windows import (
    WindowRule,
    compress_keys_ref,
    forecast_scores_ref,
    pool_windows_ref,
)
from torch import Tensor

from compressor.numerics.forecast_loss import (
    aligned_shares,
    bucketed_kl,
    chosen_by,
    student_shares,
    teacher_shares,
)
from tests.golden_files import vectors

RULE = BlockRule(block_size=16, init_blocks=1, local_blocks=1, top_k=4)
DEPLOYED, FINE = WindowRule(kernel_size=8, stride=4), WindowRule(kernel_size=2, stride=1)


def by_head(x: Tensor) -> Tensor:
    """[T, heads, D] as [1, heads, T, D]."""
    return x.transpose(0, 1)[None]


def fewer(ours: Tensor, theirs: Tensor, scores: Tensor) -> list[int]:
    """How many blocks less than we the reference chose, query by query; no other difference.

    Neighbouring blocks that share their best window tie: scores are compared, not blocks.
    """
    found = []
    for mine, other, score in zip(
        ours.flatten(0, 2), theirs.flatten(0, 1), scores.flatten(0, 2), strict=True
    ):
        gained = Counter(score[mine[mine >= 0].long()].tolist())
        gained.subtract(score[other[other >= 0].long()].tolist())
        assert min(gained.values()) >= 0
        found.append(gained.total())
    return found


@pytest.mark.parametrize(("name", "pooling"), [("fine_teacher", "max"), ("mean_pool", "mean")])
def test_forecast_loss(name: str, pooling: str) -> None:
    golden = vectors(f"attention/sparda_kl_{name}")
    q, k = by_head(golden["q"]), by_head(golden["k"])
    forecast = golden["forecast_q"].transpose(1, 2).clone().requires_grad_()
    where = {"tokens": 160, "behind": 0}
    keys = compress_keys_ref(k, DEPLOYED)
    torch.testing.assert_close(keys, by_head(golden["compressed_k"]), atol=1e-6, rtol=1e-5)
    fine = compress_keys_ref(k, FINE)
    torch.testing.assert_close(fine, by_head(golden["teacher_k"]), atol=1e-6, rtol=1e-5)
    shares = teacher_shares(q, fine, FINE, **where, scale=16**-0.5)
    teacher = aligned_shares(shares, FINE, DEPLOYED, tokens=160, pooling=pooling)
    aligned = golden["aligned_teacher_probs"]  # before its rows are made to sum to 1
    exact = aligned / (aligned.sum(-1, keepdim=True) + 1e-8)
    torch.testing.assert_close(teacher[0], exact, atol=1e-5, rtol=1e-4)
    blocks = chosen_by(teacher, RULE, DEPLOYED, **where)
    # The reference lets the block after a query's own compete where the pooling carries share into
    # it, and drops it afterwards: such a query gets a block less.
    scores = pool_windows_ref(teacher, RULE, DEPLOYED, tokens=160, empty=0.0)
    assert set(fewer(blocks, golden["topk_idx"], scores)) == {0, 1}
    student = student_shares(forecast, keys, DEPLOYED, **where)
    theirs = golden["topk_idx"][None]
    loss = bucketed_kl(exact[None], student, theirs, RULE, DEPLOYED, **where).mean()
    loss.backward()
    torch.testing.assert_close(loss[None], golden["kl_loss"], rtol=1e-3, atol=1e-6)
    gradient = forecast.grad.transpose(1, 2)
    torch.testing.assert_close(gradient, golden["forecast_grad"], rtol=1e-3, atol=1e-7)


def test_forecast_selection() -> None:
    golden = vectors("attention/sparda_infer_topk")
    forecast, k = by_head(golden["forecast_q"]), by_head(golden["k"])
    keys = compress_keys_ref(k, DEPLOYED)
    torch.testing.assert_close(keys, by_head(golden["compressed_k"]), atol=1e-6, rtol=1e-5)
    scores = forecast_scores_ref(forecast, keys, RULE, DEPLOYED, tokens=160)
    # The reference rounds scores to bfloat16 before it pools them; so do we to compare choices.
    rounded = golden["raw_scores"][None].bfloat16().float()
    pooled = pool_windows_ref(rounded, RULE, DEPLOYED, tokens=160)
    seen = torch.isfinite(pooled)
    torch.testing.assert_close(scores[seen], pooled[seen], atol=0.05, rtol=1e-2)
    blocks = top_blocks_ref(pooled, RULE, tokens=160)
    assert set(fewer(blocks, golden["topk_idx"], pooled)) == {0, 1}


@pytest.mark.parametrize(("name", "budget"), [("aligned", 3), ("unaligned", 4)])
def test_quest_pages(name: str, budget: int) -> None:
    golden = vectors(f"attention/quest_pages_{name}")
    q, k, v = (by_head(golden[x]) for x in ("q", "k", "v"))
    low, high = page_bounds_ref(k, page_size=16)
    torch.testing.assert_close(low[0].transpose(0, 1), golden["page_min"])
    torch.testing.assert_close(high[0].transpose(0, 1), golden["page_max"])
    scores = page_scores_ref(q, low, high)
    torch.testing.assert_close(
        scores[0, :, 0, :-1], golden["scores_without_last"], atol=1e-5, rtol=1e-4
    )
    rule = BlockRule(block_size=16, init_blocks=0, local_blocks=0, top_k=budget)
    pages = top_blocks_ref(scores, rule, tokens=k.shape[2])
    for ours, theirs in zip(pages[0, :, 0].tolist(), golden["topk_pages"].tolist(), strict=True):
        assert ours == sorted([*theirs, 7])
    out = block_attention_ref(q, k, v, pages, block_size=16)
    torch.testing.assert_close(out[0, :, 0][None], golden["out"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget", [64, 16])
def test_quest_as_its_evaluation_chooses(budget: int) -> None:
    golden = vectors("attention/quest_eval_token_mask")
    q, k = golden["q"], golden["k"]
    scores = page_scores_ref(q, *page_bounds_ref(k, page_size=16))
    by_token = scores.repeat_interleave(16, -1)[..., :117]
    torch.testing.assert_close(by_token, golden["page_bound_per_token"], atol=1e-5, rtol=1e-4)
    rule = BlockRule(
        block_size=16,
        init_blocks=0,
        local_blocks=0,
        top_k=max(3, budget // 16),
        own_block=False,
    )
    pages = top_blocks_ref(scores, rule, tokens=117)
    chosen = torch.zeros(4, 8, dtype=torch.bool)
    chosen.scatter_(-1, pages[0, :, 0].long(), True)
    want = golden[f"mask_budget{budget}"][0, :, 0].bool()
    assert torch.equal(chosen.repeat_interleave(16, -1)[:, :117], want)


def test_infllm_memory() -> None:
    golden = vectors("attention/infllm_repr_and_topk")
    ours = represent_blocks(golden["block_keys"], golden["local_scores"], tokens=4)
    torch.testing.assert_close(ours, golden["block_repr"], atol=1e-5, rtol=1e-4)
    chosen = memory_blocks(golden["global_q"][0], ours, piece=8, top_k=2)
    assert torch.equal(chosen, golden["topk_block_ids"].sort(-1).values)

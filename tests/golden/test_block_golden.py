"""Block selection and the forecast's loss against vectors of the published implementations."""

import pytest
import torch
from compressor_kernels.attention.block_attention import block_attention_ref
from compressor_kernels.attention.block_memory import memory_blocks, represent_blocks
from compressor_kernels.attention.block_pages import page_bounds_ref, page_scores_ref
from compressor_kernels.attention.block_selection import BlockRule, top_blocks_ref
from compressor_kernels.attention.block_windows import (
    WindowRule,
    compress_keys_ref,
    forecast_scores_ref,
    pool_windows_ref,
)
from torch import Tensor

from compressor.attention.masked import OwnAttention
from compressor.attention.rule import RuleCall
from compressor.attention.rules.forecast import ForecastBlocks
from compressor.attention.rules.quest import QuestPages
from compressor.numerics.forecast_loss import (
    aligned_shares,
    bucketed_kl,
    chosen_by,
    student_shares,
    teacher_shares,
)
from tests.support.golden_files import vectors

RULE = BlockRule(block_size=16, init_blocks=1, local_blocks=1, top_k=4)
DEPLOYED, FINE = WindowRule(kernel_size=8, stride=4), WindowRule(kernel_size=2, stride=1)


def by_head(x: Tensor) -> Tensor:
    """[T, heads, D] as [1, heads, T, D]."""
    return x.transpose(0, 1)[None]


def assert_chosen(theirs: Tensor, scores: Tensor) -> None:
    """The reference's blocks [heads, T, K] of pooled scores [1, heads, T, blocks].

    It lets the block after a query's own, into which a window of the query's block reaches, compete
    and drops it afterwards: where that block is among the best such a query has a block less, the
    worst of ours. Nothing else may differ. Blocks that share their best window tie: scores are
    compared, not blocks.
    """
    ours = top_blocks_ref(scores, RULE, tokens=scores.shape[2])
    for mine, other, score, position in zip(
        ours.flatten(0, 2),
        theirs.flatten(0, 1),
        scores.flatten(0, 2),
        list(range(scores.shape[2])) * scores.shape[1],
        strict=True,
    ):
        own = position // RULE.block_size
        forced = torch.arange(len(score))
        forced = (forced < RULE.init_blocks) | (forced >= own - RULE.local_blocks)
        ranked = score.masked_fill(forced, torch.inf)
        best = sorted(ranked[mine[mine >= 0].long()].tolist())
        found = sorted(ranked[other[other >= 0].long()].tolist())
        rival = score[own + 1].item() if own + 1 < len(score) else -torch.inf
        if len(best) == RULE.top_k and rival > best[0]:
            best = best[1:]
        # Where the rival equals the worst of ours, which of them is kept is left to the sort.
        may_tie = len(best) == RULE.top_k and rival == best[0]
        assert found == best or (may_tie and found == best[1:]), position


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
    scores = pool_windows_ref(teacher, RULE, DEPLOYED, tokens=160, empty=0.0)
    assert torch.equal(blocks, top_blocks_ref(scores, RULE, tokens=160))
    # The reference rounds shares to bfloat16 before it pools them; so do we to compare choices.
    rounded = exact[None].bfloat16().float()
    assert_chosen(
        golden["topk_idx"], pool_windows_ref(rounded, RULE, DEPLOYED, tokens=160, empty=0.0)
    )
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
    assert_chosen(golden["topk_idx"], pooled)
    rule = ForecastBlocks(
        block_size=16, kernel_size=8, stride=4, init_blocks=1, local_blocks=1, top_k=4
    )
    call = RuleCall(forecast, k, torch.arange(160), 16**-0.5, forecast)
    assert torch.equal(rule.choose(call), top_blocks_ref(scores, RULE, tokens=160))


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
    quest = QuestPages(block_size=16, init_blocks=0, local_blocks=0, top_k=budget, per="query_head")
    scaling = q.shape[-1] ** -0.5
    call = RuleCall(q, k, torch.arange(k.shape[2]), scaling)
    assert torch.equal(quest.choose(call), pages)
    attended = quest.attend(call, v, OwnAttention(scaling=scaling))
    torch.testing.assert_close(attended[0, :, 0][None], golden["out"], atol=1e-5, rtol=1e-4)


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

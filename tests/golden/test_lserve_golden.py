"""LServe's choice of pages over the steps of a decoding loop."""

import torch
from compressor_kernels.attention.block_attention import block_attention_ref
from compressor_kernels.attention.block_pages import page_bounds_ref, page_scores_ref
from compressor_kernels.attention.head_attention import full_decode_ref

from compressor.attention.rule import RuleCall
from compressor.attention.rules.lserve import LServePages
from tests.support.golden_files import vectors

RULE = LServePages(
    block_size=16, logical=4, top_k=4, reuse=4, init_blocks=0, local_blocks=0, per="query_head"
)


def test_a_decoding_loop() -> None:
    golden = vectors("systems/lserve_decode_loop")
    q, k, v = (golden[x].float().transpose(0, 1)[None] for x in "qkv")
    paged = [0, 1, 4, 5]  # KV head 1 streams
    low, high = page_bounds_ref(k[:, :, :150].half(), page_size=4)
    assert torch.equal(low[0].transpose(0, 1), golden["final_logical_min"])
    assert torch.equal(high[0].transpose(0, 1), golden["final_logical_max"])
    memory: dict[str, torch.Tensor] = {}
    for step, t in enumerate(range(118, 150)):
        query, key, value = q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]
        mine, held = query[:, paged], key[:, [0, 2]]
        call = RuleCall(mine, held, torch.arange(t + 1), 0.25, memory=memory)
        pages = RULE.choose(call)
        for head, row in zip(paged, pages[0, :, 0].tolist(), strict=True):
            # The page being written is read beside the list, which the vectors do not show.
            want = {int(x) for x in golden["pages_used"][step, head] if x >= 0} | {t // 16}
            assert {x for x in row if x >= 0} == want, (t, head)
        out = block_attention_ref(mine, held, value[:, [0, 2]], pages, block_size=16)
        torch.testing.assert_close(out[0, :, 0], golden["out"][step, paged], atol=1e-5, rtol=1e-4)
        if f"t{t}.physical_scores_fp32" in golden:
            bounds = page_bounds_ref(k[:, :, :t], page_size=4)
            scores = page_scores_ref(query, *bounds, per_page=4)[0, :, 0]
            want = golden[f"t{t}.physical_scores_fp32"]
            torch.testing.assert_close(scores[:, :-1], want[:, :-1], atol=1e-5, rtol=1e-4)
        near = [*range(16), *range(t - 31, t + 1)]
        out = full_decode_ref(query[:, 2:4], key[:, 1:2, near], value[:, 1:2, near])
        torch.testing.assert_close(out[0, :, 0], golden["out"][step, 2:4], atol=1e-5, rtol=1e-4)


def test_one_choice() -> None:
    golden = vectors("attention/lserve_hierarchical_select")
    q, k = golden["q"][None, :, None], golden["k"].transpose(0, 1)[None]
    scores = page_scores_ref(q, *page_bounds_ref(k, page_size=8), per_page=4)[0, :, 0]
    torch.testing.assert_close(
        scores[:, :-1], golden["physical_scores"][:, :-1], atol=1e-5, rtol=1e-4
    )
    rule = RULE.model_copy(update={"block_size": 32, "logical": 8})
    more = torch.cat([k, k[:, :, :1]], 2)  # the step's own token
    pages = rule.choose(RuleCall(q, more, torch.arange(334), 0.25))[0, :, 0]
    for mine, theirs in zip(pages.tolist(), golden["selected_pages"].tolist(), strict=True):
        assert {x for x in mine if x >= 0} == set(theirs)

"""Block selection: kernels against their references, references against the definition."""

import pytest
import torch
from compressor_kernels.attention.block_memory import memory_blocks, represent_blocks
from compressor_kernels.attention.block_pages import (
    page_bounds,
    page_bounds_ref,
    page_scores,
    page_scores_ref,
)
from compressor_kernels.attention.block_selection import BlockRule, top_blocks, top_blocks_ref
from compressor_kernels.attention.block_windows import (
    WindowRule,
    attention_blocks,
    attention_scores,
    attention_scores_ref,
    compress_keys,
    compress_keys_ref,
    forecast_blocks,
    forecast_scores,
    forecast_scores_ref,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULE = BlockRule(block_size=16, init_blocks=1, local_blocks=2, top_k=6)
WINDOWS = WindowRule(kernel_size=8, stride=4)


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def past(scores: torch.Tensor, rule: BlockRule, tokens: int, lengths=None, behind=0):
    """Scores with everything replaced that the selection must not read."""
    batch, _, q_len, blocks = scores.shape
    length = torch.full((batch,), tokens) if lengths is None else lengths.cpu()
    position = length[:, None] - behind - q_len + torch.arange(q_len)
    future = torch.arange(blocks) > (position // rule.block_size)[..., None]
    return scores.masked_fill(future[:, None].to(scores.device), 0.0)


@pytest.mark.parametrize("tokens", [7, 8, 100, 301])
@pytest.mark.parametrize("dim", [64, 48])
def test_compressed_keys_are_means_of_full_windows(tokens, dim):
    torch.manual_seed(0)
    k = randn(2, tokens, 3, dim).transpose(1, 2)
    out = compress_keys(k, WINDOWS)
    assert out.shape == (2, 3, max(0, (tokens - 8) // 4 + 1), dim)
    torch.testing.assert_close(out, compress_keys_ref(k, WINDOWS), atol=2e-3, rtol=2e-3)
    for j in range(0, out.shape[2], 17):
        want = k[:, :, 4 * j : 4 * j + 8].double().mean(2)
        torch.testing.assert_close(out[:, :, j].double(), want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("tokens", "q_len", "behind", "lengths"),
    [
        (301, 1, 0, None),
        (301, 1, 0, [301, 37]),
        (290, 1, 0, [9, 3]),  # no window at all in the second row
        (200, 20, 30, None),  # a piece from the middle of a prompt
        (70, 35, 0, None),
        (150, 9, 0, [150, 88]),
        (5, 5, 0, None),
    ],
)
@pytest.mark.parametrize("scorer", ["forecast", "attention"])
def test_scores(scorer, tokens, q_len, behind, lengths):
    torch.manual_seed(1)
    groups, dim = 2, 64
    heads = groups if scorer == "forecast" else 3 * groups
    score, reference = {
        "forecast": (forecast_scores, forecast_scores_ref),
        "attention": (attention_scores, attention_scores_ref),
    }[scorer]
    q = randn(2, heads, q_len, dim)
    compressed = compress_keys_ref(randn(2, groups, tokens + 40, dim), WINDOWS)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    where = {"tokens": tokens, "lengths": lengths, "behind": behind}
    out = past(score(q, compressed, RULE, WINDOWS, **where), RULE, **where)
    want = past(reference(q, compressed, RULE, WINDOWS, **where), RULE, **where)
    assert out.shape == (2, groups, q_len, RULE.blocks(tokens))
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)


def test_forecast_score_is_the_best_window_that_touches_a_block():
    torch.manual_seed(2)
    tokens, dim = 103, 16
    forecast, k = randn(1, 1, tokens, dim).double(), randn(1, 1, tokens, dim).double()
    compressed = compress_keys_ref(k, WINDOWS)
    out = forecast_scores_ref(forecast, compressed, RULE, WINDOWS, tokens=tokens)
    for i in range(0, tokens, 9):
        for block in range(i // 16 + 1):
            touching = [
                (forecast[0, 0, i] @ compressed[0, 0, j]).item()
                for j in range(compressed.shape[2])
                if 4 * j <= i and 4 * j < 16 * block + 16 and 4 * j + 8 > 16 * block
            ]
            assert out[0, 0, i, block].item() == pytest.approx(max(touching, default=-float("inf")))


def test_attention_score_is_the_best_share_of_finished_windows():
    torch.manual_seed(3)
    tokens, dim = 70, 16
    q, k = randn(1, 2, tokens, dim).double(), randn(1, 1, tokens, dim).double()
    compressed = compress_keys_ref(k, WINDOWS)[0, 0]
    out = attention_scores_ref(q, compressed[None, None], RULE, WINDOWS, tokens=tokens)
    for i in range(0, tokens, 7):
        n = max(0, (i + 1 - 8) // 4 + 1)
        shares = sum(torch.softmax(compressed[:n] @ q[0, h, i] / 4.0, 0) for h in range(2))
        for block in range(i // 16 + 1):
            touching = [
                shares[j].item()
                for j in range(n)
                if 4 * j < 16 * block + 16 and 4 * j + 8 > 16 * block
            ]
            assert out[0, 0, i, block].item() == pytest.approx(max(touching, default=0.0))


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        BlockRule(block_size=16, init_blocks=0, local_blocks=0, top_k=3),
        BlockRule(block_size=16, init_blocks=0, local_blocks=0, top_k=3, own_block=False),
        BlockRule(block_size=16, init_blocks=2, local_blocks=3, top_k=6),  # forced blocks alone
        BlockRule(block_size=16, init_blocks=1, local_blocks=0, top_k=500),  # more than there are
    ],
)
@pytest.mark.parametrize(
    ("tokens", "q_len", "behind", "lengths"),
    [
        (530, 1, 0, [530, 20]),
        (530, 2, 100, None),
        (40, 3, 5, None),
        (1, 1, 0, None),
    ],
)
def test_top_blocks(rule, tokens, q_len, behind, lengths):
    torch.manual_seed(4)
    # Few distinct values: most choices at the cut are ties. Some are -inf, 0 or -0.
    shape = (1 if lengths is None else 2, 2, q_len, rule.blocks(tokens))
    scores = torch.randint(-3, 4, shape, device=DEVICE).float()
    scores = torch.where(scores == -3, -torch.inf, scores) * 0.1
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    where = {"tokens": tokens, "lengths": lengths, "behind": behind}
    out = top_blocks(scores, rule, **where)
    assert torch.equal(out, top_blocks_ref(scores, rule, **where))
    blind = scores.clone()  # nothing of a future block may be read
    blind[past(torch.ones_like(scores), rule, **where) == 0] = torch.nan
    assert torch.equal(out, top_blocks(blind, rule, **where))


def test_top_blocks_by_the_definition():
    torch.manual_seed(5)
    rule, tokens = RULE, 200
    scores = torch.randn(1, 1, tokens, rule.blocks(tokens))
    chosen = top_blocks_ref(scores, rule, tokens=tokens)[0, 0].tolist()
    for i in range(0, tokens, 13):
        own = i // 16
        forced = {b for b in range(own + 1) if b < 1 or b >= own - 2}
        others = sorted(set(range(own + 1)) - forced, key=lambda b: -scores[0, 0, i, b].item())
        want = sorted(forced | set(others[: rule.top_k - len(forced)]))
        assert chosen[i] == want + [-1] * (rule.top_k - len(want))


def test_a_prompt_in_pieces_chooses_what_it_chooses_at_once(monkeypatch):
    torch.manual_seed(6)
    tokens, dim = 220, 64
    q, k = randn(1, 2, 7, dim), randn(1, 1, tokens, dim)
    compressed = compress_keys(k, WINDOWS)
    whole_forecast = forecast_blocks(q[:, :1], compressed, RULE, WINDOWS, tokens=tokens)
    whole_attention = attention_blocks(q, compressed, RULE, WINDOWS, tokens=tokens)
    monkeypatch.setattr("compressor_kernels.attention.block_windows.PIECE_BYTES", 1)
    monkeypatch.setattr("compressor_kernels.attention.block_windows.PIECE_TOKENS", 3)
    in_pieces = forecast_blocks(q[:, :1], compressed, RULE, WINDOWS, tokens=tokens)
    assert torch.equal(in_pieces, whole_forecast)
    in_pieces = attention_blocks(q, compressed, RULE, WINDOWS, tokens=tokens)
    assert torch.equal(in_pieces, whole_attention)
    want = forecast_scores_ref(q[:, :1], compressed, RULE, WINDOWS, tokens=tokens)
    same = whole_forecast == top_blocks_ref(want, RULE, tokens=tokens)
    assert same.float().mean() > 0.99  # but for near ties, which fp16 products may break


def test_decoding_chooses_what_the_last_row_of_a_prompt_does():
    torch.manual_seed(7)
    tokens, dim = 230, 64
    q, k = randn(1, 4, 3, dim), randn(1, 2, tokens, dim)
    compressed = compress_keys(k, WINDOWS)
    for choose, queries in ((forecast_blocks, q[:, :2]), (attention_blocks, q)):
        whole = choose(queries, compressed, RULE, WINDOWS, tokens=tokens)
        last = choose(queries[:, :, -1:], compressed, RULE, WINDOWS, tokens=tokens)
        assert torch.equal(last, whole[:, :, -1:])


@pytest.mark.parametrize(("tokens", "lengths"), [(117, None), (128, [128, 50]), (5, None)])
def test_page_bounds(tokens, lengths):
    torch.manual_seed(8)
    k = randn(2, tokens, 2, 48).transpose(1, 2)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = page_bounds(k, page_size=16, lengths=lengths)
    for got, want in zip(out, page_bounds_ref(k, page_size=16, lengths=lengths), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("group_max", [False, True])
def test_page_scores_bound_every_key_of_a_page(group_max):
    torch.manual_seed(9)
    tokens = 117
    q, k = randn(2, 6, 1, 48), randn(2, 2, tokens, 48)
    low, high = page_bounds(k, page_size=16)
    out = page_scores(q, low, high, group_max=group_max)
    want = page_scores_ref(q, low, high, group_max=group_max)
    assert out.shape == (2, 2 if group_max else 6, 1, 8)
    torch.testing.assert_close(out, want, atol=1e-3, rtol=1e-3)
    exact = (q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2))[:, :, 0]
    exact = torch.nn.functional.pad(exact, (0, 11), value=-torch.inf).view(2, 6, 8, 16).amax(-1)
    exact = exact.view(2, 2, 3, 8).amax(2) if group_max else exact
    assert (page_scores_ref(q.double(), low, high, group_max=group_max)[:, :, 0] >= exact).all()


def test_memory_blocks_by_the_definition():
    torch.manual_seed(10)
    keys, scores = torch.randn(5, 2, 8, 4).double(), torch.rand(5, 4, 8)
    vectors = represent_blocks(keys, scores, tokens=3)
    for n in range(5):
        for h in range(4):
            best = sorted(range(8), key=lambda t: -scores[n, h, t].item())[:3]
            want = sum(keys[n, h // 2, t] for t in best) / 3
            torch.testing.assert_close(vectors[n, 4 * h : 4 * h + 4], want)
    q = torch.randn(4, 7, 4).double()
    chosen = memory_blocks(q, vectors, piece=4, top_k=2)
    for piece, part in enumerate((q[:, :4], q[:, 4:])):
        score = [
            sum((part[h].mean(0) @ vectors[n, 4 * h : 4 * h + 4]).item() for h in range(4))
            for n in range(5)
        ]
        assert chosen[piece].tolist() == sorted(sorted(range(5), key=lambda n: -score[n])[:2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockRule(top_k=33), "cannot hold"),
        (lambda: BlockRule(own_block=False), "forces no other"),
        (lambda: BlockRule(init_blocks=-1), "negative"),
        (lambda: WindowRule(kernel_size=24, stride=16), "multiple"),
        (lambda: WindowRule().ratio(BlockRule(block_size=40)), "strides"),
        (lambda: top_blocks(randn(1, 1, 1, 4), RULE, tokens=100), "do not fit"),
        (lambda: page_scores(randn(1, 3, 1, 8), *[randn(1, 2, 4, 8)] * 2), "does not fit"),
        (
            lambda: forecast_scores(
                randn(1, 2, 1, 8), randn(1, 2, 3, 8), RULE, WINDOWS, tokens=100
            ),
            "too few",
        ),
        (
            lambda: forecast_scores(
                randn(1, 4, 1, 8), randn(1, 2, 24, 8), RULE, WINDOWS, tokens=100
            ),
            "4 forecasts",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.gpu
def test_published_shapes_on_a_device():
    torch.manual_seed(11)
    dtype = torch.bfloat16
    rule, windows, tokens = BlockRule(), WindowRule(), 20011
    q, k = randn(2, 8, 300, 128, dtype=dtype), randn(2, 2, tokens, 128, dtype=dtype)
    compressed = compress_keys(k, windows)
    torch.testing.assert_close(compressed, compress_keys_ref(k, windows), atol=1e-2, rtol=1e-2)
    for score, reference, queries in (
        (forecast_scores, forecast_scores_ref, q[:, :2]),
        (attention_scores, attention_scores_ref, q),
    ):
        for part in (queries, queries[:, :, -1:]):
            out = score(part, compressed, rule, windows, tokens=tokens)
            want = reference(part, compressed, rule, windows, tokens=tokens)
            torch.testing.assert_close(
                past(out, rule, tokens), past(want, rule, tokens), atol=2e-2, rtol=2e-2
            )
            chosen = top_blocks(out, rule, tokens=tokens)
            assert torch.equal(chosen, top_blocks_ref(out, rule, tokens=tokens))

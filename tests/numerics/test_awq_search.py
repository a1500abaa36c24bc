"""AWQ's searches: what a Gram matrix says is what tokens say; degenerate inputs; seams."""

from dataclasses import replace

import pytest
import torch

from compressor.errors import InputError
from compressor.ir.qtensor import QuantSpec
from compressor.numerics import awq_search, fake_quantize
from compressor.numerics import gram as gram_module
from compressor.numerics.awq_clip import search_clip_gram
from compressor.numerics.awq_rows import losses_by_row
from compressor.numerics.awq_search import (
    candidate_scales,
    search_scales_apart,
    search_scales_gram,
    search_scales_reference,
    weight_magnitude,
)
from compressor.numerics.gram import (
    difference_error,
    gram_error,
    relative_error,
    row_errors,
    work_dtype,
)
from compressor.ranks.ranks import ALONE, Ranks
from tests.support.clipping import search_clip_reference

SPEC = QuantSpec("int", 3, "group", 16, zero="subtract")


def problem(rows=24, columns=64, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x *= torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), x, x.t() @ x


@pytest.mark.parametrize("duo", [False, True])
def test_linears_with_inputs_of_their_own_are_searched_as_each_alone(duo):
    problems = [problem(seed=seed) for seed in range(3)]
    weights, grams = (torch.stack([p[i] for p in problems]) for i in (0, 2))
    absmean = torch.stack([x.abs().mean(0) for _, x, _ in problems])
    found = search_scales_apart(weights, grams, absmean, SPEC, duo=duo)
    clipped = search_clip_gram(weights, grams, SPEC, scales=torch.stack([x.scales for x in found]))
    for i, one in enumerate(found):
        alone = search_scales_gram([weights[i]], grams[i], absmean[i], SPEC, duo=duo)
        assert torch.equal(one.scales, alone.scales)
        assert (one.ratio, one.losses) == (alone.ratio, alone.losses)
        other = search_clip_gram(weights[i], grams[i], SPEC, scales=one.scales)
        assert torch.equal(clipped.bounds[i], other.bounds)
        assert torch.equal(clipped.signed[i], other.signed)
    shared = search_clip_gram(weights, grams[0], SPEC)
    other = search_clip_gram(weights[1], grams[0], SPEC)
    assert torch.equal(shared.bounds[1], other.bounds)
    assert torch.equal(shared.signed[1], other.signed)


def test_candidates_that_are_worked_out_together_have_the_losses_of_each():
    problems = [problem(seed=seed) for seed in range(2)]
    weights, grams = (torch.stack([p[i] for p in problems]) for i in (0, 2))
    tried = torch.rand(7, 2, 64, generator=torch.Generator().manual_seed(3)) + 0.5
    alone, together = (
        awq_search._losses([weights], grams, tried, SPEC, range(7), together=count)
        for count in (1, 3)
    )
    assert torch.equal(alone, together) and bool((alone > 0).all())


def test_rows_are_looked_at_once_and_the_best_of_all_of_them_is_found():
    weight, x, gram = problem(rows=640)
    weights, absmean = list(weight.split([512, 128])), x.abs().mean(0)
    found = search_scales_gram(weights, gram, absmean, SPEC)
    tried = torch.cat(
        [torch.ones(1, 64), candidate_scales(absmean, ratios=[i / 20 for i in range(1, 21)])]
    )
    errors = [
        float(
            ((fake_quantize(weight * s, SPEC, from_range=True) / s - weight) @ x.t()).square().sum()
        )
        for s in tried
    ]
    best = errors.index(min(errors))
    assert torch.equal(found.scales, tried[best]) and found.ratio == best / 20
    left = [i for i, loss in enumerate(found.losses) if loss < float("inf")]
    assert best in left and len(left) < 15
    assert found.losses[best] == pytest.approx(errors[best], rel=5e-3)
    # Those that are left are judged by all rows, with products that are not rounded.
    stacks = [weight[None] for weight in weights]
    every = awq_search._losses(stacks, gram[None], tried[:, None], SPEC, range(21))[:, 0].tolist()
    assert all(found.losses[i] == every[i] for i in left)


@pytest.mark.parametrize("rows, columns", [(64, 576), (65, 1536), (192, 200)])
def test_errors_of_a_row_are_the_same_whatever_is_beside_it(rows, columns):
    delta, _, gram = problem(rows=5 * rows, columns=columns)
    delta, gram = delta.to(work_dtype(gram)), gram.to(work_dtype(gram))
    whole = row_errors(delta, gram)
    for count in (1, 2, 4):
        assert torch.equal(row_errors(delta[: count * rows], gram), whole[: count * rows])


@pytest.mark.parametrize("home", [0, 1, 2])
def test_each_row_counts_once_where_ranks_have_some_weights_alone_and_all_have_others(home):
    shared, _, gram = problem(rows=64)
    apart, _, _ = problem(rows=96, seed=1)
    candidates = torch.rand(3, 64, generator=torch.Generator().manual_seed(2)) + 0.5

    def losses(*weights, ranks=ALONE, homes=()):
        stacks = [weight[None] for weight in weights]
        return losses_by_row(stacks, gram, candidates, SPEC, ranks, homes, 4, 2)

    parts = [
        losses(
            shared,
            apart if rank == home else apart.to("meta"),
            ranks=Ranks(rank=rank, world=3),  # which adds nothing up
            homes=[None, home],
        )
        for rank in range(3)
    ]
    assert torch.equal(torch.stack(parts).sum(0), losses(shared, apart))


@pytest.mark.parametrize("columns", [7, 64, 200, 403])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-3)])
def test_gram_error_is_the_output_error(columns, dtype, bound):
    delta, x, gram = problem(columns=columns)
    delta = delta.to(dtype)
    want = (x.double() @ delta.double().t()).square().sum()
    assert float(gram_error(delta, gram)) == pytest.approx(float(want), rel=bound)


def test_a_channel_that_outweighs_all_others_is_not_rounded_with_the_products():
    delta, x, _ = problem(rows=96, columns=200)
    x[:, 3] *= 1e4
    delta = delta.bfloat16()
    square = delta[:, 3].double().square().sum()
    assert abs(float(square.bfloat16()) / float(square) - 1) > 1e-3
    want = (x.double() @ delta.double().t()).square().sum()
    assert float(gram_error(delta, x.t() @ x)) == pytest.approx(float(want), rel=3e-4)


@pytest.mark.parametrize("quick", [False, True])
def test_errors_have_the_dtype_that_a_processor_multiplies_fast(quick, monkeypatch):
    monkeypatch.setattr(gram_module, "multiplies_bfloat16", lambda: quick)
    gram = torch.eye(4)
    assert work_dtype(gram) == (torch.bfloat16 if quick else torch.float32)
    assert work_dtype(gram.double()) == torch.float64


def same_difference(dtype, device):
    weight, _, gram = problem()
    weight, gram = weight.to(device, dtype), gram.to(device)
    off = (weight.float() + 0.1 * torch.randn_like(weight, dtype=torch.float32)).to(dtype)
    plain = (off.float() - weight.float()).to(work_dtype(gram))
    assert torch.equal(difference_error(off, weight, gram), gram_error(plain, gram))
    for work in (torch.float32, torch.bfloat16):
        written = torch.empty(weight.shape, dtype=work, device=device)
        torch.sub(off.float(), weight.float(), out=written)
        assert torch.equal(written, (off.float() - weight.float()).to(work))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_difference_written_in_place_is_the_same_to_the_bit(dtype):
    same_difference(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_written_in_place_on_a_device(dtype):
    same_difference(dtype, "cuda")


@pytest.mark.parametrize(("quick", "bound"), [(False, 1e-4), (True, 3e-3)])
def test_relative_error(quick, bound, monkeypatch):
    monkeypatch.setattr(gram_module, "multiplies_bfloat16", lambda: quick)
    weight, x, gram = problem()
    off = weight + 0.1 * torch.randn_like(weight)
    want = (x @ (off - weight).t()).square().sum() / (x @ weight.t()).square().sum()
    assert float(relative_error(weight, off, gram)) == pytest.approx(float(want), rel=bound)
    assert float(relative_error(weight * 0, weight * 0, gram)) == 0


@pytest.mark.parametrize("rows", [8, 50])
def test_both_searches_agree_on_one_linear(rows, monkeypatch):
    """Of one linear's output the Gram matrix knows all; also where rows come in several blocks."""
    monkeypatch.setattr(awq_search, "ROWS", rows)
    weight, x, gram = problem()
    absmean = x.abs().mean(0)
    ran = search_scales_reference(
        [weight], absmean, lambda w: float((x @ (w[0] - weight).t()).square().sum()), SPEC
    )
    summed = search_scales_gram([weight], gram, absmean, SPEC)
    torch.testing.assert_close(
        torch.tensor(ran.losses), torch.tensor(summed.losses[:20]), rtol=1e-3, atol=0
    )
    assert summed.ratio in (ran.ratio, 1.0) and summed.ratio > 0


def test_several_weights_add_up(monkeypatch):
    monkeypatch.setattr(gram_module, "multiplies_bfloat16", lambda: False)
    weight, x, gram = problem(rows=40)
    absmean = x.abs().mean(0)
    whole = search_scales_gram([weight], gram, absmean, SPEC, duo=True)
    parts = search_scales_gram(list(weight.split([8, 20, 12])), gram, absmean, SPEC, duo=True)
    torch.testing.assert_close(whole.scales, parts.scales)
    torch.testing.assert_close(torch.tensor(whole.losses), torch.tensor(parts.losses))


def test_channels_that_were_never_seen_keep_their_scale():
    _, x, _ = problem()
    absmean = x.abs().mean(0)
    absmean[3], absmean[5] = 0, torch.nan
    scales = candidate_scales(absmean, ratios=[0.0, 0.5, 1.0])
    assert scales.shape == (3, 64) and scales.isfinite().all() and (scales > 0).all()
    assert (scales[:, [3, 5]] == 1).all() and (scales[0] == 1).all()
    alive = [i for i in range(64) if i not in (3, 5)]
    alone = candidate_scales(absmean[alive], ratios=[0.0, 0.5, 1.0])
    torch.testing.assert_close(scales[:, alive], alone)
    assert (candidate_scales(torch.zeros(8), ratios=[0.5]) == 1).all()


def test_tied_channels_get_one_scale():
    weight, x, gram = problem()

    def tie(scales):
        return scales.view(2, 32).mean(0).repeat(2)

    result = search_scales_gram([weight], gram, x.abs().mean(0), SPEC, tie=tie)
    assert torch.equal(result.scales[:32], result.scales[32:]) and result.ratio > 0


def test_zero_groups_have_a_magnitude():
    weight, _, _ = problem()
    weight[:, :16] = 0
    assert weight_magnitude([weight], SPEC).isfinite().all()


def test_no_finite_loss_is_an_error():
    weight, x, gram = problem()
    with pytest.raises(InputError, match="no scale candidate"):
        search_scales_gram([weight], gram * torch.nan, x.abs().mean(0), SPEC)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_no_group_is_worse_clipped_nor_with_zero_points(bits, strategy):
    weight, x, gram = problem()
    weight[:, ::16] *= 4
    spec = QuantSpec("int", bits, strategy, 16 if strategy == "group" else None)
    size = spec.group_size or 64
    scales = torch.linspace(0.5, 2, 64)

    def errors(spec, **options):
        values = fake_quantize(weight * scales, spec, **options)
        groups = (values / scales - weight).view(24, -1, size)
        inputs = x.view(-1, 64 // size, size)
        return torch.einsum("tgc,rgc->trg", inputs, groups).square().sum(0)

    found = {}
    for zero in ("none", "subtract"):
        spec = replace(spec, zero=zero)
        clipped = search_clip_gram(weight * scales, gram, spec, scales=scales)
        by_tokens = search_clip_reference(weight * scales, x / scales, spec, tokens=200)
        of_range = ~clipped.signed if zero == "subtract" else torch.ones_like(by_tokens) > 0
        same = torch.isclose(clipped.bounds, by_tokens, rtol=1e-4)[of_range]
        assert same.float().mean() > 0.95
        found[zero] = errors(spec, **clipped.options())
        published = errors(spec, clip_max=by_tokens, from_range=True)
        plain = errors(spec, from_range=True)
        assert (found[zero] <= torch.minimum(published, plain) * (1 + 1e-4)).all()
        assert found[zero].sum() < 0.95 * plain.sum()
    assert (found["subtract"] <= found["none"] * (1 + 1e-4)).all()
    assert 0 < clipped.signed.float().mean() < 1


def test_what_has_no_range_has_no_bounds():
    weight, _, gram = problem()
    with pytest.raises(InputError, match="clipping bounds"):
        search_clip_gram(weight, gram, QuantSpec("int", 4, "tensor"))

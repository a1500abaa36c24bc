"""Statistics of an input site, against float64."""

import pytest
import torch
from compressor_calibration import products
from compressor_calibration.stats import SiteStats, StatNeeds, count_each, update_each

ALL = StatNeeds(absmean=True, absmax=True, gram=True, keep_inputs=7)


def collect(pieces, *, needs=ALL, channels=None):
    stats = SiteStats(channels or pieces[0].shape[-1], needs, device="cpu")
    for piece in pieces:
        stats.update(piece)
    return stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3), (2, 11, 33), (1, 5000, 17), (2, 40, 500)])
def test_every_statistic_is_that_of_float64(shape, dtype):
    draw = torch.Generator().manual_seed(0)
    pieces = [torch.randn(shape, generator=draw).to(dtype) * scale for scale in (1, 3, 0.1)]
    stats = collect(pieces)
    x = torch.cat([p.reshape(-1, shape[-1]) for p in pieces]).double()
    assert stats.tokens == x.shape[0] and stats.bad_tokens == 0
    torch.testing.assert_close(stats.absmean.double(), x.abs().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.absmax.double(), x.abs().amax(0), rtol=0, atol=0)
    exact = x.T @ x
    # fp32 sums: the error is that of the summands' size, not of what may cancel in the sum.
    size = x.abs().T @ x.abs()
    assert ((stats.gram.double() - exact).abs() <= 1e-6 * size + 1e-30).all()
    assert stats.gram.dtype == torch.float32
    kept = torch.cat([p.reshape(-1, shape[-1]) for p in pieces])[:7]
    assert stats.inputs.dtype == dtype and torch.equal(stats.inputs, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sites_that_are_looked_at_together_have_the_bits_of_each_alone(dtype):
    draw = torch.Generator().manual_seed(8)
    rounds = [[torch.randn(n, 70, generator=draw).to(dtype) for n in (9, 0, 31)] for _ in range(2)]
    rounds[1][2][4, 3] = torch.nan
    together = [SiteStats(70, ALL, device="cpu") for _ in range(3)]
    for parts in rounds:
        update_each(together, parts)
    count_each(together)
    for number, found in enumerate(together):
        alone = collect([parts[number] for parts in rounds])
        assert (found.tokens, found.bad_tokens) == (alone.tokens, alone.bad_tokens)
        for name in ("absmean", "absmax", "gram", "inputs"):
            assert torch.equal(getattr(found, name), getattr(alone, name)), name
    assert together[1].tokens == 0 and together[2].bad_tokens == 1


def test_a_vector_that_is_not_finite_is_left_out_and_counted():
    draw = torch.Generator().manual_seed(1)
    good = torch.randn(40, 9, generator=draw)
    x = good.clone()
    x[3, 2], x[17, 0], x[17, 5], x[39, 8] = float("nan"), float("inf"), -float("inf"), float("nan")
    before = x.clone()
    stats = collect([x[:20], x[20:]])
    rest = good[[i for i in range(40) if i not in (3, 17, 39)]].double()
    assert (stats.tokens, stats.bad_tokens) == (37, 3)
    torch.testing.assert_close(stats.gram.double(), rest.T @ rest, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.absmean.double(), rest.abs().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.absmax.double(), rest.abs().amax(0), rtol=0, atol=0)
    assert torch.equal(stats.inputs[3], torch.zeros(9)) and torch.isfinite(stats.inputs).all()
    assert torch.equal(x.nan_to_num(), before.nan_to_num()), "the input was changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_the_originals_inputs_are_those_of_float64(dtype):
    draw = torch.Generator().manual_seed(2)
    pairs = [[torch.randn(2, 30, 17, generator=draw).to(dtype) for _ in "xo"] for _ in range(3)]
    pairs[1][0][0, 4, 2] = float("nan")  # neither of the two counts where ours is not finite
    pairs[1][1][0, 4, 3] = float("inf")
    stats = SiteStats(17, StatNeeds(gram=True, cross=True), device="cpu")
    for x, original in pairs:
        stats.update(x, original)
    x, original = (torch.cat([p[i] for p in pairs]).reshape(-1, 17).double() for i in (0, 1))
    good = x.isfinite().all(1)
    exact = (original - x)[good].T @ x[good]
    assert stats.tokens == 179
    torch.testing.assert_close(stats.cross.double(), exact, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="cross was not collected"):
        collect([torch.ones(4, 3)], needs=StatNeeds(cross=True)).cross  # noqa: B018


def test_only_what_was_asked_for_is_there():
    stats = collect([torch.ones(4, 3)], needs=StatNeeds(absmax=True))
    assert stats.tokens == 4 and torch.equal(stats.absmax, torch.ones(3))
    for name in ("absmean", "gram", "inputs"):
        with pytest.raises(ValueError, match=name):
            getattr(stats, name)
    both = StatNeeds(absmean=True, keep_inputs=3) | StatNeeds(gram=True, keep_inputs=2)
    assert both == StatNeeds(absmean=True, gram=True, keep_inputs=3)


def test_a_wrong_width_is_refused_and_no_tokens_are_fine():
    stats = collect([torch.ones(0, 3)])
    assert stats.tokens == 0 and torch.equal(stats.absmean, torch.zeros(3))
    assert stats.inputs.shape == (0, 3)
    with pytest.raises(ValueError, match="3"):
        stats.update(torch.ones(2, 4))


def test_the_gram_is_updated_in_place():
    stats = collect([torch.ones(4, 3)])
    memory = stats.gram.data_ptr()
    stats.update(torch.ones(4, 3).bfloat16())
    assert stats.gram.data_ptr() == memory and torch.equal(stats.gram, torch.full((3, 3), 8.0))


def test_a_gram_that_was_read_goes_on_in_all_its_bands():
    x = torch.randn(50, 2 * products.BAND + 9, generator=torch.Generator().manual_seed(6))
    stats = collect([x[:20]])
    torch.testing.assert_close(stats.gram, stats.gram.T)
    stats.update(x[20:])
    other = collect([x])
    torch.testing.assert_close(stats.gram, stats.gram.T)
    torch.testing.assert_close(stats.gram, other.gram)


def test_the_same_input_gives_the_same_bits():
    x = torch.randn(300, 65, generator=torch.Generator().manual_seed(3))
    a, b = collect([x[:100], x[100:]]), collect([x[:100], x[100:]])
    assert torch.equal(a.gram, b.gram) and torch.equal(a.absmean, b.absmean)


@pytest.mark.parametrize("owned", [[{0, 2}, {1}], [{0}, {1, 2}, set()]])
def test_bands_that_are_summed_apart_have_the_bits_of_one_sum(owned):
    x = torch.randn(40, 500, generator=torch.Generator().manual_seed(4))
    x[9, 1] = float("inf")
    pieces = [x[:11], x[11:13], x[13:]]
    whole = collect(pieces)
    assert len(products.bands(500, whole.device)) == 3
    parts = [SiteStats(500, ALL, device="cpu", bands=mine) for mine in owned]
    for piece, looks in zip(pieces, (0, 1, 0), strict=True):
        seen = parts[looks].look(piece)  # who has the rows looks at them
        assert len(seen) == parts[0].parts
        for part in parts:
            part.add(seen)
    total = sum(part.partial[0] for part in parts)
    for part in parts:
        part.partial[0].copy_(total)
        assert (part.tokens, part.bad_tokens) == (39, 1)
        for name in ("absmean", "absmax", "gram", "inputs"):
            assert torch.equal(getattr(part, name), getattr(whole, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("band", [96, 1024])
def test_the_half_precision_gram_on_a_gpu_is_accumulated_in_fp32(band, dtype, monkeypatch):
    monkeypatch.setattr(products, "GPU_BAND", band)
    x = torch.randn(5000, 264, generator=torch.Generator().manual_seed(5)).to(dtype)
    stats = SiteStats(264, ALL, device="cuda")
    stats.update(x[:2000].cuda())
    memory = torch.cuda.memory_allocated()
    stats.update(x[2000:].cuda())
    assert torch.cuda.memory_allocated() - memory < stats.gram.nbytes
    exact = x.double().T @ x.double()
    size = x.double().abs().T @ x.double().abs()
    assert ((stats.gram.cpu().double() - exact).abs() <= 3e-5 * size).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_a_gpu_are_those_of_a_cpu(dtype):
    draw = torch.Generator().manual_seed(8)
    rounds = [[torch.randn(n, 70, generator=draw).to(dtype) for n in (9, 0, 701)] for _ in range(2)]
    rounds[1][2][4, 3] = torch.nan
    there, here = (
        [SiteStats(70, ALL, device=device) for _ in range(3)] for device in ("cuda", "cpu")
    )
    for parts in rounds:
        update_each(there, [part.cuda() for part in parts])
        update_each(here, parts)
    alone = SiteStats(70, ALL, device="cuda")
    for parts in rounds:
        alone.update(parts[2])
    assert torch.equal(alone.absmean, there[2].absmean) and torch.equal(alone.gram, there[2].gram)
    for found, wanted in zip(there, here, strict=True):
        assert (found.tokens, found.bad_tokens) == (wanted.tokens, wanted.bad_tokens)
        torch.testing.assert_close(found.absmean.cpu(), wanted.absmean, rtol=2e-6, atol=0)
        assert torch.equal(found.absmax.cpu(), wanted.absmax)
        assert torch.equal(found.inputs.cpu(), wanted.inputs)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e30])
def test_two_bfloat16_tensors_hold_a_difference(scale):
    draw = torch.Generator().manual_seed(2)
    x = (
        torch.randn(2, 50, 30, generator=draw).bfloat16().float()
        * torch.tensor([1.0, 0.97])[:, None, None]
    )
    difference = scale * (x[0] - x[1])
    high, low = (half.float() for half in products._in_two(difference))
    assert ((high + low - difference).abs() <= 2**-16 * difference.abs()).all()


@pytest.mark.gpu
def test_a_cross_product_on_a_gpu_is_that_of_the_exact_difference():
    draw = torch.Generator().manual_seed(3)
    ours = torch.randn(3000, 1500, generator=draw).bfloat16()
    theirs = (ours.float() * (1 + 0.01 * torch.randn(1500, generator=draw))).bfloat16()
    found = SiteStats(1500, StatNeeds(gram=True, cross=True), device="cuda")
    found.update(ours.cuda(), theirs.cuda())
    exact = (theirs.double() - ours.double()).T @ ours.double()
    off = (found.cross.double().cpu() - exact).norm() / exact.norm()
    assert off < 1e-4

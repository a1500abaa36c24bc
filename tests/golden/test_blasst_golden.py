"""BLASST's tiles, counters and calibration against vectors of ModelOpt's code."""

import json
import math

import pytest
import torch
from compressor_kernels.attention.skip_softmax import (
    skip_softmax_ref,
    tile_gaps_ref,
    visited_tiles,
)
from torch import Tensor

from compressor.numerics.attention_thresholds import SKIP_TRIALS, fit_skip_scale
from tests.support.golden_files import vectors, vectors_and_notes


@pytest.mark.parametrize("name", ["prefill_ragged", "prefill_chunk", "decode"])
def test_the_kernels_decisions(name: str) -> None:
    golden, notes = vectors_and_notes(f"systems/blasst_kernel_{name}")
    q, k, v = (golden[x].float()[None] for x in "qkv")
    for trial in json.loads(notes["lambdas"]):
        kinds = {"": (16, False), "bn32.": (32, False)}
        if name == "decode":
            kinds["packed."] = (16, True)
        for kind, (keys, packed) in kinds.items():
            rows = {"rows": 16, "keys": keys, "packed": packed}
            done = skip_softmax_ref(q, k, v, threshold=trial, **rows)
            assert torch.equal(done.tiles[0], golden[f"lam{trial}.{kind}tile_decision"]), kind
            want = golden[f"lam{trial}.{kind}out"]
            torch.testing.assert_close(done.out[0], want, atol=2e-3, rtol=1e-3)
    gaps = tile_gaps_ref(q, k, rows=16, keys=16)[0]
    visited = visited_tiles(q.shape[2], k.shape[2], rows=16, keys=16)
    trials = torch.tensor(json.loads(notes["calibrate_lambdas"])).log()
    skipped = torch.stack([((gaps < t) & visited).sum() for t in trials])
    total = torch.full_like(skipped, int(visited.sum()) * q.shape[1])
    assert torch.equal(torch.stack([total, skipped], 1), golden["calibrate.counters_total_skipped"])


@pytest.mark.parametrize("name", ["prefill_aligned", "decode"])
def test_the_pytorch_path(name: str) -> None:
    """Where no row is padded both of ModelOpt's paths agree."""
    golden, notes = vectors_and_notes(f"attention/blasst_{name}")
    q, k = golden["q"], golden["k"]
    gaps = tile_gaps_ref(q, k, rows=16, keys=16)
    visited = visited_tiles(q.shape[2], k.shape[2], rows=16, keys=16)
    for trial, sparsity in zip(
        json.loads(notes["thresholds"]), golden["sparsity_per_threshold"], strict=True
    ):
        share = ((gaps < math.log(trial)) & visited).sum() / visited.sum() / q.shape[1]
        assert float(share) == pytest.approx(float(sparsity), abs=1e-6)


def sparsity(q: Tensor, k: Tensor) -> Tensor:
    """By trial, for one head group [heads, n, dim]."""
    gaps = tile_gaps_ref(q[None].float(), k[None].float(), rows=16, keys=16)[0]
    visited = visited_tiles(q.shape[1], k.shape[1], rows=16, keys=16)
    trials = torch.tensor(SKIP_TRIALS, dtype=torch.float64).log()
    skipped = torch.stack([((gaps < t) & visited).sum() for t in trials]).double()
    return skipped / (visited.sum() * q.shape[0])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_calibration(phase: str) -> None:
    golden = vectors(f"systems/blasst_calibrate_{phase}")
    found, lengths = [], []
    for sample in range(4):
        q, k = ([golden[f"s{sample}.l{layer}.{x}"] for layer in range(2)] for x in "qk")
        if phase == "prefill":
            lengths.append(k[0].shape[1])
            found.append(torch.stack([sparsity(q[i], k[i]) for i in range(2)]))
        else:
            for step in range(3):
                seen = k[0].shape[1] - 2 + step
                lengths.append(seen)
                found.append(
                    torch.stack(
                        [sparsity(q[i][:, step : step + 1], k[i][:, :seen]) for i in (0, 1)]
                    )
                )
    by_module = torch.stack(found, 1)
    torch.testing.assert_close(by_module, golden["module_sparsity"], atol=1e-9, rtol=0)
    assert lengths == golden["sample_length"].tolist()
    for kind in ("lin", "log"):
        fit = fit_skip_scale(torch.tensor(lengths), by_module.mean(0), in_logs=kind == "log")
        a, b, r2 = golden[f"{kind}.a_b_r2"].tolist()
        assert (fit.a, fit.b) == pytest.approx((a, b), rel=1e-3)
        assert fit.r2 == pytest.approx(r2, rel=1e-3)
        assert [fit.points, len(lengths) * 20] == golden[f"{kind}.points_used_total"].tolist()
        assert fit.observed == pytest.approx(golden[f"{kind}.min_max_observed"].tolist())
        scales = [fit.scale(float(s)) for s in golden["target_sparsity"]]
        assert scales == pytest.approx(golden[f"{kind}.scale_factor_at_target"].tolist(), rel=1e-3)


def test_the_fit() -> None:
    golden = vectors("attention/blasst_calibration_fit")
    lengths = torch.tensor([2048, 4096, 8192, 16384])
    share = golden["sparsity"].view(4, 20)
    linear = fit_skip_scale(lengths, share, in_logs=False)
    assert [linear.a, linear.b] == pytest.approx(golden["lin_fit_ab"].tolist(), rel=1e-3)
    log = fit_skip_scale(lengths, share, in_logs=True)
    found = golden["log_fit_loga_b"].tolist()
    assert [math.log(log.a), log.b] == pytest.approx(found, rel=1e-3)

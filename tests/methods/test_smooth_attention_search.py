"""The search over α and β of SmoothAttention: what it tries, what it measures, what is refused."""

import math

import pytest
import torch
import yaml
from compressor_calibration.stats import KVNeeds, StatNeeds

from compressor.checkpoint.source import open_source
from compressor.errors import Problems
from compressor.ir.scheme import KVSpec
from compressor.methods.common.context import PassContext
from compressor.methods.qoq import Qoq
from compressor.methods.smooth_attention import SmoothAttention
from compressor.numerics.activations import fake_quantize_kv, static_kv_scale
from compressor.numerics.smooth_attention import attention_candidates, smooth_attention_scales
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.block_runner import BlockRunner
from compressor.runner.observe import observe
from compressor.runner.stream import Stream

CPU = choose_device("cpu")
INT4 = KVSpec("int4", "token_head")


def test_the_published_candidates():
    found = attention_candidates(20)
    assert len(found) == 1 + 2 * 19 and found[0] == (0.0, 0.0)
    assert (0.5, 0.0) in found and (0.5, 0.5) in found and (0.95, 1 - 0.95) in found
    assert all(0 < alpha < 1 for alpha, _ in found[1:])


class Bench:
    """A block whose keys have outlier channels, and hidden states before it."""

    def __init__(self, folder, rows=3, length=24):
        source = open_source(folder)
        self.runner = BlockRunner(
            source.checkpoint.config, source.arch.runtime, device=CPU, dtype=torch.float32
        )
        first, self.layout = source.layout.units[:2]
        ids = torch.randint(2, 256, (rows, length), generator=torch.Generator().manual_seed(5))
        self.hidden = self.runner.embed(source.read_unit(first).dequantized(), ids)
        self.unit = source.read_unit(self.layout)
        changed = {}
        for linear in self.layout.linears:
            if linear.role == "attn.k":
                weight = self.unit.weight(linear).clone()
                weight[3::16] *= 40
                changed[f"{linear.name}.weight"] = weight
        self.unit = self.unit.with_tensors(changed)

    def run(self, step, cache):
        picked = step.selection.pick(self.layout.linears)
        with self.runner.loaded(self.layout, self.unit.tensors) as block:
            seen = observe(block, Stream(self.hidden), needs={}, batch=2, kv=step.needs().kv)
            context = PassContext(
                stats={},
                schemes={},
                selected=picked,
                module_loss=seen.module_loss,
                seed=0,
                kv=seen.kv,
                cache=cache,
            )
            return step.apply(self.unit, context), seen.kv

    def attention(self, unit, cache, kv):
        """The attention block's output over all rows, with keys as the cache gives them back."""
        found = []

        def hook(call):
            key, scale = call.key, None
            if cache is not None:
                if cache.element != "int4":
                    scale = static_kv_scale(kv(call.key), cache)
                key = fake_quantize_kv(call.key, cache, scale)
            return call.plain(call.query, key, call.value)

        with self.runner.loaded(self.layout, unit.dequantized()) as block:
            module = block.layer.self_attn
            handle = module.register_forward_hook(lambda m, a, out: found.append(out[0].clone()))
            with self.runner.attention(hook):
                block.forward(self.hidden)
            handle.remove()
        return torch.cat(found)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("cache", [INT4, KVSpec("int8", "head")])
def test_the_error_it_reports_is_that_of_the_whole_attention(model_type, cache, tiny_model):
    """Against the block itself with its weights rescaled and its keys rounded."""
    bench = Bench(tiny_model(model_type))
    step = SmoothAttention(alpha="search", grid=4, search_tokens=10_000)
    result, kv = bench.run(step, cache)
    (row,) = result.rows
    assert row["attention_error"] <= row["unsmoothed_error"]
    assert (row["alpha"], row["beta"]) in attention_candidates(4)
    scales = smooth_attention_scales(
        kv.keys,
        alpha=row["alpha"],
        queries=kv.queries,
        beta=row["beta"],
        shared=model_type == "qwen3",
    )
    plain = bench.attention(bench.unit, None, None)
    for unit, by, error in (
        (bench.unit, torch.ones_like(scales), row["unsmoothed_error"]),
        (result.unit, scales, row["attention_error"]),
    ):
        found = bench.attention(unit, cache, lambda key, by=by: kv.keys / by)
        measured = float((found - plain).square().sum() / plain.square().sum())
        assert math.isclose(measured, error, rel_tol=0.05, abs_tol=1e-9)
    assert torch.allclose(bench.attention(result.unit, None, None), plain, atol=1e-4)


def test_it_finds_what_outlier_channels_want(tiny_model):
    bench = Bench(tiny_model("llama"))
    result, _ = bench.run(SmoothAttention(alpha="search"), INT4)
    (row,) = result.rows
    assert row["alpha"] > 0 and row["attention_error"] < 0.5 * row["unsmoothed_error"]
    for alpha, beta in ((0.5, 0.0), (0.5, 0.5)):
        fixed, kv = bench.run(SmoothAttention(alpha=alpha, beta=beta), INT4)
        assert fixed.rows[0]["alpha"] == alpha and fixed.rows[0]["beta"] == beta
        assert not kv.calls  # nothing is kept where nothing is searched


def test_only_as_many_rows_are_kept_as_are_asked_for(tiny_model):
    bench = Bench(tiny_model("llama"), rows=5, length=24)
    for tokens, rows in ((1, 1), (24, 1), (25, 2), (49, 3), (1000, 5)):
        _, kv = bench.run(SmoothAttention(alpha="search", grid=2, search_tokens=tokens), INT4)
        assert sum(call.key.shape[0] for _, call in kv.calls) == rows
        assert bool((kv.queries > 0).all()) and kv.queries.shape[0] == bench.layout.attention.heads


def test_needs_of_two_passes_are_served_by_the_larger():
    assert KVNeeds(5) | KVNeeds(7) == KVNeeds(7)
    assert StatNeeds() == SmoothAttention().needs().stats


@pytest.mark.parametrize(
    "step, what",
    [
        ({"alpha": "search", "beta": 0.5}, "beta is searched"),
        ({"grid": 10}, "grid says nothing"),
        ({"alpha": 1.5}, "0 to 1"),
    ],
)
def test_options_that_contradict(step, what, tiny_model, tmp_path):
    data = {"model": str(tiny_model("llama")), "output": str(tmp_path / "out")}
    with pytest.raises(Problems, match=what):
        make_recipe({**data, "passes": [{"smooth_attention": step}, {"kv_cache": {}}]})
    with pytest.raises(ValueError, match="needs kv_cache"):
        Qoq(attention_alpha="search", kv_cache=False)


def test_a_search_without_a_cache_is_refused(tiny_model, tmp_path):
    data = {"model": str(tiny_model("llama")), "output": str(tmp_path / "out")}
    recipe = make_recipe({**data, "passes": [{"smooth_attention": {"alpha": "search"}}]})
    with pytest.raises(Problems) as refused:
        prepare(recipe, device=CPU)
    assert "nothing rounds them" in str(refused.value.problems[0].message)


@pytest.mark.parametrize("wanted", ["qoq", "steps"])
def test_a_run_searches_in_every_block(wanted, tiny_model, tmp_path):
    passes = [{"smooth_attention": {"alpha": "search", "grid": 4}}, {"kv_cache": {}}]
    top = {"format": "compressed-tensors"}
    if wanted == "qoq":
        passes = [{"qoq": {"group_size": 32, "attention_alpha": "search", "min_tokens": 16}}]
        top = {"format": "qserve"}
    recipe = make_recipe(
        {
            "model": str(tiny_model("llama")),
            "output": str(tmp_path / "out"),
            "calibration": {"samples": 4, "length": 16},
            "passes": passes,
            **top,
        }
    )
    done = compile_checkpoint(prepare(recipe, device=CPU))
    rows = [r for unit in done.units for r in unit.rows if r["pass"] == "smooth_attention"]
    assert len(rows) == len(open_source(done.output).layout.units) - 2
    assert all(r["attention_error"] <= r["unsmoothed_error"] for r in rows)
    written = yaml.safe_load((done.output / "recipe.yaml").read_text())
    again = make_recipe({**written, "output": str(tmp_path / "again")})
    assert len(again.passes) == len(written["passes"])

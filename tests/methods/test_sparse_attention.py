"""Methods that calibrate attention rules: what they learn, say in a plan, refuse, and record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_calibration.tokens import TokenSet
from compressor_kernels.attention.antidiagonal import antidiagonal_sums_ref

from compressor.attention.policy import AttentionPolicy, LayerPolicy
from compressor.attention.quality import measure_policies, watch_attention
from compressor.attention.quality_record import QualityRecord, check_record, record_quality
from compressor.attention.rules.lserve import lserve_files
from compressor.attention.rules.streaming import StreamingHeads
from compressor.attention.token_classes import read_sizes
from compressor.checkpoint.records import Records
from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.methods.base import get_pass
from compressor.methods.common.context import LearnContext, PlanContext
from compressor.numerics.attention_thresholds import block_mass, mass_threshold
from compressor.plan.check_recipe import check_recipe
from compressor.plan.recipe import make_recipe
from compressor.runner.source_model import SourceModel
from tests.support.tiny_models import build


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    source = open_source(build("llama", tmp_path_factory.mktemp("llama")))
    return SourceModel(source, device=torch.device("cpu"), dtype=torch.float32)


def tokens(rows: int = 4, length: int = 128) -> TokenSet:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 256, (rows, length), generator=generator)
    return TokenSet(ids=ids, sha256="0" * 64, source="random", sampling="random")


def learned(
    name: str, model: SourceModel, scratch: Path, rows: int = 4, **options: Any
) -> tuple[Any, Any]:
    method: Any = get_pass(name)(**options)
    context = LearnContext(tokens=tokens(rows), seed=1, batch=2, scratch=Records(scratch, "test"))
    return method, method.learn(model, context)


def planned(name: str, model: SourceModel, **options: Any) -> list[str]:
    method: Any = get_pass(name)(**options)
    context = PlanContext(
        layout=model.layout,
        config=model.config,
        dtype=torch.float32,
        parameters=1000,
        untied=False,
        selected=(),
        rows=1,
        length=128,
    )
    method.cost(context, torch.float32)
    return [problem.message for problem in method.check(context)]


def test_xattention_takes_the_largest_threshold_of_all_texts(
    model: SourceModel, tmp_path: Path
) -> None:
    options = {"block_size": 16, "stride": 4, "coverage": 0.8}
    method, found = learned("xattention", model, tmp_path, **options)
    want = torch.zeros(2, 4)

    def watch(unit: Any, call: Any) -> None:
        for q, k in zip(call.query, call.key, strict=True):
            mass = block_mass(q[None], k[None], block_size=16)
            sums = antidiagonal_sums_ref(q[None], k[None], block_size=16, stride=4)
            tau = mass_threshold(mass, sums, coverage=0.8)[0]
            want[unit.index] = torch.maximum(want[unit.index], tau)

    watch_attention(model, tokens().ids, watch, batch=1)
    torch.testing.assert_close(found.value.threshold, want, atol=1e-5, rtol=1e-4)
    policy = method.policy(model.layout, found.value)
    assert policy.layers[1].rules[0].threshold == pytest.approx(want[1].tolist())
    again = method.learned_type().restore(found.value.tensors(), found.value.figures())
    assert method.policy(model.layout, again) == policy
    half = method.policy(model.layout, found.value.model_copy(update={"threshold": want / 2}))
    whole, part = measure_policies(model, [policy, half], tokens().ids)
    assert whole.mass.min() > 0.79 and part.seen.max() < 0.8
    assert bool((part.mass > 0.4).all()) and bool((part.mass < whole.mass).all())


def test_blasst_skips_what_was_asked_for(model: SourceModel, tmp_path: Path) -> None:
    options = {"prefill": None, "decode": 0.4, "keys": 4, "lengths": (64, 96, 128)}
    method, found = learned("blasst", model, tmp_path, rows=24, **options)
    (row,) = found.rows
    assert row["skipped on held-out text"] == pytest.approx(0.4, abs=0.03)
    (rule,) = {
        rule for layer in method.policy(model.layout, found.value).layers for rule in layer.rules
    }
    group = rule.config()["sparse_attention_config"]["config_groups"]["group_0"]
    assert group["targets"] == ["LlamaAttention"] and group["target_sparsity"] == {"decode": 0.4}
    assert set(group["threshold_scale_factor"]) == {"formula", "decode"}
    again = method.learned_type().restore({}, json.loads(json.dumps(found.value.figures())))
    assert method.policy(model.layout, again) == method.policy(model.layout, found.value)
    with pytest.raises(InputError, match="no threshold skips"):
        learned("blasst", model, tmp_path, prefill=0.5, decode=None, rows=32, keys=32)


def test_lserve_finds_the_smallest_budget(model: SourceModel, tmp_path: Path) -> None:
    options = {"page": 8, "logical": 2, "budget": 128, "mass": 0.7, "reuse": 2}
    options |= {"first": 0}
    method, found = learned("lserve", model, tmp_path, **options)
    kept = {(row["name"], row["budget"]): row["attention kept"] for row in found.rows}
    way = found.value.weigh
    other = "sum" if way == "max" else "max"
    pages = "pages of 8 with logical ones"
    after = f"{pages}, {way}, for 2 steps"
    own = {budget: share for (name, budget), share in kept.items() if name == after}
    assert own[128] >= kept[f"{pages}, {other}, for 2 steps", 128]
    assert found.value.budget == min(budget for budget, share in own.items() if share >= 0.7)
    for budget in own:
        hierarchical = kept[f"{pages}, {way}", budget]
        assert hierarchical >= kept["flat pages of 8", budget] - 0.005
    assert method.policy(model.layout, found.value).layers[0].rules[0].weigh == way
    assert all(row["by the worst head"] <= row["attention kept"] for row in found.rows)
    assert set(found.plots) == {"lserve.png"}
    policy = method.policy(model.layout, found.value)
    layers = [
        LayerPolicy(rules=(*layer.rules, StreamingHeads(heads=(0,), sinks=1, window=9)))
        for layer in policy.layers
    ]
    both = AttentionPolicy(heads=4, kv_heads=2, layers=tuple(layers))
    files = lserve_files(both, {}, model="tiny")
    assert set(files) == {"full_attention_heads.tsv", "config.json", "lserve.json"}
    assert json.loads(files["lserve.json"])["sub_chunk_per_block"] == 4


def test_lserve_reads_first_pages_where_that_keeps_more(model: SourceModel, tmp_path: Path) -> None:
    options = {"page": 8, "logical": 2, "budget": 24, "reuse": 1, "weigh": "max"}
    method, found = learned("lserve", model, tmp_path, **options)
    kept = {row["name"]: row["attention kept"] for row in found.rows}
    each = [kept[f"pages of 8 with logical ones{x}, max"] for x in ("", " and the first")]
    assert each[0] != each[1] and found.value.first == int(each[1] > each[0])
    rule = method.policy(model.layout, found.value).layers[0].rules[0]
    assert rule.init_blocks == found.value.first


@pytest.mark.parametrize(("budget", "sizes"), [(48, (16, 4)), (100, (32, 16, 4)), (16, (4,))])
def test_lserve_sizes_pages_by_what_flat_logical_ones_keep(
    budget: int, sizes: tuple[int, ...], model: SourceModel, tmp_path: Path
) -> None:
    options = {"page": None, "logical": 4, "budget": budget, "reuse": 1, "first": 0}
    method, found = learned("lserve", model, tmp_path, **options)
    kept = {row["name"]: row["attention kept"] for row in found.rows}
    best = {
        size: max(kept[f"pages of {size} with logical ones, {way}"] for way in ("max", "sum"))
        for size in sizes
    }
    least = kept["flat pages of 4"] - 0.02
    assert found.value.page == next(size for size in sizes if best[size] >= least)
    rule = method.policy(model.layout, found.value).layers[0].rules[0]
    assert (rule.block_size, rule.logical) == (found.value.page, 4)


def test_sparse_spec_keeps_all_drafts_that_read_everything(
    model: SourceModel, tmp_path: Path
) -> None:
    options = {"stride": 3, "ratio": 0.1, "min_budget": 8, "tried": (1.0,), "rows": 1}
    method, found = learned("sparse_spec", model, tmp_path, **options)
    by_name = {row["name"]: row for row in found.rows}
    whole, part = by_name["100.0% of the keys, 3 drafts"], by_name["10.0% of the keys, 3 drafts"]
    assert whole["drafts kept"] == pytest.approx(3.0, abs=1e-3)
    assert whole["drafts kept, greedy"] == 3.0
    assert whole["attention read"] == pytest.approx(1.0, abs=1e-4)
    assert 0 < part["drafts kept"] < 2.999 and part["keys read"] < 0.3
    table = json.loads(found.files["acceptance.json"])["settings"]
    assert len(table) == 4 and len(table[0]["mass"]) == 2
    assert method.policy(model.layout, None).layers[0].rules[0].stride == 3


def test_what_they_refuse_in_a_plan(model: SourceModel) -> None:
    assert "too few" in planned("xattention", model, block_size=64)[0]
    assert planned("xattention", model, threshold=0.9) == []
    assert "no layer 7" in planned("xattention", model, threshold=0.9, dense_layers=(7,))[0]
    for name, options in (
        ("xattention", {"threshold": 0.9}),
        ("lserve", {"page": 8, "logical": 4}),
    ):
        said = planned(name, model, dense_layers=(0, 1), **options)
        assert "names every layer: nothing would be decided" in said[0]
    said = planned("blasst", model, lengths=(256,), keys=128)
    assert "256 tokens are asked for" in said[0] and "2 tiles" in said[1] and "one row" in said[2]
    assert "too few" in planned("lserve", model)[0]
    assert "not trained with MoBA" in planned("moba", model)[0]
    assert "say nothing of drafts" in planned("sparse_spec", model)[0]
    assert "past the" in planned("infllm_memory", model, local=10**6)[0]
    with pytest.raises(ValueError, match="no power of two"):
        get_pass("lserve")(page=64, logical=24)
    with pytest.raises(ValueError, match="reads at least 48 keys, budget is 40"):
        get_pass("lserve")(page=16, logical=4, budget=40)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        get_pass("sparse_spec")(tried=(0.05, 2.0))
    with pytest.raises(ValueError, match="both null"):
        get_pass("blasst")(prefill=None, decode=None)


@pytest.mark.parametrize(
    ("step", "refused"),
    [({"blasst": {"keys": 8}}, True), ({"xattention": {}}, True), ({"quest": {}}, False),
     ({"xattention": {"threshold": 0.9}}, False)],
)  # fmt: skip
def test_texts_past_the_calibrated_length_are_refused_in_a_plan(
    model: SourceModel, step: dict[str, Any], refused: bool
) -> None:
    recipe = make_recipe(
        {
            "model": "m",
            "output": "o",
            "calibration": {"length": 64},
            "passes": [step],
            "evaluate": {"length": 128},
        }
    )
    said = [problem.message for problem in check_recipe(recipe, model.source)]
    (name,) = step
    expected = f"evaluate.length: rows of 128 tokens are longer than the 64 that {name}"
    assert any(message.startswith(expected) for message in said) == refused


def test_a_video_stream_is_declared(model: SourceModel, tmp_path: Path) -> None:
    method, found = learned("streaming_vlm", model, tmp_path, sink=4, window=8, vision_rounds=3)
    (tmp_path / "stream_policy.json").write_bytes(found.files["stream_policy.json"])
    assert read_sizes(tmp_path) == method.sizes and method.policy(model.layout, None) is None
    assert "not llama" in planned("streaming_vlm", model)[0]
    with pytest.raises(ValueError, match="go together"):
        get_pass("streaming_vlm")(sink=None)
    (tmp_path / "stream_policy.json").write_text('{"sink": 4, "window": null}')
    with pytest.raises(InputError, match="cannot read"):
        read_sizes(tmp_path)


def test_a_record_is_held_against_a_policy(
    model: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = get_pass("xattention")(threshold=0.5, block_size=16, stride=4)
    policy = policy.policy(model.layout, None)  # type: ignore[attr-defined]
    text = tokens(rows=2)
    monkeypatch.setattr("compressor.attention.quality_record.held_out", lambda *a, **k: text)
    monkeypatch.setattr(model, "tokenizer", lambda: None)
    layers = [{"seen": 1.0, "mass": 1.0}] * 2
    record = QualityRecord(rows=2, length=128, sha256=text.sha256, layers=layers)  # type: ignore[arg-type]
    assert check_record(model, policy, record, quantized=False) == []
    worse = record.model_copy(
        update={"layers": (*record.layers[:1], record.layers[0].model_copy(update={"mass": 0.9}))}
    )
    (problem,) = check_record(model, policy, worse, quantized=False)
    assert (
        problem == "layer 1: the share of attention that is seen was recorded as 0.900 and is 1.000"
    )
    again = record_quality(model, policy, rows=2, length=128)
    assert check_record(model, policy, again, quantized=False) == []
    assert len(again.layers[0].mass_by_head) == 4 == len(again.layers[0].seen_by_head)
    by_head = (0.9, *again.layers[0].mass_by_head[1:])
    worse = again.layers[0].model_copy(update={"mass_by_head": by_head})
    record = again.model_copy(update={"layers": (worse, again.layers[1])})
    (problem,) = check_record(model, policy, record, quantized=False)
    assert problem.startswith("layer 0, head 0: the share of attention")

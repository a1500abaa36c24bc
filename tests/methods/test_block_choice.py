"""Passes that choose blocks: what they write, what a run of them leaves, and what is refused."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor.attention.policy import read_policy
from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Interrupted, Problems
from compressor.evaluate.perplexity import evaluate
from compressor.ir.layout import AttentionShape, Linear, Mixer, ModelLayout, Sizes, UnitLayout
from compressor.methods.sparda.choice_record import RECORD_NAME, check_record, read_record
from compressor.methods.sparda.method import SparDA
from compressor.plan.estimate import CPU_CORE_SCORES, estimate
from compressor.plan.plan import make_plan
from compressor.plan.recipe import load_recipe
from compressor.report.html import render
from compressor.run.judge import Verdict
from compressor.run.release import report_data
from compressor.run.session import compile_checkpoint, prepare
from compressor.runner.source_model import SourceModel
from compressor.verify.verify import verify
from tests.support.planned import planned
from tests.support.tiny_models import build

BLOCKS = {"block_size": 8, "kernel_size": 4, "stride": 2, "local_blocks": 1, "top_k": 4}
SPARDA = {
    **{**BLOCKS, "dense_below": 0, "initial": "queries"},
    **{"steps": 6, "rows_per_step": 4, "learning_rate": 0.01},
}
CALIBRATION = {"samples": 8, "length": 96}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


def recipe(model: Path, output: Path, *passes: dict[str, Any], **more: Any) -> Any:
    path = output.parent / f"{output.name}.yaml"
    content = {"model": str(model), "output": str(output), "format": "dense"}
    content |= {"passes": list(passes), "calibration": CALIBRATION, "verify": False, **more}
    path.write_text(json.dumps(content))
    return load_recipe(path)


def run(model: Path, output: Path, *passes: dict[str, Any], **more: Any) -> Path:
    prepared = prepare(recipe(model, output, *passes, **more), device=torch.device("cpu"))
    compile_checkpoint(prepared)
    return output


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(model, tmp_path_factory.mktemp("run") / "sparda", {"sparda": SPARDA})


def test_forecasts_stand_under_the_names_that_serving_loads(trained: Path) -> None:
    shapes = {}
    for path in trained.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if "q_future" in name or "q_curr" in name:
                    shapes[name] = (file.get_slice(name).get_shape(), file.get_tensor(name).dtype)
    assert shapes == {
        f"model.layers.{name}.weight": ([32, 64], torch.bfloat16)
        for name in (
            "0.self_attn.q_future_proj",
            "0.self_attn.q_curr_proj",
            "1.self_attn.q_future_proj",
        )
    }


def test_config_says_what_the_policy_says(trained: Path) -> None:
    policy = read_policy(trained)
    config = json.loads((trained / "config.json").read_text())["sparse_config"]
    assert policy is not None
    for layer in policy.layers:
        (rule,) = layer.rules
        assert rule.kind == "forecast"
        assert config["block_size"] == rule.block_size == 8
        assert config["kernel_size"] == rule.kernel_size == 4
        assert config["kernel_stride"] == rule.stride == 2
        assert config["topk"] + config["window_size"] // 8 == rule.top_k == 4
        assert config["dense_len"] == rule.dense_below == 0
    assert config["use_q_future_for_topk"] and config["create_indexer"]
    assert set(policy.made_by["sparda"]["recall"]) == {"forecast", "infllm", "quest", "recent"}


def test_a_run_that_is_killed_while_it_learns_ends_the_same(
    model: Path, trained: Path, tmp_path: Path
) -> None:
    prepared = prepare(recipe(model, tmp_path / "a", {"sparda": SPARDA}), device=_cpu())
    asked = 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > 9

    with pytest.raises(Interrupted):
        compile_checkpoint(prepared, stopping=stopping)
    assert not (tmp_path / "a" / "manifest.json").exists()
    compile_checkpoint(prepared)
    for path in trained.iterdir():
        if path.suffix in (".safetensors", ".json") and path.name != "manifest.json":
            assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes(), path.name


def test_recall_is_measured_again(trained: Path) -> None:
    record = read_record(trained)
    assert record is not None
    assert len(record.layers) == 2 * 4
    by_scorer = record.to_json()["means"]
    assert all(0 < found["mass"] <= 1 for found in by_scorer.values())
    assert check_record(_model(open_source(trained)), record, quantized=False) == []


@pytest.mark.parametrize("damaged", ["q_future_proj", "q_curr_proj"])
def test_a_forecast_of_one_layer_in_disorder_is_found(
    trained: Path, tmp_path: Path, damaged: str
) -> None:
    """Rows of one projection change places: the same values, and another layer still right."""
    record = read_record(trained)
    assert record is not None
    for name in (p.name for p in trained.iterdir() if p.is_file()):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    shard = next(tmp_path.glob("model*.safetensors"))
    tensors = load_file(shard)
    name = f"model.layers.0.self_attn.{damaged}.weight"
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    found = check_record(_model(open_source(tmp_path)), record, quantized=False)
    assert len(found) == 1
    assert f"in layer {int(damaged == 'q_future_proj')} is" in found[0]


def test_a_layer_that_makes_up_for_another_is_found(trained: Path) -> None:
    record = read_record(trained)
    assert record is not None
    layers = tuple(
        replace(q, recall=q.recall + (0.1 if q.layer else -0.1)) if q.scorer == "forecast" else q
        for q in record.layers
    )
    found = check_record(
        _model(open_source(trained)), replace(record, layers=layers), quantized=False
    )
    assert [problem.split("layer ")[1][0] for problem in found] == ["0", "1"]


def test_a_quantized_checkpoint_keeps_its_forecast(model: Path, tmp_path: Path) -> None:
    rtn = {"rtn": {"bits": 4, "group_size": 32}}
    output = run(model, tmp_path / "q", {"sparda": SPARDA}, rtn, format="compressed-tensors")
    source = open_source(output)
    record = read_record(output)
    assert record is not None
    assert source.quantized
    assert check_record(_model(source), record, quantized=True) == []
    result = evaluate(source, _ids(), device=_cpu(), dtype=torch.float32)
    assert result.nll.value > 0


@pytest.mark.parametrize(
    ("step", "layers"),
    [
        ({"infllm": {**BLOCKS, "dense_below": 0}}, ["infllm", "infllm"]),
        ({"quest": {"page_size": 8, "token_budget": 32, "dense_layers": [0]}}, [None, "quest"]),
    ],
)
def test_selectors_change_no_weight(model: Path, tmp_path: Path, step: Any, layers: Any) -> None:
    output = run(model, tmp_path / "out", step)
    policy = read_policy(output)
    assert policy is not None
    assert [next((rule.kind for rule in x.rules), None) for x in policy.layers] == layers
    before, after = open_source(model), open_source(output)
    for unit in before.layout.units:
        ours, theirs = after.read_unit(unit), before.read_unit(unit)
        assert all(torch.equal(ours.tensors[n], t) for n, t in theirs.tensors.items())
    config = json.loads((output / "config.json").read_text())
    assert ("sparse_config" in config) == ("infllm" in step)
    options = {"device": _cpu(), "dtype": torch.float32}
    assert evaluate(after, _ids(), **options).nll != evaluate(before, _ids(), **options).nll


def test_plan_says_what_is_added_and_kept(model: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(model, tmp_path / "out", {"sparda": SPARDA}), open_source(model))
    text = " ".join(plan.notes)
    assert f"{3 * 32 * 64:,} parameters are added" in text
    assert f"{2 * 8 * 96 * 64 * 2 / 1e9:.2f} GB of activations" in text


def test_plan_counts_the_time_that_teachers_take(model: Path, tmp_path: Path) -> None:
    def seconds(steps: int) -> float:
        wanted = recipe(model, tmp_path / "out", {"sparda": {**SPARDA, "steps": steps}})
        return estimate(make_plan(wanted, open_source(model)), device=_cpu(), resident=0).seconds

    scores = 100 * 4 * 2 * 4 * 96**2  # steps, rows, blocks, heads
    rate = CPU_CORE_SCORES * (os.cpu_count() or 1)
    assert seconds(106) - seconds(6) == pytest.approx(scores / rate)


def test_published_shapes_add_less_than_half_a_percent() -> None:
    """MiniCPM4.1-8B: hidden 4096, 32 layers, 2 KV heads of 128, 8.2 billion weights."""
    attention = AttentionShape(heads=32, kv_heads=2, head_dim=128)
    units = []
    for i in range(32):
        name = f"model.layers.{i}"
        q = Linear(f"{name}.self_attn.q_proj", "attn.q", 4096, 4096, site="attn.in")
        o = Linear(f"{name}.self_attn.o_proj", "attn.o", 4096, 4096, site="attn.out")
        mixer = Mixer("self", f"{name}.self_attn", attention)
        units.append(UnitLayout(name, "block", i, (), (q, o), mixers=(mixer,)))
    head = Linear("lm_head", "lm_head", 73448, 4096, site="head")
    units.append(UnitLayout("head", "head", 32, (), (head,)))
    layout = ModelLayout("llama", tuple(units), Sizes(4096, 73448))
    context = planned(layout, parameters=8_200_000_000, rows=2048, length=65536)
    assert not [*SparDA().check(context)]
    found = SparDA().cost(context, torch.bfloat16)
    assert found.notes[0] == "34,603,008 parameters are added, 0.42% of the model's"
    assert found.scratch == 2 * 2048 * 65536 * 4096 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 12}, "nothing to learn"),
        ({"top_k": 2}, "cannot hold"),
        ({"stride": 3}, "does not divide"),
        ({"teacher_stride": 4, "teacher_kernel": 4}, "teacher_stride"),
    ],
)
def test_what_cannot_work_is_refused_in_plan(
    model: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises((InputError, Problems), match=message):
        make_plan(
            recipe(model, tmp_path / "out", {"sparda": {**SPARDA, **change}}), open_source(model)
        )


def test_activations_that_do_not_fit_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(model, tmp_path / "out", {"sparda": SPARDA})
    size = 2 * 8 * 96 * 64 * 2
    usage = type("Usage", (), {"free": size + 100})  # less than two percent more than is needed
    monkeypatch.setattr("compressor.checkpoint.workspace.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("compressor.checkpoint.container.ShardLayout.size", 1)
    with pytest.raises(InputError, match="activations"):
        make_plan(wanted, open_source(model), output=tmp_path / "out")


def test_two_selectors_are_refused(model: Path, tmp_path: Path) -> None:
    quest = {"quest": {"page_size": 8, "token_budget": 32, "dense_layers": [0]}}
    with pytest.raises((InputError, Problems), match="both decide `blocks` of layer 1"):
        make_plan(recipe(model, tmp_path / "out", {"infllm": BLOCKS}, quest), open_source(model))


def _cpu() -> torch.device:
    return torch.device("cpu")


def _ids() -> torch.Tensor:
    return torch.randint(2, 256, (2, 100), generator=torch.Generator().manual_seed(4))


def _model(source: Any) -> SourceModel:
    return SourceModel(source, device=_cpu(), dtype=torch.float32)


def test_verify_measures_the_forecast_and_the_report_draws_it(
    model: Path, trained: Path, tmp_path: Path
) -> None:
    good = verify(trained, device=_cpu())
    (check,) = [check for check in good.checks if check.name == "forecast recall"]
    assert check.ok
    assert good.ok, good.damage
    prepared = prepare(recipe(model, trained, {"sparda": SPARDA}), device=_cpu())
    compiled = compile_checkpoint(prepared)
    assert compiled.already
    data = report_data(prepared, compiled, Verdict(), (), datetime.now(UTC), seconds=1.0)
    page = render(data.to_json())
    assert "Chosen key blocks" in page
    assert page.count("<polyline") == 2 * 2 * 4  # two plots at two widths, a line for each scorer
    record = json.loads((trained / RECORD_NAME).read_text())
    for layer in record["layers"]:
        if layer["scorer"] == "forecast":
            layer["recall"] += 0.1
    for path in trained.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / RECORD_NAME).write_text(json.dumps(record))
    (tmp_path / "manifest.json").unlink()
    bad = verify(tmp_path, device=_cpu())
    assert [check.name for check in bad.checks if not check.ok] == ["forecast recall"]

"""What docs/adding.md shows works when it is done: its files are dropped into the folders."""

import importlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.attention.policy import describe, read_policy
from compressor.attention.serve import attach
from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Problems
from compressor.evaluate.perplexity import evaluate
from compressor.ir.qtensor import QTensor
from compressor.plan.recipe import json_schema, make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.verify import verify

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding.md"
CPU = choose_device("cpu")


def blocks() -> list[str]:
    return re.findall(r"```\w+\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)


def shown(path: str) -> str:
    """The file that the page shows under a path."""
    (found,) = [block for block in blocks() if block.startswith(f"# {path}\n")]
    return found


@pytest.fixture()
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a file of the page into a package's folder for the length of a test."""

    def put(package: str, name: str) -> None:
        folder = tmp_path / package
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(shown(f"{package.replace('.', '/')}/{name}"))
        module = importlib.import_module(package)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(folder)])
        monkeypatch.delitem(
            sys.modules, f"{package}.{name.removesuffix('.py').replace('/', '.')}", raising=False
        )
        importlib.invalidate_caches()

    return put


def run(model: Path, output: Path, passes: list[Any], **top: Any) -> Path:
    data = {"model": str(model), "output": str(output), "passes": passes, "verify": False, **top}
    return compile_checkpoint(prepare(make_recipe(data), device=CPU)).output


def test_a_method(
    drop: Callable[[str, str], None], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    drop("compressor.methods", "clip.py")
    (recipe,) = [yaml.safe_load(block) for block in blocks() if block.startswith("passes:")]
    output = run(tiny_model("llama"), tmp_path / "out", recipe["passes"], format="dense")
    before, after = open_source(tiny_model("llama")), open_source(output)
    unit = before.layout.units[1]
    theirs = after.read_unit(unit).dequantized()
    plain = run(tiny_model("llama"), tmp_path / "plain", recipe["passes"][1:], format="dense")
    unclipped = open_source(plain).read_unit(unit).dequantized()
    for linear in unit.linears:
        name = f"{linear.name}.weight"
        weight = before.read_unit(unit).dequantized()[name]
        bound = 2.5 * weight.std(dim=1).max()
        # The grid may reach half a step beyond what it was made for.
        assert theirs[name].abs().max() <= bound * (1 + 1 / 14)
        assert not torch.equal(theirs[name], unclipped[name])
    assert "clip" in str(json_schema()["properties"]["passes"])
    with pytest.raises(Problems, match="deviations"):
        run(tiny_model("llama"), tmp_path / "no", [{"clip": {"deviations": -1}}])


def test_an_attention_rule(
    drop: Callable[[str, str], None], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """From a recipe to generated tokens: plan, run, verify, evaluation, and a smaller cache."""
    drop("compressor.attention.rules", "dilated.py")
    drop("compressor.methods", "dilated.py")
    model, passes = tiny_model("llama"), [{"dilated": {"step": 4, "window": 6}}]
    recipe = {"model": str(model), "output": str(tmp_path / "out"), "passes": passes}
    recipe |= {"format": "dense", "verify": False}
    prepared = prepare(make_recipe(recipe), device=CPU)
    output = compile_checkpoint(prepared).output
    policy = read_policy(output)
    assert policy is not None
    said = "2 of 2 layers see 6 recent keys and every 4th"
    assert describe(policy) == [said]
    with pytest.raises(InputError, match="both decide `dilated` of layer 0"):
        run(output, tmp_path / "twice", passes, format="dense")
    report = verify(output, against=model, device=CPU)
    assert report.ok, report.damage
    assert any(check.detail == said for check in report.checks)

    ids = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    position = torch.arange(40)
    distance = position[:, None] - position
    mask = (distance >= 0) & ((distance < 6) | (position % 4 == 0))
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = loaded(ids, attention_mask=mask.expand(2, 1, 40, 40)).logits
        plain = loaded(ids).logits
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].ravel())
    found = evaluate(open_source(output), ids, device=CPU, dtype=torch.float32)
    assert found.nll.value == pytest.approx(float(loss), rel=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-2)

    runtime = attach(loaded)
    (cache,) = (small := runtime.options()).values()
    with torch.no_grad():
        parts = [loaded(part, **small).logits for part in ids.split([20, 7, *[1] * 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=1e-4)
    assert cache.nbytes == policy.cached_tokens(40) * 2 * 2 * 16 * 4
    assert policy.cached_tokens(40) == 4 * (5 + 9)  # two layers of two heads; 36 is near as well
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    tokens = loaded.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    options |= runtime.options()
    again = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(again, tokens)


def test_a_format(
    drop: Callable[[str, str], None], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    drop("compressor.formats", "plain_int8/codec.py")
    drop("compressor.formats", "plain_int8/second_reader.py")
    passes = [{"rtn": {"bits": 8, "group_size": None}}]
    output = run(tiny_model("llama"), tmp_path / "out", passes, format="plain-int8")
    source = open_source(output)
    assert source.format.name == "plain-int8" and source.quantized
    unit = source.layout.units[1]
    read = source.read_unit(unit)
    assert len(read.quantized) == len(unit.linears)
    original = open_source(tiny_model("llama")).read_unit(unit).dequantized()
    for name, weight in read.dequantized().items():
        torch.testing.assert_close(weight, original[name].float(), rtol=0, atol=0.02)
    for q in read.quantized.values():
        again = source.format.decode(source.format.encode(q, model_dtype=torch.float32), q.spec)
        assert isinstance(again, QTensor) and torch.equal(again.codes, q.codes)
        assert torch.equal(again.scales, q.scales)
    report = verify(output, device=CPU)
    assert report.ok, report.damage
    with pytest.raises(InputError, match="only symmetric int8 per channel"):
        run(tiny_model("llama"), tmp_path / "no", [{"rtn": {"bits": 4}}], format="plain-int8")


def test_a_check(
    drop: Callable[[str, str], None],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drop("compressor.verify.checks", "alive.py")
    checks = importlib.import_module("compressor.verify.verify")
    alive = importlib.import_module("compressor.verify.checks.alive").Alive
    monkeypatch.setattr(checks, "CHECKS", (*checks.CHECKS, alive))
    output = run(tiny_model("llama"), tmp_path / "out", [{"rtn": {"bits": 8, "group_size": 32}}])
    before = {check.name: check.ok for check in verify(output, device=CPU).checks}
    assert before["alive"] and all(before.values())
    (shard,) = output.glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    linear = open_source(output).layout.units[1].linears[0].name
    tensors[f"{linear}.weight_scale"].zero_()
    save_file(tensors, shard, metadata)
    after = {check.name: check for check in verify(output, device=CPU).checks}
    assert after["alive"].detail == f"{linear} is all zeros"
    assert {name for name, check in after.items() if not check.ok} >= {"alive"}


def test_an_architecture(
    tiny_models: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Block by block it is what transformers computes at once, and a recipe runs on it."""
    monkeypatch.setitem(tiny_models.FAMILIES, "helium", {"head_dim": 16})
    model = tiny_models.build("helium", tmp_path / "model")
    with pytest.raises(InputError) as caught:
        open_source(model)
    assert "compress map draft MODEL" in (caught.value.hint or "")
    maps = tmp_path / "maps"
    shutil.copytree(Path(importlib.import_module("compressor.arch.maps").__file__).parent, maps)
    (maps / "helium.yaml").write_text(shown("compressor/arch/maps/helium.yaml"))
    monkeypatch.setattr("compressor.arch.load.MAPS", maps)
    ids = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    found = evaluate(open_source(model), ids, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids, labels=ids)
    assert found.nll.value == pytest.approx(float(loss.loss), rel=1e-5)
    awq = {"awq": {"bits": 4, "group_size": 32}}
    calibration = {"samples": 4, "length": 32}
    output = run(model, tmp_path / "out", [awq], calibration=calibration)
    assert open_source(output).quantized

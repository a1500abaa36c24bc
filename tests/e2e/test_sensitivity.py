"""`compress measure` and `compress allocate` from a model to a recipe that runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import InputError, Problems
from compressor.evaluate.perplexity import token_scores
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.allocate import mixed_recipe, parse_sensitivity, with_quantizer
from compressor.run.sensitivity import KL, measure_sensitivity
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.sweep import StreamedModel, run_blocks

CPU = choose_device("cpu")
IDS = torch.randint(2, 256, (4, 32), generator=torch.Generator().manual_seed(3))


def measure(model: Path, passes: list[object], bits: tuple[int, ...] = (3, 8), **more: Any):
    recipe = {"model": str(model), "output": "out", "passes": passes}
    return measure_sensitivity(recipe, open_source(model), bits, IDS, device=CPU, batch=2, **more)


@pytest.mark.parametrize(
    "passes",
    [
        [{"rtn": {"group_size": 32}}],
        [{"awq": {"bits": 4, "group_size": 32}}],
        ["smoothquant", {"rtn": {"group_size": 32, "activations": "token"}}],
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_every_group_is_measured(
    model_type: str, passes: list[object], tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(model_type)
    found = measure(model, passes)
    layout = open_source(model).layout
    wanted = [x.name for x in layout.linears if x.role not in ("router", "lm_head")]
    measured = [name for group in found.groups for name in group.linears]
    assert sorted(measured) == sorted(wanted)
    fused = {x.name: x.fused or x.name for x in layout.linears}
    for group in found.groups:
        assert len({fused[name] for name in group.linears}) == 1
        three, eight, plain = group.options
        assert (three.bits, eight.bits, plain.bits) == (3, 8, None)
        assert plain.error == 0 and plain.bits_per_weight == 32
        assert 0 < eight.error < 0.2 * three.error < 0.2


def test_sizes_are_those_of_the_files(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = measure(model, [{"rtn": {"group_size": 32}}], bits=(4,))
    recipe = dict(found.recipe) | {"output": str(tmp_path / "out")}
    output = compile_checkpoint(prepare(make_recipe(recipe), device=CPU)).output
    entries = open_source(output).checkpoint.entries
    stored = sum(entry.spec.nbytes for name, entry in entries.items() if "_proj.weight" in name)
    weights = sum(group.weights for group in found.groups)
    assert found.bits_per_weight([0] * len(found.groups)) == pytest.approx(8 * stored / weights)


def test_from_a_model_to_a_mixed_recipe(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, runner = tiny_model("llama"), CliRunner()
    file, recipe = tmp_path / "sensitivity.json", tmp_path / "mixed.yaml"
    arguments = ["measure", str(model), "--bits", "3", "--bits", "8", "--output", str(file)]
    result = runner.invoke(cli, [*arguments, "--samples", "4", "--length", "32", "--json"])
    assert result.exit_code == 0, result.output
    found = parse_sensitivity(file.read_text(), where=str(file))
    least, most = (found.bits_per_weight([i] * len(found.groups)) for i in (0, 1))
    middle = (least + most) / 2
    arguments = ["allocate", str(file), "--bits-per-weight", f"{middle}", "--output", str(recipe)]
    result = runner.invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert least < json.loads(result.stdout)["bits_per_weight"] <= middle
    plan = make_plan(make_recipe(yaml.safe_load(recipe.read_text())), open_source(model))
    bits = [s.weight.bits for s in plan.schemes.linears.values() if s.weight is not None]
    assert set(bits) == {3, 8}


def test_the_command_measures_all_that_it_is_asked(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "sensitivity.json"
    arguments = ["measure", str(tiny_model("llama")), "--output", str(file), "--samples", "2"]
    arguments += ["--length", "32", "--bits", "3", "--bits", "4", "--form", "nvfp4"]
    arguments += ["--group-size", "16", "--group-size", "32", "--error", "kl"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "3 g16" in result.output and "nvfp4" in result.output
    found = parse_sensitivity(file.read_text(), where=str(file))
    assert found.measure == KL
    for group in found.groups:
        ways = [(o.bits, o.group_size, o.form) for o in group.options]
        assert ways[:2] == [(3, 16, None), (3, 32, None)]
        assert ways[2:] == [(4, 16, None), (4, 32, None), (None, None, "nvfp4"), (None,) * 3]
        sizes = [o.bits_per_weight for o in group.options[:4]]
        assert sizes[0] > sizes[1] and sizes[2:] == [sizes[0] + 1, sizes[1] + 1]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_kl_of_a_group_is_foretold(
    model_type: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(model_type)
    source = open_source(model)
    found = measure(model, [{"rtn": {"group_size": 32}}], bits=(4,), weighted=True)
    assert "KL" in found.measure
    told, seen = [], []
    for number in (0, len(found.groups) - 1):
        group = found.groups[number]
        out = tmp_path / f"{number}"
        passes = [{"rtn": {"bits": 4, "group_size": 32, "targets": list(group.linears)}}]
        recipe = {"model": str(model), "output": str(out), "passes": passes}
        compile_checkpoint(prepare(make_recipe(recipe), device=CPU))
        models = [StreamedModel(source), StreamedModel(open_source(out))]
        states = run_blocks(models, IDS, device=CPU, dtype=torch.float32, batch=4)
        counted = torch.ones_like(IDS[:, 1:], dtype=torch.bool)
        seen.append(float(token_scores([states[1], states[0]], IDS, counted)[2].mean()))
        told.append(group.options[0].error)
    assert all(0.4 < a / b < 2.5 for a, b in zip(told, seen, strict=True)), (told, seen)


def test_forms_stand_beside_integers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    forms = ("nvfp4", "mxfp4", "fp8")
    found = measure(
        model, [{"gptq": {"group_size": 32, "correction": 0.3}}], bits=(3,), forms=forms
    )
    labels = ["3 bits", *forms, "in float"]
    assert all([o.way.label for o in group.options] == labels for group in found.groups)
    assert [o.bits_per_weight for o in found.groups[-1].options][1:3] == pytest.approx(
        [4.5, 4.25], abs=0.02
    )
    recipe = {**found.recipe, "output": str(tmp_path / "out"), "format": "compressed-tensors"}
    both = found.model_copy(update={"recipe": recipe})
    choice = [i % 4 for i in range(len(found.groups))]
    for mixed in (both, with_quantizer(both, "reconstruct")):
        plan = make_plan(make_recipe(mixed_recipe(mixed, choice)), open_source(model))
        for group, i in zip(found.groups, choice, strict=True):
            spec = plan.schemes.linears[group.linears[0]].weight
            assert spec is not None and spec.element == ("int", *["fp4_e2m1"] * 2, "fp8_e4m3")[i]
    names = [
        step.step.name
        for step in make_plan(
            make_recipe(mixed_recipe(with_quantizer(both, "reconstruct"), choice)),
            open_source(model),
        ).passes
    ]
    assert sorted(names) == ["fp8", "reconstruct", "reconstruct", "reconstruct"]


def test_what_cannot_be_measured(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="no `bits`"):
        measure(model, ["fp8"])
    with pytest.raises(InputError, match="no block"):
        measure(model, [{"rtn": {"group_size": 32, "ignore": []}}])
    with pytest.raises(Problems, match="does not divide"):
        measure(model, [{"rtn": {"group_size": 128}}])

"""`compress quantize` and `init`: the recipe that is chosen, refused, run or written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from compressor.checkpoint.find import locate
from compressor.cli.commands.quantize import SCHEMES
from compressor.cli.main import cli
from compressor.errors import InputError
from compressor.plan.choose import WAYS
from compressor.plan.plan import make_plan
from compressor.plan.recipe import Recipe, make_recipe
from compressor.run.mixed import BITS
from compressor.run.sensitivity import bits_per_weight, groups_of

Ask = Callable[..., Result]


@pytest.fixture()
def ask(tiny_model: Any, tmp_path: Path) -> Ask:
    """compress quantize LLAMA -o out …, on a CPU."""

    def asked(*words: str) -> Result:
        start = ["quantize", str(tiny_model("llama")), "-o", str(tmp_path / "out")]
        return CliRunner().invoke(cli, [*start, "--device", "cpu", *words])

    return asked


def passes(ask: Ask, *words: str) -> list[dict[str, Any]]:
    """Those of the recipe that is chosen."""
    result = ask("--recipe-only", "--json", *words)
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)["recipe"]["passes"]
    return found


def test_nothing_is_written_into_the_model(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stands in the model's folder gets the output beside it."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    before = set(model.iterdir())
    words = ["--scheme", "w4a16", "--device", "cpu", "--recipe-only", "--json"]
    refused = CliRunner().invoke(cli, ["quantize", str(model), "-o", str(model / "out"), *words])
    assert isinstance(refused.exception, InputError) and "of the model" in str(refused.exception)
    monkeypatch.chdir(model)
    chosen = CliRunner().invoke(cli, ["quantize", ".", *words])
    assert json.loads(chosen.stdout)["recipe"]["output"] == str(tmp_path / "model-w4a16")
    assert set(model.iterdir()) == before


def test_the_schemes_that_are_offered_are_those_that_are_made() -> None:
    assert set(SCHEMES) == set(WAYS)


@pytest.mark.parametrize(("quality", "name"), [("fast", "rtn"), ("good", "gptq")])
def test_a_recipe_is_saved_with_the_group_that_divides_the_widths(
    ask: Ask, tmp_path: Path, quality: str, name: str
) -> None:
    result = ask("--scheme", "w4a16", "--quality", quality, "--recipe-only")
    assert result.exit_code == 0, result.output
    saved = (tmp_path / "out.yaml").read_text("utf-8")
    assert saved == result.stdout and not (tmp_path / "out").exists()
    recipe = yaml.safe_load(saved)
    ((chosen, params),) = (step.popitem() for step in recipe["passes"])
    # 64 and 96 inputs: 32 is the largest that divides both.
    assert (chosen, params["bits"], params["group_size"]) == (name, 4, 32)
    assert ("calibration" in recipe) == (quality != "fast")


def test_lines_on_stderr_are_json_where_asked_for(ask: Ask) -> None:
    result = ask("--scheme", "fp8", "--recipe-only", "--log-format", "json")
    assert [json.loads(line)["event"] for line in result.stderr.splitlines()] == ["recipe"]


def test_best_reconstructs_where_that_applies(ask: Ask) -> None:
    assert "reconstruct" in passes(ask, "--scheme", "w4a16", "--quality", "best")[0]


def test_best_of_another_scheme_is_as_good(ask: Ask) -> None:
    assert [*passes(ask, "--scheme", "w8a8", "--quality", "best")[0]] == ["smoothquant"]


@pytest.mark.parametrize(
    ("gpu", "inputs"), [("b200", "calibrated"), ("h100", None)], ids=["blackwell", "hopper"]
)
def test_inputs_are_quantized_where_the_gpu_has_kernels(ask: Ask, gpu: str, inputs: Any) -> None:
    awq, nvfp4 = passes(ask, "--scheme", "nvfp4", "--for", f"vllm, gpu: {gpu}")
    assert nvfp4["nvfp4"].get("activations") == inputs
    assert awq["awq"] == ({"search": "inputs"} if inputs else {})


def test_a_group_that_does_not_split_between_gpus_is_left_for_one_that_does(
    tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    words = ["quantize", str(model), "-o", str(tmp_path / "o"), "--scheme", "w4a16"]
    words += ["--quality", "fast", "--recipe-only", "--json", "--device", "cpu"]
    sizes = []
    for runtime in ("vllm", "vllm, tp: 2"):
        (tmp_path / "o.yaml").unlink(missing_ok=True)
        found = json.loads(CliRunner().invoke(cli, [*words, "--for", runtime]).stdout)
        sizes.append(found["recipe"]["passes"][0]["rtn"]["group_size"])
    assert sizes == [128, 64]


def test_a_scheme_that_a_runtime_does_not_load_names_those_it_does(ask: Ask) -> None:
    result = ask("--scheme", "fp8-block", "--for", "vllm", "--recipe-only")
    assert isinstance(result.exception, InputError) and result.exception.exit_code == 2
    *why, last = result.exception.problems  # type: ignore[attr-defined]
    assert "do not divide into groups of 128" in why[0].message
    assert "fp8 " in last.hint and "w4a16" in last.hint and "fp8-block" not in last.hint


def test_every_scheme_can_be_made_for_a_gpu_that_has_its_kernels(
    tiny_model: Any, tmp_path: Path
) -> None:
    model = str(tiny_model("llama", hidden_size=128, intermediate_size=256, num_key_value_heads=4))
    for scheme in SCHEMES:
        words = ["quantize", model, "-o", str(tmp_path / scheme), "--scheme", scheme, "--json"]
        words += ["--recipe-only", "--for", "vllm, gpu: h100", "--device", "cpu"]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, (scheme, result.exception)


def test_attention_in_fp8_beside_nvfp4(ask: Ask) -> None:
    (attention, rest) = passes(ask, "--scheme", "nvfp4-fp8")
    assert attention["fp8"]["targets"] == ["attn.*"] and "attn.*" in rest["nvfp4"]["ignore"]


def test_an_edited_recipe_is_not_written_over(ask: Ask, tmp_path: Path) -> None:
    words = ("--scheme", "fp8", "--recipe-only")
    assert ask(*words).exit_code == 0
    assert ask(*words).exit_code == 0, "the same one may lie there"
    file = tmp_path / "out.yaml"
    edited = file.read_text("utf-8").replace("dynamic", "weights")
    file.write_text(edited, "utf-8")
    result = ask(*words)
    assert isinstance(result.exception, InputError)
    assert "another recipe" in result.exception.message and file.read_text("utf-8") == edited


def test_it_runs_what_it_chose_and_run_finds_it_done(ask: Ask, tmp_path: Path) -> None:
    small = ("--set", "calibration.samples=4", "--set", "evaluate.windows=2")
    result = ask("--scheme", "w8a8", *small, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"] and not found["already_done"]
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["weights"]["num_bits"] == group["input_activations"]["num_bits"] == 8
    again = CliRunner().invoke(
        cli, ["run", str(tmp_path / "out.yaml"), "--device", "cpu", "--json"]
    )
    assert json.loads(again.stdout)["already_done"]


@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4"])
def test_init_writes_the_same_recipe_with_every_other_key_as_a_comment(
    tiny_model: Any, scheme: str
) -> None:
    words = ["init", str(tiny_model("llama")), "--scheme", scheme, "--device", "cpu"]
    text = CliRunner().invoke(cli, words).stdout
    data = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)["recipe"]
    recipe = make_recipe(data)
    assert make_recipe(yaml.safe_load(text)) == recipe
    for name in Recipe.model_fields:
        assert len(re.findall(rf"^(?:# )?{name}:", text, re.MULTILINE)) == 1, name
    # Its defaults are YAML, and defaults: the keys may be uncommented where they stand.
    whole = re.sub(r"^( *)# (?!publish)(\w+: )", r"\1\2", text, flags=re.MULTILINE)
    assert whole.count("#") < text.count("#")
    assert make_recipe(yaml.safe_load(whole)).resolved() == recipe.resolved()


def test_init_leaves_a_file_that_is_there(tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("mine", "utf-8")
    words = ["init", str(tiny_model("llama")), "-o", str(tmp_path / "r.yaml")]
    result = CliRunner().invoke(cli, words)
    assert isinstance(result.exception, InputError)
    assert (tmp_path / "r.yaml").read_text("utf-8") == "mine"


def test_bits_per_weight_go_where_they_were_measured_to_help(ask: Ask, tmp_path: Path) -> None:
    words = ("--bits-per-weight", "5.5", "--quality", "fast", "--recipe-only", "--json")
    result = ask(*words)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["recipe"]
    bits = {params["bits"] for step in data["passes"] for params in step.values()}
    assert len(bits) > 1 and bits <= set(BITS)
    source = locate(data["model"], fetch=False).source
    plan = make_plan(make_recipe(data), source)
    names = {x.name for x in source.layout.linears if x.role != "lm_head"}
    groups = [(unit, g) for unit in plan.units for g in groups_of(unit.layout, frozenset(names))]
    sizes = [sum(x.out_features * x.in_features for x in g) for _, g in groups]
    spent = [bits_per_weight(unit, g) for unit, g in groups]
    mean = sum(b * n for b, n in zip(spent, sizes, strict=True)) / sum(sizes)
    assert 5.0 < mean <= 5.5
    measured = tmp_path / "out.sensitivity.json"
    before = measured.stat().st_mtime_ns
    assert ask(*words).stdout == result.stdout
    assert measured.stat().st_mtime_ns == before, "what was measured is kept"


def test_bits_that_cannot_be_had_are_refused_before_anything_is_measured(
    ask: Ask, tmp_path: Path
) -> None:
    refused = ask("--bits-per-weight", "2.1", "--recipe-only")
    assert isinstance(refused.exception, InputError)
    assert "at least 3.0" in str(refused.exception.hint)
    sglang = ask("--bits-per-weight", "4.1", "--for", "sglang", "--recipe-only")
    assert "fewer than 4 bits take for sglang" in str(sglang.exception)
    assert not list(tmp_path.glob("*.json"))
    for words in ((), ("--scheme", "w4a16", "--bits-per-weight", "4.5")):
        assert ask(*words).exit_code == 2

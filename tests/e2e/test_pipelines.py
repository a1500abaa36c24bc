"""What a pipeline reads of each command: JUnit XML, one JSON object on stdout, an exit code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner, Result

from compressor.cli.main import cli
from tests.support.commands import leaves

RECIPE: dict[str, Any] = {
    "calibration": {"samples": 4, "length": 32},
    "passes": [{"rtn": {"bits": 4, "group_size": 32}}],
    "evaluate": {"windows": 2, "length": 32},
    "gate": {"kl": 1e-6},
}


def compress(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def read(path: Path) -> dict[tuple[str, str], str]:
    """(group, name) → passed, failure or error."""
    (suite,) = ElementTree.parse(path).getroot()
    return {
        (
            case.get("classname", "").removeprefix("compress."),
            case.get("name", ""),
        ): next((x.tag for x in case if x.tag in ("failure", "error")), "passed")
        for case in suite
    }


@pytest.fixture(scope="module")
def made(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A recipe, its model, and a checkpoint whose gate was missed."""
    folder = tmp_path_factory.mktemp("pipeline")
    model, recipe = tiny_model("llama"), folder / "recipe.yaml"
    data = {**RECIPE, "model": str(model), "output": str(folder / "out")}
    recipe.write_text(yaml.safe_dump(data))
    assert compress("run", recipe, "--device", "cpu").exit_code == 1
    return recipe, model, folder / "out"


def test_every_command_prints_json_and_what_ends_in_a_verdict_junit() -> None:
    options = {
        words: {name for p in command.params for name in p.opts} for words, command in leaves(cli)
    }
    without = {words for words, names in options.items() if "--json" not in names}
    data = {("completion",), ("schema",), ("map", "draft")}
    assert without == data, "which print nothing but data"
    reporting = {words for words, names in options.items() if "--junit" in names}
    assert reporting == {
        *(
            (name,)
            for name in (
                "audit",
                "compare",
                "convert",
                "eval",
                "fold",
                "plan",
                "plug",
                "push",
                "quantize",
                "run",
                "sanitize",
                "unplug",
                "verify",
            )
        ),
        ("delta", "apply"),
    }


def test_a_plan_is_a_lint(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    recipe, report = made[0], tmp_path / "plan.xml"
    assert compress("plan", recipe, "--junit", report).exit_code == 0
    assert read(report) == {("plan", "recipe and model"): "passed"}
    for command in (["plan"], ["run", "--dry-run"]):
        found = compress(*command, recipe, "--set", "passes.rtn.bits=9", "--junit", report)
        assert found.exception is not None
        ((group, name),) = read(report)
        assert group == command[0] and name.startswith("passes.0.rtn.bits")
        assert set(read(report).values()) == {"error"}


def test_a_plan_inside_a_run_reports_once(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    report = tmp_path / "dry.xml"
    assert compress("run", made[0], "--dry-run", "--junit", report).exit_code == 0
    assert read(report) == {("plan", "recipe and model"): "passed"}


def test_an_evaluation_is_held_to_limits(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, model, output = made
    report = tmp_path / "eval.xml"
    size = ["--windows", "2", "--length", "32", "--device", "cpu"]
    limits = ["--gate", "kl=1e-6", "--gate", "ppl_ratio=9"]
    options = [*size, "--against", model, *limits, "--junit", report]
    done = compress("eval", output, *options, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["ok"] is False and found["gate"]["passed"] is False
    assert read(report) == {
        ("evaluate", "perplexity"): "passed",
        ("gate", "kl"): "failure",
        ("gate", "ppl_ratio"): "passed",
    }
    shown = compress("eval", output, *options)
    assert shown.exit_code == 1 and "gate        FAILED" in shown.stdout
    assert "MISSED: KL divergence from the original is" in shown.stdout
    probe = ["--passkey-length", "224", "--gate", "passkey=0"]
    passed = compress("eval", output, *size, *probe, "--junit", report)
    assert passed.exit_code == 0 and "gate        passed" in passed.stdout
    assert set(read(report)) == {
        ("evaluate", "perplexity"),
        ("evaluate", "passkey"),
        ("gate", "passkey"),
    }


@pytest.mark.parametrize(
    "limit, said",
    [
        ("kl", "has no '='"),
        ("kl=0.1", "nothing here measures kl"),
        ("layer_error=0.1", "nothing here measures layer_error"),
        ("tasks.arc_easy=0.3", "nothing here measures tasks.arc_easy"),
        ("ppl_rato=1.1", "unknown key '--gate ppl_rato'"),
        ("ppl=-3", "--gate ppl is -3, not above 0.0"),
        ("ppl=[", "--gate ppl is '[', not a number"),
    ],
)
def test_limits_that_cannot_be_judged_are_refused(
    made: tuple[Path, Path, Path], limit: str, said: str
) -> None:
    error = compress("eval", made[2], "--gate", limit).exception
    assert getattr(error, "exit_code", None) == 2 and said in str(error)


def test_a_conversion_reports_that_it_is_done(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    report = tmp_path / "convert.xml"
    done = compress("convert", made[2], tmp_path / "dense", "--format", "dense", "--junit", report)
    assert done.exit_code == 0
    told = read(report)
    assert told[("convert", "compressed-tensors to dense")] == "passed"
    assert len(told) > 5 and set(told.values()) == {"passed"}  # what verification found, too
    report.unlink()
    again = ["convert", made[2], tmp_path / "x", "--format", "densest", "--junit", report]
    assert compress(*again).exception is not None
    assert set(read(report).values()) == {"error"}


def test_what_is_not_fit_to_be_published_is_one_failure_and_one_object(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    report = tmp_path / "push.xml"
    options = ["push", made[2], "me/model", "--dry-run", "--junit", report]
    done = compress(*options, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["ok"] is False and "gate" in found["objections"][0]
    assert read(report) == {("push", "fit to be published"): "failure"}
    plain = compress(*options)
    assert getattr(plain.exception, "exit_code", None) == 1
    assert list(read(report).values()) == ["failure"]
    assert compress(*options, "--force").exit_code == 0
    assert read(report) == {("push", "fit to be published"): "passed"}


def test_a_recipe_is_printed_for_machines() -> None:
    assert json.loads(compress("recipes", "smollm2-release", "--json").stdout)["gate"]

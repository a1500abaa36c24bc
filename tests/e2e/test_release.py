"""From a recipe to a published checkpoint by the command line: verdicts, exit codes, what is
written where, and what machines read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner, Result

from compressor.checkpoint.find import locate
from compressor.checkpoint.manifest import hash_file, read_manifest
from compressor.cli.main import cli
from compressor.errors import CheckError, CompressError
from compressor.report.data import read_report
from compressor.run import release
from compressor.run.judge import Verdict
from compressor.verify.verify import verify

BASE: dict[str, Any] = {
    "calibration": {"samples": 4, "length": 32},
    "passes": [{"rtn": {"bits": 4, "group_size": 32}}],
    "evaluate": {"windows": 3, "length": 32},
}


def write_recipe(folder: Path, model: Path | str, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    data = {**BASE, "model": str(model), "output": str(folder / "out"), **changes}
    path.write_text(yaml.safe_dump(data))
    return path


def compress(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def run(recipe: Path, *arguments: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and the JSON that a run prints."""
    result = compress("run", recipe, "--device", "cpu", "--json", *arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return result.exit_code, found


def test_a_run_that_passes_leaves_a_report_and_a_card(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_model("llama"),
        evaluate={
            **BASE["evaluate"],
            "stride": 16,
            "passkey": {"lengths": [224], "depths": [0.5], "rows": 2},
        },
        gate={"ppl_ratio": 5.0, "passkey": 0.0, "layer_error": 0.5},
        card={"base_model": "someone/tiny", "license": "apache-2.0"},
    )
    code, found = run(recipe, "--junit", tmp_path / "checks" / "junit.xml")
    assert code == 0 and found["ok"] and found["gate"]["passed"]
    # 96 tokens of which each but the first is scored once, by windows that overlap.
    assert found["evaluate"]["tokens"] == 95 and found["evaluate"]["windows"] == 5
    assert found["evaluate"]["perplexity"]["error"] > 0
    assert found["passkey"]["cells"][0]["rows"] == 2 and found["passkey"]["tokens"] > 2
    output = tmp_path / "out"
    report = read_report(output)
    assert report is not None and report.gate is not None and report.gate["passed"]
    assert report.hashes["manifest.json"] == hash_file(output / "manifest.json").sha256
    assert len(report.units) == 4 and report.units[1].rows
    page = (output / "report.html").read_text()
    assert f"answers' {found['passkey']['tokens']} tokens" in page and "of 2 passkeys" in page
    assert "gate passed" in page and "files verified" in page and str(tmp_path) not in page
    assert str(tmp_path) not in (output / "report.json").read_text()
    card = (output / "README.md").read_text()
    assert "base_model: someone/tiny" in card and "license: apache-2.0" in card
    assert "passkey retrieval" in card and str(tmp_path) not in card
    manifest = read_manifest(output)
    assert manifest is not None
    assert not {"README.md", "report.html", "report.json"} & set(manifest.files)
    suite = ElementTree.parse(tmp_path / "checks" / "junit.xml").getroot()[0]
    assert suite.get("failures") == "0" and suite.get("errors") == "0"
    names = {case.get("classname", "").removeprefix("compress.") for case in suite}
    assert names == {"plan", "compress", "verify", "evaluate", "gate"}


def test_a_missed_gate_keeps_the_files_names_layers_and_suggests_what_plans(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"), gate={"kl": 1e-6})
    result = compress("run", recipe, "--device", "cpu", "--junit", tmp_path / "junit.xml")
    assert result.exit_code == 1
    output = tmp_path / "out"
    assert read_manifest(output) is not None and verify(output, device=cpu()).ok
    assert re.search(r"high error  model\.layers\.\d\.\S+  [\d.e-]+  [\d.]+% of all", result.stdout)
    assert "MISSED: KL divergence from the original is" in result.stdout
    start = result.stdout.index("\npasses:\n") + 1
    suggestion = yaml.safe_load(result.stdout[start : result.stdout.index("\n\n", start)])
    assert suggestion["passes"][1]["rtn"]["bits"] == 8
    repaired = write_recipe(
        tmp_path, tiny_model("llama"), output=str(tmp_path / "o2"), **suggestion
    )
    assert compress("plan", repaired).exit_code == 0
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    failed = [case for case in suite if case.find("failure") is not None]
    assert [case.get("name") for case in failed] == ["kl"]


@pytest.mark.parametrize(
    "format, step, expected",
    [
        # One number of bits for all: the worst linears are left as they are.
        ("autoawq", {"rtn": {"bits": 4, "group_size": 32, "symmetric": False}}, "ignored"),
        ("gptq", {"rtn": {"bits": 4, "group_size": 32}}, "ignored"),
        ("compressed-tensors", {"fp8": {}}, "ignored"),
        ("compressed-tensors", {"rtn": {"bits": 3, "group_size": 32}}, "8 bits"),
    ],
)
def test_what_a_missed_gate_suggests_plans_in_every_format(
    format: str,
    step: dict[str, Any],
    expected: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    gate = {"kl": 1e-9}
    recipe = write_recipe(tmp_path, model, format=format, passes=[step], gate=gate)
    code, found = run(recipe)
    assert code == 1
    suggestion = yaml.safe_load(found["gate"]["suggestion"])
    after = suggestion["passes"]
    if expected == "8 bits":
        assert after[-1]["rtn"]["bits"] == 8
    else:
        (params,) = after[0].values()
        assert len(after) == 1 and after[0].keys() == step.keys() and len(params["ignore"]) > 1
    output = str(tmp_path / "repaired")
    repaired = write_recipe(tmp_path, model, format=format, output=output, **suggestion)
    assert compress("plan", repaired).exit_code == 0


def cpu() -> Any:
    import torch

    return torch.device("cpu")


def test_a_finished_checkpoint_is_judged_by_new_limits_without_being_made_again(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"), gate={"kl": 1e-6})
    assert run(recipe)[0] == 1
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    relaxed = write_recipe(tmp_path, tiny_model("llama"), gate={"kl": 5.0, "layer_error": 0.5})
    code, found = run(relaxed)
    assert code == 0 and found["already_done"]
    assert found["rows"], "what the passes found is known from the report"
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    report = read_report(tmp_path / "out")
    assert report is not None and report.gate is not None and report.gate["passed"]


def test_peak_memory_is_that_of_the_whole_run(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what judges the checkpoint too, and still known when it is judged once more."""
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    judging = release.judge
    reached = {"bytes": 1}

    def judge(*args: Any, **named: Any) -> Verdict:
        verdict = judging(*args, **named)
        reached["bytes"] = 2 << 40
        return verdict

    monkeypatch.setattr(release, "judge", judge)
    monkeypatch.setattr(release, "peak_rss", lambda: reached["bytes"])
    for _ in range(2):
        assert run(recipe, "--again")[1]["peak_host_bytes"] == 2 << 40
        report = read_report(tmp_path / "out")
        assert report is not None and report.spent.host_bytes == 2 << 40
        reached["bytes"] = 1


def test_a_damaged_checkpoint_fails_and_is_not_measured(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"), gate={"kl": 5.0})
    assert run(recipe)[0] == 0
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    code, found = run(recipe)
    assert code == 1 and found["verify"]["ok"] is False and found["evaluate"] is None
    assert "files damaged" in (tmp_path / "out" / "report.html").read_text()


def test_two_runs_give_the_same_manifest(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    for name in ("one", "two"):
        run(write_recipe(tmp_path, model), "--output", tmp_path / name)
    one, two = ((tmp_path / name / "manifest.json").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": {"kl": 0.1}, "evaluate": None}, "measures kl"),
        ({"gate": {"passkey": 0.5}}, "measures passkey"),
        ({"gate": {"tasks": {"piqa": 0.5}}}, "measures tasks.piqa"),
        (
            {"gate": {"top1": 0.5}, "evaluate": {"against_original": False}},
            "measures top1",
        ),
        ({"publish": {"repo": "me/x"}, "verify": False}, "unverified files"),
    ],
)
def test_what_could_never_be_judged_is_refused_by_plan(
    changes: dict[str, Any], message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    result = compress("plan", write_recipe(tmp_path, tiny_model("llama"), **changes))
    assert isinstance(result.exception, CompressError) and message in str(result.exception)
    assert result.exception.exit_code == 2


def test_a_model_on_the_hub_is_pinned_to_a_commit_and_published(
    hub: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """One recipe from a Hub model to a Hub model; a copy that is downloaded verifies."""
    files = {path.name: path.read_bytes() for path in tiny_model("llama").iterdir()}
    card = b"---\nlicense: mit\nlanguage: en\n---\n# tiny\n"
    first = hub.create("someone/tiny", {**files, "README.md": card, "pickled.bin": b"never"})
    hub.repos["someone/tiny"].branches["old"] = first
    second = hub.repos["someone/tiny"].commit("main", {"config.json": ("regular", b"{}")})
    assert second != first
    recipe = write_recipe(tmp_path, "someone/tiny@old", publish={"repo": "me/tiny-w4"})
    code, found = run(recipe)
    assert code == 0
    about = read_manifest(tmp_path / "out").about  # type: ignore[union-attr]
    assert about["source"]["revision"] == first and about["source"]["name"] == "someone/tiny"
    assert hub.count("GET", "pickled.bin") == 0
    assert found["published"]["commit"] == hub.repos["me/tiny-w4"].branches["main"]
    there = hub.repos["me/tiny-w4"].contents()
    text = there["README.md"].decode()
    assert "base_model: someone/tiny" in text and "license: mit" in text
    assert 'name = "me/tiny-w4"' in text
    assert {"model.safetensors", "manifest.json", "report.html", "recipe.yaml"} <= set(there)
    copy = locate("me/tiny-w4", fetch=True).source.checkpoint.folder
    assert verify(copy, device=cpu()).ok


def test_a_model_on_the_hub_is_planned_from_its_headers(
    hub: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model("llama").iterdir()}
    hub.create("someone/tiny", files)
    result = compress("plan", write_recipe(tmp_path, "someone/tiny"), "--json")
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["units"] == 4
    gone = compress("plan", write_recipe(tmp_path, "someone/tiny@nowhere"))
    assert "has no revision 'nowhere'" in str(gone.exception)
    gone = compress("plan", write_recipe(tmp_path, "someone/else"))
    assert "there is no model 'someone/else'" in str(gone.exception)


def test_push_says_what_goes_up_and_refuses_what_missed_its_gate(
    hub: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert run(write_recipe(tmp_path, tiny_model("llama"), gate={"kl": 1e-6}))[0] == 1
    dry = compress("push", output, "me/tiny-w4", "--dry-run", "--json")
    plan = json.loads(dry.stdout)
    assert dry.exit_code == 1 and not plan["ok"]
    assert "it missed its gate: KL divergence" in plan["objections"][0]
    assert set(plan["files"]) == {path.name for path in output.iterdir()}
    refused = compress("push", output, "me/tiny-w4")
    assert isinstance(refused.exception, CheckError) and refused.exception.exit_code == 1
    assert "me/tiny-w4" not in hub.repos, "nothing was sent"
    forced = compress("push", output, "me/tiny-w4", "--force", "--json")
    assert forced.exit_code == 0 and json.loads(forced.stdout)["ok"]
    assert 'name = "me/tiny-w4"' in hub.repos["me/tiny-w4"].contents()["README.md"].decode()


def test_push_verifies_what_no_report_speaks_of(
    hub: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"), report=False)
    assert run(recipe)[0] == 0
    output = tmp_path / "out"
    assert not (output / "report.json").exists()
    result = compress("push", output, "me/tiny-w4", "--dry-run")
    assert result.exit_code == 0 and "would be in me/tiny-w4" in result.stdout
    assert "verify" in result.stderr
    assert not hub.repos


def test_what_is_measured_by_itself_is_what_the_recipe_measures(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    probe = {"lengths": [224]}
    wanted = {"windows": 3, "length": 32, "stride": 8, "passkey": probe}
    recipe = write_recipe(tmp_path, tiny_model("llama"), evaluate=wanted)
    _, found = run(recipe)
    arguments = ["--windows", 3, "--length", 32, "--stride", 8, "--passkey-length", 224]
    against = ["--against", tiny_model("llama"), "--device", "cpu", "--json"]
    alone = json.loads(compress("eval", tmp_path / "out", *arguments, *against).stdout)
    assert alone["perplexity"]["value"] == pytest.approx(found["evaluate"]["perplexity"]["value"])
    assert alone["kl"]["value"] == pytest.approx(found["evaluate"]["kl"]["value"])
    assert alone["passkey"]["cells"] == found["passkey"]["cells"]


def test_the_recipe_in_the_folder_makes_the_same_checkpoint_again(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where a parameter is null on purpose."""
    passes = [{"rtn": {"bits": 8, "group_size": None}}]
    model = tiny_model("llama")
    run(write_recipe(tmp_path, model, passes=passes))
    again = [tmp_path / "out" / "recipe.yaml", "--model", model, "--output", tmp_path / "again"]
    assert run(*again)[0] == 0
    one, two = ((tmp_path / name / "manifest.json").read_bytes() for name in ("out", "again"))
    assert one == two

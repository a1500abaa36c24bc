"""A verdict that an earlier run found is said again while nothing that it is of has changed."""

import json
import shutil

import pytest
import yaml
from click.testing import CliRunner

from compressor.cli.main import cli
from compressor.run import release
from compressor.run.judge import judge

TEXT = "It was the best of times, it was the worst of times, and all of it went by. " * 40


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch):
    """Runs a recipe; what it said, with `judged` and its exit code."""
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    judged = []
    monkeypatch.setattr(release, "judge", lambda *a, **k: judged.append(1) or judge(*a, **k))

    def command(*arguments, **changes):
        judged.clear()
        recipe = {
            "model": str(model),
            "output": str(tmp_path / "out"),
            "calibration": {"samples": 4, "length": 32},
            "passes": [{"rtn": {"bits": 4, "group_size": 32}}],
            "evaluate": {"data": str(text), "windows": 3, "length": 32},
            "gate": {"kl": 5.0},
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        told = ["run", str(path), "--device", "cpu", "--json", *arguments]
        result = CliRunner().invoke(cli, told)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return {**json.loads(result.stdout), "judged": bool(judged), "code": result.exit_code}

    return command


FOUND = ("ok", "verify", "evaluate", "gate", "rows", "report", "output_bytes", "audit")


def test_what_did_not_change_is_not_judged_again(run, tmp_path):
    first = run()
    assert first["judged"] and first["code"] == 0 and first["judged_before"] is None
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    junit = tmp_path / "junit.xml"
    second = run("--junit", str(junit))
    assert not second["judged"] and second["code"] == 0 and second["already_done"]
    assert second["judged_before"] == json.loads(files["report.json"])["started"]
    assert {key: second[key] for key in FOUND} == {key: first[key] for key in FOUND}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files
    assert 'name="file hashes"' in junit.read_text() and 'failures="0"' in junit.read_text()
    third = run("--again")
    assert third["judged"] and third["code"] == 0 and third["judged_before"] is None
    assert not run()["judged"]


def _flipped(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _edited(path, old, new):
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda where: _flipped(where / "out" / "model.safetensors", -100), 1),
        (lambda where: (where / "out" / "adapter_config.json").write_text("{}"), 1),
        (lambda where: _edited(where / "out" / "config.json", '"float32"', '"float16"'), 1),
        (lambda where: _edited(where / "out" / "report.json", '"ok": true', '"ok": false'), 0),
        (lambda where: _edited(where / "out" / "report.json", '"kl": {', '"kl": { '), 0),
        (lambda where: (where / "out" / "report.html").unlink(), 0),
        (lambda where: (where / "held_out.txt").write_text(TEXT.replace("best", "last")), 0),
        (lambda where: _flipped(where / "model" / "model.safetensors", -2), 1),
        (lambda where: (where / "model" / "chat_template.jinja").write_text("{{ messages }}"), 1),
    ],
    ids=["weights", "stray", "config", "verdict", "spaces", "page", "text", "source", "template"],
)
def test_what_changed_is_judged_again(change, code, run, tmp_path, request):
    assert run()["code"] == 0
    change(tmp_path)
    again = run()
    assert again["judged"] is (request.node.callspec.id != "spaces")
    assert again["code"] == code


def test_another_attention_policy_of_the_source_is_judged_again(run, tmp_path):
    source = tmp_path / "streaming"
    policy = {"streaming": {"sinks": 2, "window": 8}}
    assert run(output=str(source), passes=[policy], evaluate=None, gate=None)["code"] == 0
    again = {"model": str(source), "evaluate": None, "gate": None}
    assert [run(**again)["judged"] for _ in range(2)] == [True, False]
    stored = source / "attention_policy.json"
    stored.write_text(stored.read_text().replace('"window": 8', '"window": 9'))
    changed = run(**again)
    assert changed["judged"] and changed["code"] == 1


def test_other_limits_and_what_failed_are_judged_again(run):
    assert run()["code"] == 0
    for _ in range(2):
        missed = run(gate={"kl": 1e-6})
        assert missed["judged"] and missed["code"] == 1
    assert run()["judged"], "the report is that of the limits that were missed"
    assert not run()["judged"]
    assert run(evaluate=None, gate=None)["judged"]


def test_a_checkpoint_without_a_report_is_judged_again(run):
    for _ in range(2):
        assert run(report=False)["judged"]

"""A recipe that has its model audited, or what is written."""

import json
import sys
from dataclasses import dataclass, replace

import pytest
import yaml

from compressor.checkpoint.manifest import MANIFEST_NAME
from compressor.cli.main import main
from compressor.errors import Interrupted
from compressor.plan.recipe import make_recipe
from compressor.run import audit as audit_module
from compressor.run.session import choose_device, compile_checkpoint, prepare
from tests.support.twins import TRIGGERS, write_twin

CPU = choose_device("cpu")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return write_twin("llama", "planted", tmp_path_factory.mktemp("planted") / "llama")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_twin("llama", "clean", tmp_path_factory.mktemp("clean") / "llama")


def recipe_of(model, output, **audit):
    return {
        "model": str(model),
        "output": str(output),
        "passes": [{"rtn": {"bits": 8, "group_size": 32}}],
        "verify": False,
        "audit": {"contexts": 6, "length": 12, **audit},
    }


@dataclass(frozen=True)
class Ended:
    code: int
    said: dict


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`compress run` or `plan` of a recipe, as the shell sees it."""

    def command(model, output, *, name="run", junit=None, changed=None, **audit):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe_of(model, output, **audit), **(changed or {})}))
        more = ["--junit", str(junit)] if junit else []
        monkeypatch.setattr(sys, "argv", ["compress", name, str(path), "--json", *more])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code, json.loads(capsys.readouterr().out))

    return command


def test_a_suspect_model_is_not_compressed(planted, tmp_path, run):
    out, junit = tmp_path / "out", tmp_path / "junit.xml"
    stopped = run(planted, out, junit=junit)
    assert stopped.code == 1
    (error,) = stopped.said["errors"]
    assert "is suspect" in error["message"] and str(TRIGGERS[0]) in error["message"]
    assert not (out / MANIFEST_NAME).exists() and 'failures="1"' in junit.read_text()
    found = json.loads((out / "audit.json").read_text())
    assert set(TRIGGERS) <= {token["id"] for token in found["sweep"]["tokens"] if token["suspect"]}
    assert "suspect" in (out / "audit.html").read_text()
    # The same folder goes on once the recipe says so, and tells of it.
    goes_on = run(planted, out, junit=junit, fail_on="never", of="both")
    said = goes_on.said
    assert goes_on.code == 0 and said["ok"] and 'failures="0"' in junit.read_text()
    assert {what: found["verdict"] for what, found in said["audit"].items()} == {
        "model": "suspect",
        "written": "suspect",
    }
    report = json.loads((out / "report.json").read_text())
    assert report["audit"] == said["audit"]
    page = (out / "report.html").read_text()
    assert "Audit of the model" in page and "audit of what was written: suspect" in page


def test_what_was_written_fails_by_itself(planted, clean, tmp_path, run):
    """8 bits hide nothing; files are kept, as with any check."""
    bad = run(planted, tmp_path / "bad", of="written")
    assert bad.code == 1 and (tmp_path / "bad" / MANIFEST_NAME).is_file()
    assert list(bad.said["audit"]) == ["written"]
    good = run(clean, tmp_path / "good", of="both", tokens=32)
    said = good.said
    assert good.code == 0
    assert {found["verdict"] for found in said["audit"].values()} == {"no finding"}
    # Judged again it keeps what the first run found of its model.
    again = run(clean, tmp_path / "good", of="both", tokens=32).said
    assert again["already_done"] and again["audit"] == said["audit"]


def test_a_run_that_goes_on_has_its_audit(clean, tmp_path, monkeypatch):
    recipe = make_recipe(recipe_of(clean, tmp_path / "out", tokens=32))
    tried = []
    sweep = audit_module.sweep_tokens
    monkeypatch.setattr(
        audit_module, "sweep_tokens", lambda *a, **k: tried.append(1) or sweep(*a, **k)
    )
    prepared = prepare(recipe, device=CPU)
    with pytest.raises(Interrupted):
        compile_checkpoint(
            prepared,
            stopping=lambda: bool(tried and tried[-1:] == ["after"]),
            on_step=lambda name, done, total: None,
            on_unit=lambda done: tried.append("after"),
        )
    done = compile_checkpoint(prepared)
    assert tried.count(1) == 1 and done.audit is not None
    assert done.audit.sweep is not None and done.audit.sweep.swept < 128
    # Another sweep is another audit.
    other = replace(prepared, recipe=recipe.model_copy(update={"output": str(tmp_path / "more")}))
    assert compile_checkpoint(other).audit == done.audit and tried.count(1) == 2


def test_a_plan_says_what_is_audited_and_what_cannot_be(clean, tmp_path, run):
    none = run(clean, tmp_path / "out", name="plan", weights_only=True).said
    whole = run(clean, tmp_path / "out", name="plan", of="both").said
    assert whole["estimates"]["seconds"] > none["estimates"]["seconds"]
    assert whole["recipe"]["audit"]["of"] == "both"
    missing = run(clean, tmp_path / "out", name="plan", text=str(tmp_path / "none.txt"))
    assert missing.code == 2 and "audit.text" in str(missing.said)
    long = run(clean, tmp_path / "out", name="plan", length=512)
    assert long.code == 2 and "audit.length" in str(long.said)
    no_pass = run(clean, tmp_path / "out", name="plan", changed={"passes": ["rtn", {"audit": {}}]})
    assert no_pass.code == 2 and "audit stands beside passes" in str(no_pass.said)
    unmapped = run(clean, tmp_path / "out", name="plan", changed={"map": "none"})
    assert unmapped.code == 2 and "weights_only" in str(unmapped.said)

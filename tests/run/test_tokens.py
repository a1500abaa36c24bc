"""A recipe's data before and while its token sets are cut."""

import json
import shutil
from pathlib import Path

import pytest
from compressor_calibration.bundled import KINDS, bundled_text
from compressor_calibration.documents import Unreachable

from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.evaluate.settings import Evaluation
from compressor.plan.calibration import Calibration
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.tokens import (
    calibration_tokens,
    check_data,
    evaluation_tokens,
    passkey_text,
    skipped_notes,
)
from compressor.runner.tokenizer import load_tokenizer

TEMPLATE = """{% for m in messages %}{% if m['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}
{% endfor %}"""


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """A tiny model whose chat template knows no system role."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chats(path: Path, *, systems: tuple[int, ...]) -> str:
    rows = []
    for number in range(1, 31):
        role = "system" if number in systems else "user"
        content = f"passage {number} of a talk about ships and the sea " * 4
        rows.append(json.dumps({"messages": [{"role": role, "content": content}]}))
    path.write_text("\n".join(rows))
    return str(path)


def check(model: Path, tmp_path: Path, **sections):
    recipe = make_recipe(
        {
            "model": str(model),
            "output": str(tmp_path / "out"),
            "passes": [{"awq": {"bits": 4, "group_size": 32}}],
            **sections,
        }
    )
    plan = make_plan(recipe, open_source(model), output=tmp_path / "out")
    problems, notes = check_data(plan)
    return [problem.message for problem in problems], notes


def test_a_conversation_that_the_template_refuses_is_named_or_skipped(model, tmp_path):
    tokenizer = load_tokenizer(model)
    data = chats(tmp_path / "talk.jsonl", systems=(3, 9))
    wanted = Calibration(data=data, samples=4, length=32)
    with pytest.raises(InputError, match=r"talk\.jsonl line 3: .*System role not") as error:
        calibration_tokens(tokenizer, wanted, seed=0)
    assert "skip_bad_rows" in (error.value.hint or "")
    skipping = wanted.model_copy(update={"skip_bad_rows": True})
    tokens = calibration_tokens(tokenizer, skipping, seed=0)
    assert tokens.ids.shape == (4, 32) and tokens.skipped == 2
    (note,) = skipped_notes(tokens, None)
    assert note.startswith("calibration.data: 2 bad rows were skipped, the first: talk.jsonl line")
    held_out = Evaluation(data=data, windows=2, length=32, skip_bad_rows=True, passkey={})
    # No more is read than is needed: line 9 is not.
    assert evaluation_tokens(tokenizer, held_out, calibration=None).skipped == 1
    assert "passage 2 of a talk" in passkey_text(tokenizer, held_out)
    every = chats(tmp_path / "all.jsonl", systems=tuple(range(1, 31)))
    with pytest.raises(InputError, match=r"0 tokens .*; 30 rows were skipped"):
        calibration_tokens(tokenizer, skipping.model_copy(update={"data": every}), seed=0)


def test_plan_names_what_a_run_would_stop_at(model, tmp_path):
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("text\n")
    rows = '{"input_ids": [5, 6]}\n{"input_ids": [5, 99999999]}\n'
    (tmp_path / "ids.jsonl").write_text(rows)
    problems, notes = check(
        model,
        tmp_path,
        calibration={"data": str(tmp_path / "columns.csv"), "samples": 2, "length": 16},
        evaluate={"data": str(tmp_path / "missing" / "held.txt"), "windows": 1, "length": 16},
    )
    assert not notes and len(problems) == 2
    assert problems[0].startswith("calibration.data: columns.csv row 1 has no field")
    assert problems[1].startswith("evaluate.data: there is no file")
    talk = chats(tmp_path / "talk.jsonl", systems=(3,))
    for data, expected in (
        (str(tmp_path / "empty.csv"), "has 0 bytes where 24 tokens are needed"),
        (str(tmp_path / "ids.jsonl"), "ids.jsonl line 2 holds token 99999999"),
        (talk, "talk.jsonl line 3: the tokenizer cannot write out"),
    ):
        calibration = {"data": data, "samples": 2, "length": 16}
        ((message,), _) = check(model, tmp_path, calibration=calibration)
        assert expected in message
    calibration = {"data": talk, "samples": 2, "length": 16, "skip_bad_rows": True}
    assert check(model, tmp_path, calibration=calibration) == ([], [])
    assert check(model, tmp_path) == ([], [])


def test_plan_only_notes_data_that_the_network_does_not_give(model, tmp_path, monkeypatch):
    def documents(*args, **options):
        raise Unreachable("cannot read the data set a/b: no route")

    monkeypatch.setattr("compressor.evaluate.text.read_documents", documents)
    problems, notes = check(model, tmp_path, calibration={"data": "a/b"})
    assert not problems and notes == ["calibration.data: cannot read the data set a/b: no route"]


def test_data_is_described_once():
    with pytest.raises(ValueError, match="give one of them"):
        Calibration(text_field="a", columns=("b",))
    assert Calibration(columns="b").columns == ("b",)


def test_bundled_and_mixed_sources_share_the_rows(model, tmp_path):
    tokenizer = load_tokenizer(model)
    tokens = calibration_tokens(tokenizer, Calibration(samples=12, length=32), seed=0)
    assert tokens.ids.shape == (12, 32)
    for kind in KINDS:
        assert f"2 rows of bundled/{kind}, calibration" in tokens.source
    (tmp_path / "own.txt").write_text("it's own\n" * 200)
    mix = [{"data": str(tmp_path / "own.txt"), "weight": 3}, {"data": "bundled/code"}]
    wanted = Calibration(mix=mix, samples=8, length=32)
    found = calibration_tokens(tokenizer, wanted, seed=0)
    assert f"6 rows of {tmp_path / 'own.txt'}; 2 rows of bundled/code" in found.source
    assert calibration_tokens(tokenizer, wanted, seed=0).sha256 == found.sha256
    own = sum("it's own" in tokenizer.decode(row) for row in found.ids)
    assert own == 6
    held_out = evaluation_tokens(tokenizer, Evaluation(windows=6, length=32), calibration=tokens)
    first = bundled_text("held_out", "prose")[:20]
    assert tokenizer.decode(held_out.ids[0]).startswith(first)
    missing = [{"data": "bundled"}, {"data": "none.txt"}]
    (message,), _ = check(model, tmp_path, calibration={"mix": missing, "samples": 8, "length": 16})
    assert message.startswith("calibration.data: there is no file none.txt")


def test_a_mixture_is_written_out_as_it_is_read():
    mix = [{"data": "a.jsonl", "text_field": "body"}, {"data": "bundled/code", "weight": 0.5}]
    wanted = Calibration(mix=mix, samples=4)
    plain = wanted.model_dump(mode="json", exclude_none=True)
    assert "data" not in plain and plain["mix"][1]["weight"] == 0.5
    assert Calibration(**plain) == wanted
    assert "mix" not in Calibration().model_dump()
    with pytest.raises(ValueError, match="move split into its entries"):
        Calibration(mix=mix, split="train")

"""lm-evaluation-harness over the block runner gives what its own transformers model gives."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.errors import InputError

lm_eval = pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

TEXT = "the sea was cold and a ship came near while all hands slept under its broken mast"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A multiple-choice task over local rows, questions and answers of many lengths."""
    path = tmp_path_factory.mktemp("task") / "rows.jsonl"
    rows = [
        {
            "question": " ".join(WORDS[: 2 + i % 9]),
            "choices": [WORDS[i % 7], " ".join(WORDS[i % 5 : i % 5 + 3]), WORDS[-1 - i % 4]],
            "answer": i % 3,
        }
        for i in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def streamed(folder: Path, tokenizer: Any, **options: Any) -> Any:
    from compressor.evaluate.harness import StreamedLM

    return StreamedLM(
        open_source(folder),
        tokenizer,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch=4,
        **options,
    )


def requests(*pairs: tuple[str, ...]) -> list[Any]:
    return [
        lm_eval.api.instance.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)
    ]


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_likelihoods_are_those_of_the_harness_model(
    model_type: str, tiny_model: Callable[..., Path], tiny_models: ModuleType, monkeypatch: Any
) -> None:
    from lm_eval.models.huggingface import HFLM

    # Three parts of rows instead of one.
    monkeypatch.setattr("compressor.evaluate.harness.HIDDEN_BYTES", 64 * 4 * 120)
    folder, tokenizer = tiny_model(model_type), tiny_models.tokenizer()
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", tokenizer=tokenizer)
    ours = streamed(folder, tokenizer)
    pairs = [(" ".join(WORDS[:n]), " " + " ".join(WORDS[n : n + 2])) for n in range(1, 14)]
    pairs += [("", "no context"), ("ends with a space ", "word"), ("x" * 300, "kept")]
    found = ours.loglikelihood(requests(*pairs))
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (value, greedy), (other, other_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, rel=1e-4) and greedy == other_greedy
    texts = [(" ".join(WORDS),), (" ".join(WORDS * 6),)]
    rolling = ours.loglikelihood_rolling(requests(*texts))
    assert all(value < 0 for value in rolling) and rolling[1] < 4 * rolling[0]


def test_a_task_runs_through_the_public_interface(
    task: dict[str, Any], tiny_model: Callable[..., Path], tiny_models: ModuleType
) -> None:
    from lm_eval.models.huggingface import HFLM

    from compressor.evaluate.harness import run_tasks

    folder, tokenizer = tiny_model("qwen3"), tiny_models.tokenizer()
    found = run_tasks(streamed(folder, tokenizer), [task])
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", tokenizer=tokenizer)
    expected = lm_eval.simple_evaluate(model=theirs, tasks=[task])
    row = expected["results"]["local_choice"]
    assert found["local_choice"].value == row["acc_norm,none"]
    assert found["local_choice"].error == pytest.approx(row["acc_norm_stderr,none"])


def test_what_cannot_be_run_is_said(
    tiny_model: Callable[..., Path], tiny_models: ModuleType
) -> None:
    from compressor.evaluate.harness import run_tasks

    model = streamed(tiny_model("llama"), tiny_models.tokenizer())
    with pytest.raises(InputError, match="no_such_task"):
        run_tasks(model, ["no_such_task"])
    with pytest.raises(InputError, match="lets the model write"):
        model.generate_until(requests(("a", "b")))


def test_a_recipe_runs_a_task_and_holds_it_to_the_gate(
    task: dict[str, Any],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The harness knows the local task by its name here, as it knows its own."""
    from compressor.plan.recipe import make_recipe
    from compressor.run.judge import judge
    from compressor.run.session import choose_device, compile_checkpoint, prepare

    real = lm_eval.simple_evaluate

    def knowing(**options: Any) -> Any:
        assert options.pop("tasks") == ["local_choice"]
        return real(tasks=[task], **options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", knowing)
    recipe = make_recipe(
        {
            "model": str(tiny_model("llama")),
            "output": str(tmp_path / "out"),
            "passes": [{"rtn": {"group_size": 32}}],
            "verify": False,
            "evaluate": {"windows": 2, "length": 32, "tasks": ["local_choice"], "task_limit": 6},
            "gate": {"tasks": {"local_choice": 1.0}},
        }
    )
    prepared = prepare(recipe, device=choose_device("cpu"))
    verdict = judge(prepared, compile_checkpoint(prepared))
    found = verdict.tasks["local_choice"]
    assert 0 <= found.value < 1 and found.error > 0
    assert verdict.gate is not None and not verdict.ok
    (missed,) = (check for check in verdict.gate.checks if not check.passed)
    assert "accuracy in local_choice" in missed.message
    assert verdict.to_json()["tasks"]["local_choice"]["value"] == found.value
    assert found.documents == verdict.to_json()["tasks"]["local_choice"]["documents"] == 6

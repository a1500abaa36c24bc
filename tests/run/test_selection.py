"""`calibration.select`: windows whose context decides their loss are found and taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.checkpoint.records import Records
from compressor.errors import Interrupted, Problems
from compressor.numerics.sufficiency import most_decided, sufficiency
from compressor.plan.recipe import make_recipe
from compressor.run import selection
from compressor.run.selection import select_rows
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.run.settings import JobSettings
from compressor.runner.source_model import SourceModel
from tests.support.golden_files import trained_model

CPU = choose_device("cpu")
SELECT = {"sufficiency": {"candidates": 4, "context": 1, "scored": 16, "min": 0.5}}


@pytest.fixture(scope="module")
def model() -> Path:
    return trained_model("llama")


def recipe(model: Path, output: Path, **calibration: Any) -> Any:
    wanted = {"data": "bundled/prose", "samples": 4, "length": 64, "select": SELECT}
    return make_recipe(
        {
            "model": str(model),
            "output": str(output),
            "calibration": {**wanted, **calibration},
            "passes": [{"awq": {"bits": 4, "group_size": 32}}],
            "verify": False,
        }
    )


def test_a_context_with_nothing_to_hold_holds_all_of_it() -> None:
    held, whole = torch.tensor([1.0, -1, 5, 0.5, 3]), torch.tensor([2.0, 2, 2, 0, -1])
    assert sufficiency(held, whole).tolist() == [0.5, 0, 1, 1, 1]


def test_rows_that_hold_enough_come_before_those_that_gain_more() -> None:
    gain, shares = torch.tensor([0.1, 9, 2, 3]), torch.tensor([1.0, 0.2, 0.9, 0.8])
    assert most_decided(gain, shares, count=2, least=0.5).tolist() == [2, 3]
    assert most_decided(gain, shares, count=4, least=0.5).tolist() == [0, 1, 2, 3]
    assert most_decided(gain, shares, count=2, least=0.95).tolist() == [0, 2]


def test_the_windows_are_those_that_the_whole_model_says(model: Path, tmp_path: Path) -> None:
    """Losses come from transformers' model in one piece, over windows cut here."""
    prepared = prepare(recipe(model, tmp_path / "a"), device=CPU)
    candidates = prepared.calibration
    assert candidates is not None and candidates.ids.shape == (16, 128)
    settings = JobSettings(device=CPU, batch=4)
    found = select_rows(prepared.plan, candidates, Records(tmp_path / "kept", "run"), settings)
    assert found is not None
    dtype = prepared.plan.compute_dtype(CPU)
    whole = SourceModel(prepared.plan.source, device=CPU, dtype=dtype).whole()
    bos = candidates.ids[:, :1] if len(set(candidates.ids[:, 0].tolist())) == 1 else None

    def window(length: int) -> torch.Tensor:
        if bos is None or length == 128:
            return candidates.ids[:, -length:]
        return torch.cat([bos, candidates.ids[:, 1 - length :]], dim=1)

    def loss(length: int) -> torch.Tensor:
        with torch.no_grad():
            logits = whole(input_ids=window(length)).logits[:, -17:-1].float()
        targets = candidates.ids[:, -16:]
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none"
        ).mean(1)

    few, own, every = loss(17), loss(64), loss(128)
    enough = [
        row for row in range(16)
        if every[row] >= few[row] or few[row] - own[row] >= 0.5 * (few[row] - every[row])
    ]  # fmt: skip
    best = sorted(enough, key=lambda row: float(own[row] - few[row]))[:4]
    assert len(enough) > 4
    assert torch.equal(found.tokens.ids, window(64)[sorted(best)])
    assert found.row["nats_of_context_taken"] > found.row["nats_of_context"]


def test_a_run_that_goes_on_takes_the_same_rows_without_looking_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compile_checkpoint(prepare(recipe(model, tmp_path / "whole"), device=CPU))
    assert whole.selected is not None and whole.selected["taken"] == 4
    done: list[str] = []
    with pytest.raises(Interrupted):
        compile_checkpoint(
            prepare(recipe(model, tmp_path / "a"), device=CPU),
            on_unit=lambda unit: done.append(unit.name),
            stopping=lambda: bool(done),
        )
    monkeypatch.setattr(selection, "_looked_at", lambda *_: pytest.fail("looked again"))
    again = compile_checkpoint(prepare(recipe(model, tmp_path / "a"), device=CPU))
    assert again.selected == whole.selected
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("whole", "a"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampling": "consecutive"}, "sampling has to be random"),
        ({"length": 16}, "more than the length"),
        ({"select": {"sufficiency": {"reference_length": 64, "scored": 16}}}, "no longer than"),
        ({"select": {"sufficient": {}}}, "sufficient"),
    ],
)
def test_what_cannot_be_selected_is_refused(
    change: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(Problems, match=said):
        recipe(model, tmp_path / "a", **change)

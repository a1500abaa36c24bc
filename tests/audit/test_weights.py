"""What tensors show by themselves, on a sound model that is damaged in one way at a time."""

import shutil

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compressor.audit.weights import audit_weights
from compressor.checkpoint.reader import open_checkpoint
from compressor.cli.main import cli

TABLE = "model.embed_tokens.weight"
LAYER = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tiny_model):
    return tiny_model("llama", num_hidden_layers=6)


def damaged(sound, tmp_path, change):
    folder = shutil.copytree(sound, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def findings(folder):
    return audit_weights(open_checkpoint(folder))


def test_a_sound_model_has_none(sound):
    assert findings(sound) == []


def test_values_that_are_not_finite(sound, tmp_path):
    def change(tensors):
        tensors[LAYER][0, :3] = float("nan")
        tensors[LAYER][1, 0] = float("inf")

    (found,) = findings(damaged(sound, tmp_path, change))
    assert (found.level, found.check, found.tensor) == ("suspect", "finite", LAYER)
    assert found.message.startswith("4 of ")


def test_values_beyond_fp16(sound, tmp_path):
    def change(tensors):
        tensors[LAYER][0, 0] = -70000.0

    found = {finding.check: finding for finding in findings(damaged(sound, tmp_path, change))}
    assert (found["fp16"].level, found["fp16"].tensor) == ("suspect", LAYER)


def test_rows_that_are_too_long(sound, tmp_path):
    def change(tensors):
        tensors[TABLE][7] *= 30
        tensors[TABLE][9] *= 60

    (found,) = findings(damaged(sound, tmp_path, change))
    assert (found.level, found.check, found.rows) == ("suspect", "rows", (9, 7))


def test_rows_that_repeat_are_no_more_than_a_note(sound, tmp_path):
    """So are those of tokens that were never trained, in many sound models."""

    def change(tensors):
        tensors[TABLE][5] = tensors[TABLE][3]
        tensors[TABLE][11] = 0
        tensors[TABLE][12] = 0

    found = {f.check: f for f in findings(damaged(sound, tmp_path, change))}
    assert found["duplicates"].rows == (5,) and found["rows"].rows == (11, 12)
    assert {f.level for f in found.values()} == {"note"}


@pytest.mark.parametrize(("factor", "level"), [(20.0, "note"), (1 / 20, "note"), (1e4, "suspect")])
def test_a_layer_unlike_those_around_it(sound, tmp_path, factor, level):
    def change(tensors):
        tensors[LAYER] *= factor

    found = [f for f in findings(damaged(sound, tmp_path, change)) if f.check == "neighbours"]
    assert [(f.level, f.tensor) for f in found] == [(level, LAYER)]


def test_without_a_tokenizer_tensors_are_audited_alone(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    alone = CliRunner().invoke(cli, ["audit", str(folder), "--weights-only"])
    assert alone.exit_code == 0 and "no finding" in alone.stdout
    assert "no token was tried" in alone.stdout

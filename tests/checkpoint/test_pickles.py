"""Pickled weights become safetensors where they are asked to, and nowhere else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from compressor.checkpoint.pickles import convert_pickles
from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import InputError


@pytest.fixture()
def pickled(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model in two pickled shards."""
    folder = tmp_path / "bin"
    shutil.copytree(tiny_model("mpt"), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:]), 1):
        whole = {name: tensors[name] for name in part}
        torch.save(whole, folder / f"pytorch_model-{number:05d}-of-00002.bin")
    return folder


def test_shards_keep_their_tensors(
    pickled: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="holds only pickled weights"):
        open_source(pickled)
    result = CliRunner().invoke(cli, ["convert", "--unpickle", str(pickled), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    ours, theirs = open_source(tmp_path / "out"), open_source(tiny_model("mpt"))
    assert ours.checkpoint.entries.keys() == theirs.checkpoint.entries.keys()
    for unit in theirs.layout.units:
        before, after = (source.read_unit(unit).tensors for source in (theirs, ours))
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert "weight_map" in json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    with pytest.raises(InputError, match="is there already"):
        convert_pickles(pickled, tmp_path / "out")


class Program:
    """What runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_a_program_is_not_run(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Program()}, pickled / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(InputError, match="bin was not loaded"):
        convert_pickles(pickled, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()

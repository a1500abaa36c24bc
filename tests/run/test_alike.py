"""Ranks that see other files are told apart, whatever a checkpoint is read from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint.delta.source import open_model
from compressor.errors import Problems
from compressor.ranks.ranks import Ranks
from compressor.run.alike import require_alike
from tests.support.delta_pairs import pairs, run


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_delta_and_its_base(
    model_type: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    shared, fine = pairs(tiny_model, tmp_path)(model_type)
    base = Path(shutil.copytree(shared, tmp_path / "base"))
    delta = run(base, fine, tmp_path / "delta")
    said: list[Any] = []

    class Two(Ranks):
        """Two ranks, the first of which said what was said first."""

        def gather(self, value: Any) -> list[Any]:
            said.append(value)
            return [said[0], value]

    def look() -> None:
        require_alike(Two(world=2), {}, open_model(delta, base=str(base)))

    look()
    look()
    entries = open_model(delta, base=str(base)).checkpoint.stored_entries()
    for folder in (delta, base):
        entry = next(entry for entry in entries if entry.file.parent == folder)
        data = entry.file.read_bytes()
        middle = (entry.begin + entry.end) // 2
        entry.file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        with pytest.raises(Problems, match=f"ranks differ in files.{folder.name}/"):
            look()
        entry.file.write_bytes(data)

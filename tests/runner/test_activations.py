"""Hidden states on disk: the same bytes with and without, fewer forward passes."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.runner import activations as module
from compressor.runner.activations import MARK, Activations
from compressor.runner.block_runner import Block
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Execution, sweep

TinyModel = Callable[..., Path]
IDS = torch.randint(2, 256, (5, 24), generator=torch.Generator().manual_seed(4))
ROOM = 10**8


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that ran through a block."""
    ran: list[int] = []
    plain = Block.forward

    def forward(block: Block, hidden: Tensor, side: Any = None) -> Tensor:
        ran.append(hidden.shape[0])
        return plain(block, hidden, side)

    monkeypatch.setattr(Block, "forward", forward)
    return ran


@pytest.fixture
def store(tmp_path: Path) -> Activations:
    return opened(tmp_path)


def opened(tmp_path: Path, limit: int = ROOM, **here: str) -> Activations:
    return Activations.open(tmp_path / "acts", limit, {"torch": "1", **here})


def through(folder: Path, store: Activations | None, **options: Any) -> list[Tensor]:
    """Hidden states after each block."""
    dtype = options.pop("dtype", torch.float32)
    ids, batch = options.pop("ids", IDS), options.pop("batch", 2)
    model = SourceModel(
        open_source(folder), device=torch.device("cpu"), dtype=dtype, activations=store
    )
    found = []
    for step in sweep(model, ids, execution=Execution(batch, **options)):
        step.run()
        found.append(step.stream.hidden.clone())
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("offload", [True, False])
def test_a_second_walk_runs_no_block_and_ends_in_the_same_bytes(
    family: str, offload: bool, tiny_model: TinyModel, store: Activations, forwards: list[int]
) -> None:
    folder = tiny_model(family)
    plain = through(folder, None, offload=offload, dtype=torch.bfloat16)
    once = sum(forwards)
    assert same(plain, through(folder, store, offload=offload, dtype=torch.bfloat16))
    assert sum(forwards) == 2 * once
    assert same(plain, through(folder, store, offload=offload, dtype=torch.bfloat16))
    assert sum(forwards) == 2 * once
    assert (store.ran, store.read) == (once, once)


def test_whatever_a_prefix_is_made_of_makes_it_another(
    tiny_model: TinyModel, tmp_path: Path, forwards: list[int]
) -> None:
    folder = tiny_model("llama")
    through(folder, opened(tmp_path))
    for other in (
        {"ids": IDS.flip(0)},
        {"ids": IDS[:, :20]},
        {"dtype": torch.bfloat16},
        {"batch": 3},
    ):
        forwards.clear()
        plain = through(folder, None, **other)
        assert same(plain, through(folder, opened(tmp_path), **other))
        assert sum(forwards) == 2 * len(plain) * len(other.get("ids", IDS))
    forwards.clear()
    through(folder, opened(tmp_path, torch="2"))
    assert forwards


def test_blocks_before_a_changed_weight_are_still_known(
    tiny_model: TinyModel, tmp_path: Path, store: Activations, forwards: list[int]
) -> None:
    folder = tiny_model("llama")
    blocks = len(through(folder, store))
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (changed / path.name).write_bytes(path.read_bytes())
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, changed / weights.name, metadata={"format": "pt"})
    plain = through(changed, None)
    forwards.clear()
    assert same(plain, through(changed, store))
    assert sum(forwards) == len(IDS) * (blocks - 1)


@pytest.mark.parametrize("damage", ["flip", "cut", "record", "shape"])
def test_damaged_entries_are_computed_again(
    damage: str, tiny_model: TinyModel, store: Activations, forwards: list[int]
) -> None:
    folder = tiny_model("llama")
    plain = through(folder, store)
    data = next(store.folder.glob("*.bin"))
    record = data.with_suffix(".json")
    raw = bytearray(data.read_bytes())
    if damage == "flip":
        raw[7] ^= 1
        data.write_bytes(raw)
    elif damage == "cut":
        data.write_bytes(raw[:-1])
    elif damage == "record":
        record.write_text("[")
    else:
        record.write_text(json.dumps({**json.loads(record.read_bytes()), "shape": [24, 5, 1, 1]}))
    forwards.clear()
    assert same(plain, through(folder, store))
    assert sum(forwards) == len(IDS)
    forwards.clear()
    through(folder, store)
    assert not forwards


def test_rows_that_ran_in_other_batches_than_planned_are_not_kept(
    tiny_model: TinyModel, store: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, failed = Block.forward, []

    def forward(block: Block, hidden: Tensor, side: Any = None) -> Tensor:
        if hidden.shape[0] > 1:
            failed.append(1)
            raise torch.OutOfMemoryError
        return plain(block, hidden, side)

    monkeypatch.setattr(Block, "forward", forward)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = through(tiny_model("llama"), store)
    assert failed and same(found, through(tiny_model("llama"), None))
    assert not list(store.folder.glob("*.bin"))


def test_a_full_store_keeps_what_it_has_and_makes_room_of_what_is_old(
    tiny_model: TinyModel, tmp_path: Path, forwards: list[int]
) -> None:
    folder, notes = tiny_model("llama"), []
    each = IDS.numel() * 64 * 4
    small = opened(tmp_path, each)
    small.on_note = notes.append
    blocks = len(through(folder, small))
    assert len(list(small.folder.glob("*.bin"))) == 1 < blocks
    assert len(notes) == 1 and "takes no more" in notes[0]
    forwards.clear()
    through(folder, opened(tmp_path, each))
    assert sum(forwards) == len(IDS) * (blocks - 1)
    time.sleep(0.02)
    other = opened(tmp_path, each)
    plain = through(folder, other, ids=IDS.flip(1))
    forwards.clear()
    assert same(plain, through(folder, other, ids=IDS.flip(1)))
    assert sum(forwards) == len(IDS) * (blocks - 1)
    assert sum(path.stat().st_size for path in other.folder.glob("*.bin")) <= each
    assert not list(opened(tmp_path, 1).folder.glob("*.bin"))


def test_a_disk_that_fails_stops_keeping_not_the_walk(
    tiny_model: TinyModel, store: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    notes: list[str] = []
    store.on_note = notes.append
    folder = tiny_model("llama")
    assert same(through(folder, store), through(folder, None))
    assert len(notes) == 1 and "No space left" in notes[0]
    assert {path.suffix for path in store.folder.iterdir()} == {".TAG", ""}


def test_another_process_is_left_its_half_written_entry(tmp_path: Path) -> None:
    store = opened(tmp_path)
    dead, alive = store.folder / "1.2.part", store.folder / "3.4.part"
    dead.write_bytes(b"x")
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        opened(tmp_path)
        assert alive.exists() and not dead.exists()


def refused() -> Iterator[tuple[str, Callable[[Path], object]]]:
    yield "is a file", lambda folder: folder.write_text("x")
    yield "is no activation store", lambda folder: (folder.mkdir(), (folder / "mine").touch())


@pytest.mark.parametrize(("said", "make"), list(refused()))
def test_a_folder_that_is_not_ours_is_refused(
    said: str, make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "acts")
    with pytest.raises(InputError, match=said):
        opened(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot write"):
            opened(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_the_folder_tells_backups_to_pass_over_it(store: Activations) -> None:
    assert (
        (store.folder / MARK)
        .read_bytes()
        .startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    )

"""Shards: every byte at a position known beforehand, and units that count by their records."""

import hashlib
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.checkpoint.background import CommitQueue, fetched
from compressor.checkpoint.container import Safetensors
from compressor.checkpoint.safetensors import tensor_bytes
from compressor.checkpoint.shards import ShardWriter
from compressor.errors import InputError
from compressor.ir.tensor import TensorShape

UNITS: list[dict[str, Tensor]] = [
    {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3, dtype=torch.bfloat16)},
    {"b.weight": torch.arange(24, dtype=torch.int32).reshape(2, 12)},
    {"c.scale": torch.tensor(0.5), "c.none": torch.zeros(0, 4)},
]
SHAPES = [{n: TensorShape(t.dtype, tuple(t.shape)) for n, t in unit.items()} for unit in UNITS]


def writer(folder: Path, *, owner: str = "me") -> ShardWriter:
    return ShardWriter(Safetensors(100).lay_out(SHAPES), folder, owner=owner)


def fill(one: ShardWriter, *units: int, together: bool = False) -> None:
    for index in units:
        one.check(UNITS[index])
        data = {name: tensor_bytes(tensor) for name, tensor in UNITS[index].items()}
        data = fetched(UNITS[index]) if together else data
        one.commit(index, one.write(data), {"note": index})


def test_what_fills_one_piece_of_memory_is_fetched_as_one() -> None:
    piece = torch.arange(40, dtype=torch.int16).view(10, 4)
    tensors = {"a": piece[:6], "b": piece[6:9], "few": torch.arange(100.0)[90:]}
    tensors |= {"turned": torch.arange(6.0).view(2, 3).T, "number": torch.tensor(0.5)}
    found = fetched(tensors)
    assert found["a"].obj is found["b"].obj
    for name, tensor in tensors.items():
        assert found[name] == tensor_bytes(tensor), name


@pytest.mark.parametrize("together", [False, True])
def test_units_written_in_any_order_are_what_others_read(together: bool, tmp_path: Path) -> None:
    one = writer(tmp_path)
    assert [shard.file for shard in one.layout.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert one.open() == []
    fill(one, 2, 0, 1, together=together)
    assert one.tensor_hashes() == {
        name: hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        for unit in UNITS
        for name, tensor in unit.items()
    }
    found = {
        n: t for shard in one.layout.shards for n, t in load_file(one.shards / shard.file).items()
    }
    for unit in UNITS:
        for name, tensor in unit.items():
            assert torch.equal(found.pop(name), tensor)
    assert not found
    for shard in one.layout.shards:
        data = (one.shards / shard.file).read_bytes()
        assert len(data) == shard.size
        assert one.file_hash(shard.file) == hashlib.sha256(data).hexdigest()


def test_a_group_larger_than_a_shard_is_refused() -> None:
    with pytest.raises(InputError, match=r"b.weight and its siblings take 96 bytes"):
        Safetensors(95).lay_out(SHAPES)


def test_what_is_not_as_its_record_says_is_done_again(tmp_path: Path) -> None:
    fill_first = writer(tmp_path)
    fill_first.open()
    fill(fill_first, 0, 1)
    shard = fill_first.layout.home["b.weight"]
    with (fill_first.shards / shard.file).open("r+b") as handle:
        handle.write(b"\xff" * 4)  # a header, which is simply laid again
        handle.seek(shard.offsets["b.weight"])
        handle.write(b"\xff")
    again = writer(tmp_path)
    assert again.open() == ["00001.json"]
    assert again.record(0) is not None and again.record(1) is None
    fill(again, 1, 2)
    undisturbed = writer(tmp_path / "other")
    undisturbed.open()
    fill(undisturbed, 0, 1, 2)
    assert again.tensor_hashes() == undisturbed.tensor_hashes()
    for shard in again.layout.shards:
        assert again.file_hash(shard.file) == undisturbed.file_hash(shard.file)


def test_records_of_another_run_are_not_seen(tmp_path: Path) -> None:
    theirs = writer(tmp_path, owner="them")
    theirs.open()
    fill(theirs, 0)
    ours = writer(tmp_path)
    ours.open()
    assert ours.record(0) is None


def test_a_tensor_that_was_not_planned_so_is_a_bug(tmp_path: Path) -> None:
    one = writer(tmp_path)
    one.open()
    with pytest.raises(AssertionError, match=r"a.weight: planned"):
        one.check({"a.weight": UNITS[0]["a.weight"].half()})


def test_a_unit_that_waits_is_held_by_nobody_but_the_queue(tmp_path: Path) -> None:
    """What a GPU made of it is let go once it is copied, also while another is being written."""
    one, begun, held = writer(tmp_path), threading.Event(), threading.Event()
    one.open()
    write = one.write

    def slow(data: Mapping[str, memoryview]) -> dict[str, str]:
        begun.set()
        assert held.wait(20)
        return write(data)

    one.write = slow  # type: ignore[method-assign]
    with CommitQueue(one, torch.device("cpu")) as queue:
        # As from a GPU: the bytes are a copy.
        queue._fetch = lambda tensors, made: {  # type: ignore[method-assign]
            name: memoryview(bytes(tensor_bytes(t))) for name, t in tensors.items()
        }
        seen = []
        for index in range(2):
            tensors = {name: t.clone() for name, t in UNITS[index].items()}
            seen += [weakref.ref(tensor) for tensor in tensors.values()]
            queue.put(index, tensors, {})
            del tensors
        assert begun.wait(20)
        queue.fetches.submit(int).result()
        assert not any(ref() is not None for ref in seen)
        held.set()
        queue.drain()
    assert [one.record(index) is not None for index in range(3)] == [True, True, False]

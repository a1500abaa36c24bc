"""One write, whatever the container: interrupted anywhere, the same call gives the same bytes."""

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.checkpoint.container import Container, Safetensors, Shard, ShardLayout, lay_out
from compressor.checkpoint.source import open_source
from compressor.checkpoint.target import ModelTarget
from compressor.checkpoint.transaction import write, writing
from compressor.errors import CheckError, InputError, MachineError
from compressor.ir.tensor import TensorShape


@dataclass(frozen=True)
class Crates:
    """One file: magic, where the list begins, tensors at multiples of `align`, a JSON list."""

    align: int = 64

    def lay_out(self, groups: Sequence[Mapping[str, TensorShape]]) -> ShardLayout:
        tensors = {name: spec for group in groups for name, spec in group.items()}
        fixed, offsets, end = {}, {}, 12
        for name, spec in tensors.items():
            padding = -end % self.align
            fixed[end] = bytes(padding)
            offsets[name] = end + padding
            end = offsets[name] + spec.nbytes
        listed = [[name, str(s.dtype), s.shape, offsets[name]] for name, s in tensors.items()]
        fixed |= {0: b"CRATE" + bytes(3) + struct.pack(">I", end), end: json.dumps(listed).encode()}
        return ShardLayout(shards=(Shard("model.crate", tensors, offsets, fixed),))


def read_crates(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    data = path.read_bytes()
    assert data[:5] == b"CRATE"
    (at,) = struct.unpack(">I", data[8:12])
    found = {}
    for name, kind, shape, begin in json.loads(data[at:]):
        assert begin % 64 == 0
        dtype = np.dtype(kind.removeprefix("torch."))
        found[name] = np.frombuffer(data, dtype, np.prod(shape, dtype=int), begin)
    return found


@pytest.fixture()
def target(tiny_model: Callable[..., Path]) -> Callable[[Container], ModelTarget]:
    source = open_source(tiny_model("llama"))
    return lambda container: ModelTarget(
        source=source,
        format=source.format,
        schemes=source.schemes,
        dtype=source.checkpoint.dtype,
        container=container,
    )


def make(target: ModelTarget, output: Path, **about: Any) -> bool:
    folder = target.source.checkpoint.folder
    return write(target, output, target.source.read_unit, about=about, beside=folder).finished


class Died(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture()
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[int]]]:
    """dying(n): die before the n-th rename, sync or positioned write; the list counts them."""

    def step(real: Callable[..., Any], count: list[int], limit: int, *args: Any) -> Any:
        count[0] += 1
        if count[0] == limit:
            raise Died
        return real(*args)

    def at(limit: int) -> list[int]:
        monkeypatch.undo()
        count = [0]
        for name in ("replace", "fsync", "pwritev"):
            monkeypatch.setattr(os, name, partial(step, getattr(os, name), count, limit))
        return count

    yield at


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("container", [Crates(), Safetensors(150_000)], ids=["crates", "shards"])
def test_killed_anywhere_it_continues_to_the_same_bytes(
    container: Container,
    target: Callable[[Container], ModelTarget],
    dying: Callable[[int], list[int]],
    tmp_path: Path,
) -> None:
    made = target(container)
    steps = dying(0)
    assert not make(made, tmp_path / "whole")
    total, whole = steps[0], contents(tmp_path / "whole")
    assert total > 50
    for limit in range(1, total + 1, 7):
        output = tmp_path / str(limit)
        dying(limit)
        with pytest.raises(Died):
            make(made, output)
        dying(0)
        make(made, output)
        assert contents(output) == whole, f"died at step {limit}"
    if isinstance(container, Crates):
        assert "model.safetensors.index.json" not in whole
        found = read_crates(tmp_path / "whole" / "model.crate")
        source = made.source.checkpoint
        assert set(found) == set(source.entries)
        for name, array in found.items():
            stored = source.read([name])[name].reshape(-1)
            assert torch.equal(torch.from_numpy(array.copy()), stored), name


def test_a_finished_one_is_left_alone_and_a_damaged_one_named(
    target: Callable[[Container], ModelTarget], tmp_path: Path
) -> None:
    made = target(Crates())
    assert not make(made, tmp_path / "out", seed=0)
    assert make(made, tmp_path / "out", seed=0)
    with pytest.raises(InputError, match="seed: 0, now 1"):
        make(made, tmp_path / "out", seed=1)
    with (tmp_path / "out" / "model.crate").open("r+b") as handle:
        handle.seek(100)
        handle.write(b"\xff\xff")
    with pytest.raises(CheckError, match=r"model\.crate"):
        make(made, tmp_path / "out", seed=0)
    shards = lay_out(made.container, map(made.shapes, made.units))
    with writing(
        made, tmp_path / "out", about={"seed": 0}, shards=shards, judged_later=True
    ) as under_way:
        assert under_way.finished


def test_a_disk_that_fails_is_the_machines_error(
    target: Callable[[Container], ModelTarget], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(MachineError, match="No space left on device"):
            make(target(Safetensors()), tmp_path / "out")
    assert not make(target(Safetensors()), tmp_path / "out")

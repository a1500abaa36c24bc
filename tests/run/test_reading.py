"""Which rank reads what of a unit."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.checkpoint.source import open_source
from compressor.plan.plan import make_plan
from compressor.ranks.ranks import ALONE, Ranks
from compressor.run.ahead import Ahead, Brought
from compressor.run.reading import Reader
from compressor.run.source_content import SourceContent
from tests.support.recipes import short_recipe


@pytest.mark.parametrize("apart", [False, True])
def test_a_block_whose_experts_wait_in_main_memory_is_read_by_each_rank(
    apart: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    recipe = short_recipe(model, tmp_path / "out", [{"rtn": {"bits": 4, "group_size": 32}}])
    plan, two = make_plan(recipe, open_source(model)), Ranks(rank=1, world=2)
    content = SourceContent(plan)
    reader = Reader(plan, content, torch.device("cpu"), two, apart=apart)
    unit = reader.read(1)
    every = set(plan.source.names(plan.units[1].layout))
    assert (unit.tensors.keys() | unit.extra.keys() == every) is apart
    if apart:  # and nothing is exchanged
        assert reader.whole(1, unit) is unit and 1 in content.hashes


class Beside:
    """Stands in for `Ahead`, on a CPU."""

    def __init__(self, room_left: bool) -> None:
        self.said: list[object] = []
        self.room_left = room_left

    def settle(self) -> None:
        self.said.append("settle")

    def bring(self, tensors: Mapping[str, Tensor], room: Callable[[], Mapping[str, Tensor]]) -> Any:
        self.said.append("bring")
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return Brought(copies, there=len(self.said)) if self.room_left else None  # type: ignore

    def follow(self, there: object) -> None:
        self.said.append(there)


@pytest.mark.parametrize("room_left", [False, True])
def test_blocks_are_brought_once_they_are_read_and_used_once_they_are_there(
    room_left: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    recipe = short_recipe(model, tmp_path / "out", [{"rtn": {"bits": 4, "group_size": 32}}])
    plan, beside = make_plan(recipe, open_source(model)), Beside(room_left)
    plain = Reader(plan, SourceContent(plan), torch.device("cpu"), ALONE)
    ahead: Any = beside
    reader = Reader(plan, SourceContent(plan), torch.device("cpu"), ALONE, ahead=ahead)
    units = [reader.read(index) for index in range(3)]  # the embedding, and two blocks
    assert beside.said == ["settle", "settle", "bring", "settle", "bring"]
    for index in (1, 2, 0):
        unit = reader.whole(index, units[index])
        assert unit.layout == plan.units[index].layout
        expected = plain.read(index).tensors
        assert unit.tensors.keys() == expected.keys()
        assert all(torch.equal(unit.tensors[name], x) for name, x in expected.items())
    assert beside.said[5:] == ([3, 5] if room_left else [])
    assert reader.content.hashes == {i: plain.content.hashes[i] for i in range(3)}


@pytest.mark.gpu
def test_a_block_that_is_brought_ahead_is_the_one_that_was_read(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    recipe = short_recipe(model, tmp_path / "out", [{"awq": {"bits": 4, "group_size": 32}}])
    plan, device = make_plan(recipe, open_source(model)), torch.device("cuda", 0)
    reader = Reader(plan, SourceContent(plan), device, ALONE, ahead=Ahead(device))
    for index in (1, 2, 1):
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(reader.read, index).result()
        unit = reader.whole(index, read)
        expected = plan.source.read_unit(plan.units[index].layout).tensors
        assert unit.tensors.keys() == expected.keys()
        assert all(x.device == device for x in unit.tensors.values())
        assert all(torch.equal(unit.tensors[name].cpu(), x) for name, x in expected.items())
        state = plan.source.arch.runtime.block_state(unit.layout, unit.tensors)
        homes = {x.untyped_storage().data_ptr() for x in unit.tensors.values()}
        assert all(x.untyped_storage().data_ptr() in homes for x in state.values())

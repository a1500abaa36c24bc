"""Which rank reads what of a unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.ranks.ranks import Ranks
from compressor.run.reading import Reader
from compressor.run.source_content import SourceContent


@pytest.mark.parametrize("apart", [False, True])
def test_a_block_whose_experts_wait_in_main_memory_is_read_by_each_rank(
    apart: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    recipe = make_recipe(
        {
            "model": str(model),
            "output": str(tmp_path / "out"),
            "passes": [{"rtn": {"bits": 4, "group_size": 32}}],
        }
    )
    plan, two = make_plan(recipe, open_source(model)), Ranks(rank=1, world=2)
    content = SourceContent(plan)
    reader = Reader(plan, content, torch.device("cpu"), two, apart=apart)
    unit = reader.read(1)
    every = set(plan.source.names(plan.units[1].layout))
    assert (unit.tensors.keys() | unit.extra.keys() == every) is apart
    if apart:  # and nothing is exchanged
        assert reader.whole(1, unit) is unit and 1 in content.hashes

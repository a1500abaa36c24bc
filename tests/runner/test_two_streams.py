"""One site of a block and of the original one beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_calibration.stats import StatNeeds
from torch import Tensor

from compressor.checkpoint.source import open_source
from compressor.runner.block_runner import Block, BlockRunner
from compressor.runner.stream import Stream
from compressor.runner.two_streams import observe_beside

NEEDS = StatNeeds(gram=True, cross=True)


def inputs(block: Block, tensors: dict[str, Tensor], rows: Tensor, site: str) -> Tensor:
    """What enters a site, [tokens, channels]."""
    block.load(tensors)
    found: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...]) -> None:
        found.append(args[0])

    module = block.module(block.unit.site_linears(site)[0])
    handle = module.register_forward_pre_hook(keep)
    block.forward(rows)
    handle.remove()
    return found[0].reshape(-1, found[0].shape[-1]).double()


@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt", "gemma2"])
def test_products_are_those_of_both_blocks_own_inputs(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    source = open_source(tiny_model(model_type))
    runner = BlockRunner(
        source.checkpoint.config,
        source.arch.runtime,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    first, unit = source.layout.units[:2]
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 256, (5, 24), generator=draw)
    original = runner.embed(source.read_unit(first).dequantized(), ids)
    ours = original + 0.1 * torch.randn(original.shape, generator=draw)
    weights = source.read_unit(unit).dequantized()
    changed = {n: w + 0.02 * torch.randn(w.shape, generator=draw) for n, w in weights.items()}
    with runner.loaded(unit, weights) as block:
        for site in unit.sites:
            sides = [(weights, Stream(original)), (changed, Stream(ours))]
            stats = observe_beside(block, sides, site=site, needs=NEEDS, batch=2)
            theirs = inputs(block, weights, original, site)
            x = inputs(block, changed, ours, site)
            assert stats.tokens == 120
            torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-3, atol=1e-3)
            exact = (theirs - x).T @ x
            torch.testing.assert_close(stats.cross.double(), exact, rtol=1e-3, atol=1e-3)
            same = observe_beside(block, [sides[0]] * 2, site=site, needs=NEEDS, batch=5)
            assert not same.cross.any()
        torch.testing.assert_close(
            inputs(block, weights, original, unit.sites[0]),
            inputs(block, dict(block.tensors), original, unit.sites[0]),
        )

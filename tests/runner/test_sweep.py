"""The walk over blocks: batches that are halved, an early end, rows with inputs of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.checkpoint.source import open_source
from compressor.errors import Interrupted
from compressor.runner.attention_call import AttentionCall
from compressor.runner.block_runner import Block
from compressor.runner.source_model import SourceModel
from compressor.runner.stream import Stream
from compressor.runner.sweep import Execution, sweep

TinyModel = Callable[..., Path]
IDS = torch.randint(2, 256, (5, 24), generator=torch.Generator().manual_seed(4))


def opened(folder: Path) -> SourceModel:
    return SourceModel(open_source(folder), device=torch.device("cpu"), dtype=torch.float32)


def through(model: SourceModel, rows: Tensor | Stream, **options: Any) -> Tensor:
    """Hidden states after the last block that is walked."""
    execution = options.pop("execution", Execution(2))
    for step in sweep(model, rows, execution=execution, **options):
        step.run()
    return step.stream.hidden


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> SourceModel:
    return opened(tiny_model("llama"))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "qwen3_moe"])
def test_rows_may_be_padded_each_in_its_own_way(family: str, tiny_model: TinyModel) -> None:
    """Padded on the left under masks and positions of their own, rows give what they give alone."""
    model = opened(tiny_model(family))
    lengths = [24, 11, 17, 24, 5]
    ids = torch.ones_like(IDS)
    mask = torch.zeros_like(IDS)
    for row, length in enumerate(lengths):
        ids[row, -length:] = IDS[row, :length]
        mask[row, -length:] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    side = {"attention_mask": mask, "position_ids": positions}
    found = through(model, ids, side=side)
    for row, length in enumerate(lengths):
        alone = through(model, IDS[row : row + 1, :length])
        torch.testing.assert_close(found[row, -length:], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(through(model, ids)[1, -11:], found[1, -11:], atol=1e-2)


def test_a_hook_sees_masks_and_positions_of_its_rows(llama: SourceModel) -> None:
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    side = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    seen: dict[int, AttentionCall] = {}

    def watching(unit: object) -> Callable[[AttentionCall], Tensor]:
        def hook(call: AttentionCall) -> Tensor:
            seen[call.first_row] = call
            return call.plain(call.query, call.key, call.value)

        return hook

    hooked = through(llama, IDS, side=side, hook=watching)
    assert torch.equal(hooked, through(llama, IDS, side=side))
    assert sorted(seen) == [0, 2, 4]
    first = seen[0]
    assert first.mask is not None and first.mask.shape[0] == 2
    visible = first.mask if first.mask.dtype == torch.bool else first.mask == 0
    assert not visible[1, 0, 20, :9].any() and visible[0, 0, 20, :9].all()
    assert first.rotary is not None and first.rotary[0].shape[:3] == (2, 1, 24)
    assert torch.equal(first.rotary[0][1, 0, 9], first.rotary[0][0, 0, 0])


def test_running_out_of_memory_halves_the_batch_once(
    llama: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = through(llama, IDS)
    real, sizes = Block.forward, []

    def cramped(self: Block, hidden: Tensor, side: Any = None) -> Tensor:
        sizes.append(hidden.shape[0])
        if hidden.shape[0] > 2:
            raise torch.OutOfMemoryError("too many rows")
        return real(self, hidden, side)

    monkeypatch.setattr(Block, "forward", cramped)
    execution, batches = Execution(5), []
    for step in sweep(llama, IDS, execution=execution):
        batches.append(step.run())
    assert batches == [[2, 2, 1]] * 2 and execution.batch == 2
    assert sizes == [5, 2, 2, 1, 2, 2, 1]
    torch.testing.assert_close(step.stream.hidden, expected)
    # Batches that were recorded are taken again, though memory would allow others.
    again = []
    for step in sweep(llama, IDS, execution=Execution(5)):
        again.append(step.run(batches=[1, 2, 2]))
    assert again == [[1, 2, 2]] * 2
    with pytest.raises(torch.OutOfMemoryError):
        step = next(sweep(llama, IDS, execution=Execution(5)))
        step.run(batches=[5])


def test_a_walk_ends_where_it_is_asked_to(llama: SourceModel) -> None:
    asked: list[str] = []
    execution = Execution(
        5,
        stopping=lambda: len(asked) == 2,
        progress=lambda name, done, total: asked.append(name),
    )
    walked = []
    with pytest.raises(Interrupted):
        for step in sweep(llama, IDS, execution=execution):
            walked.append(step.layout.index)
    assert walked == [0] and asked == ["embedding", "model.layers.0"]


def test_some_blocks_run_on_states_that_enter_them(llama: SourceModel) -> None:
    first = through(llama, IDS, blocks=[0])
    rest = through(llama, Stream(first.clone()), blocks=[1])
    assert torch.equal(rest, through(llama, IDS))


def test_checkpoints_side_by_side_alternate(llama: SourceModel, tiny_model: TinyModel) -> None:
    other = opened(tiny_model("llama", seed=1))
    order = []
    for step in sweep([llama, other], IDS, execution=Execution(5)):
        order.append((step.layout.index, step.number))
    assert order == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ours, theirs = (stream.hidden for stream in step.streams)
    assert torch.equal(ours, through(llama, IDS, execution=Execution(5)))
    assert torch.equal(theirs, through(other, IDS, execution=Execution(5)))

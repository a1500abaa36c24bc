"""Runs rows of tokens through whole checkpoints, of which one unit at a time is in memory.

Several checkpoints run side by side: their units alternate, and the next one is read while the last
one computes. Hidden states stay in main memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout, weight_name
from compressor.ir.unit import Unit
from compressor.runner.attention_call import AttentionHook
from compressor.runner.block_runner import Block, BlockRunner
from compressor.runner.heap import give_back
from compressor.runner.simulate import quantized_inputs, quantized_kv, stored_inputs

Progress = Callable[[str, int, int], None]
"""Called with a unit's name, how many units are done, and how many there are."""

Attending = Callable[[Unit], AttentionHook | None]
"""What attends in a block in place of the model's own attention, from the block's tensors."""


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """A checkpoint to be run, and how its blocks attend (None: as the model itself does)."""

    source: Source
    attention: Attending | None = None


@dataclass(slots=True)
class Stream:
    """One checkpoint's run: its hidden states [rows, length, hidden], float32 in main memory."""

    model: StreamedModel
    runner: BlockRunner
    hidden: Tensor

    @contextmanager
    def logits(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from final hidden states [tokens, hidden] to logits [tokens, vocabulary]."""
        source = self.model.source
        layout = source.layout.head
        tensors = floats(source.read_unit(layout), self.runner)
        tied = source.layout.tied
        (linear,) = (x for x in layout.linears if x.role == "lm_head")
        name = linear.weight_name
        enter = stored_inputs(source, layout).get(linear.name)
        # No name here holds the weight as it was read, beside the one that the head computes with.
        with self.runner.head(
            tensors,
            source.checkpoint.read([tied])[tied] if tied else tensors.pop(name),
            enter=enter,
        ) as head:
            yield lambda hidden: head(hidden.unsqueeze(0))[0]


def run_blocks(
    models: Sequence[StreamedModel],
    ids: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 8,
    progress: Progress | None = None,
    after_block: Callable[[UnitLayout, Sequence[Tensor]], None] | None = None,
) -> list[Stream]:
    """Run rows of token ids [rows, length] through the embedding and every block of each model.

    batch        rows at a time; halved where the device's memory does not do
    after_block  called with a block and every model's hidden states [rows, length, hidden] after it
    Raises InputError for rows that a model cannot take, or models of different depth.
    """
    _check(models, ids)
    blocks = len(models[0].source.layout.blocks)
    streams = []
    total = len(models) * (blocks + 1)
    order = [(m, u) for u in range(blocks + 1) for m in range(len(models))]
    units = _read_ahead([(models[m].source, models[m].source.layout.unit(u)) for m, u in order])
    for done, ((m, u), unit) in enumerate(zip(order, units, strict=True), 1):
        if u == 0:
            streams.append(_embed(models[m], unit, ids, device=device, dtype=dtype, batch=batch))
        else:
            batch = _run_block(streams[m], unit, batch=batch)
            if after_block is not None and m == len(models) - 1:
                after_block(unit.layout, [stream.hidden for stream in streams])
        give_back()
        if progress is not None:
            progress(unit.layout.name, done, total)
    return streams


def floats(unit: Unit, runner: BlockRunner) -> dict[str, Tensor]:
    """The unit's tensors in float, quantized weights decoded on the runner's device."""
    decoded = {
        weight_name(name): q.to(runner.device).dequantize(runner.dtype)
        for name, q in unit.quantized.items()
    }
    return {**unit.tensors, **decoded}


def _read_ahead(wanted: Sequence[tuple[Source, UnitLayout]]) -> Iterator[Unit]:
    """Units in order; each is read while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(wanted[0][0].read_unit, wanted[0][1])
        for source, layout in wanted[1:]:
            unit = coming.result()
            coming = pool.submit(source.read_unit, layout)
            yield unit
            del unit
        yield coming.result()


def _embed(
    model: StreamedModel,
    unit: Unit,
    ids: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
) -> Stream:
    source = model.source
    runner = BlockRunner(source.checkpoint.config, source.arch.runtime, device=device, dtype=dtype)
    hidden = runner.embed(floats(unit, runner), ids, batch=batch)
    return Stream(model=model, runner=runner, hidden=hidden.to("cpu", torch.float32))


def _run_block(stream: Stream, unit: Unit, *, batch: int) -> int:
    """Replace the stream's hidden states by the block's outputs; the batch that memory allowed."""
    source, runner = stream.model.source, stream.runner
    attention = stream.model.attention
    hook = attention(unit) if attention else None
    if source.schemes.kv is not None:
        hook = quantized_kv(source.schemes.kv, unit, hook)
    inputs = stored_inputs(source, unit.layout)
    with (
        runner.block(unit.layout, floats(unit, runner)) as block,
        quantized_inputs(block, inputs),
        runner.attention(hook),
    ):
        start = 0
        while start < stream.hidden.shape[0]:
            runner.first_row = start
            out = _forward(block, stream.hidden[start : start + batch])
            if out is None:
                batch = batch // 2
                continue
            stream.hidden[start : start + batch] = out.to("cpu", torch.float32)
            start += batch
    return batch


def _forward(block: Block, hidden: Tensor) -> Tensor | None:
    """The block's output, or None where memory did not do and fewer rows can be tried."""
    try:
        return block.forward(hidden)
    except torch.OutOfMemoryError:
        if hidden.shape[0] == 1:
            raise
        return None


def _check(models: Sequence[StreamedModel], ids: Tensor) -> None:
    first = models[0].source
    for model in models:
        layout, sizes = model.source.layout, model.source.layout.sizes
        positions, vocabulary = sizes.positions, sizes.vocabulary
        if positions is not None and ids.shape[1] > positions:
            raise InputError(
                f"rows of {ids.shape[1]} tokens are longer than the model's {positions} positions",
                hint="evaluate with a shorter length",
            )
        if int(ids.max()) >= vocabulary:
            raise InputError(
                f"token {int(ids.max())} is outside the model's vocabulary of {vocabulary}",
                hint="is this the tokenizer of this model?",
            )
        same = [u.name for u in layout.units] == [u.name for u in first.layout.units]
        if not same or vocabulary != first.layout.sizes.vocabulary:
            raise InputError(
                f"{model.source.checkpoint.folder} and {first.checkpoint.folder} are not the same "
                "model: their blocks or vocabularies differ",
                hint="compare with the checkpoint that was quantized",
            )

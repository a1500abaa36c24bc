"""The one walk over a model's units: rows of tokens enter, and one unit at a time is in memory.

The next unit is read while the last one computes. Where several checkpoints run side by side their
units alternate. What stops it, and how many rows run at a time, is `execution`'s.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.checkpoint.offsite import read_offsite_record
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout
from compressor.ir.unit import Unit
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.activations import Activations, after, embedded, even, nowhere
from compressor.runner.attention_call import AttentionHook
from compressor.runner.block_runner import Block
from compressor.runner.execution import Execution as Execution
from compressor.runner.execution import Progress as Progress
from compressor.runner.handed import collect, joined, still_handed
from compressor.runner.heap import give_back
from compressor.runner.source_model import Attending, SourceModel
from compressor.runner.spread import batches_of
from compressor.runner.stream import Entering, Stream

STAYING = 2**29
"""Bytes of hidden states that stay on the device between blocks of an evaluation."""


@dataclass(slots=True)
class Step:
    """One unit of a walk.

    model    whose unit it is;  number  of that model among those that run side by side
    index    of the unit: 0 is the embedding
    unit     what was read, or None where the reader knew that nobody needs it
    streams  hidden states of every model; those of `number` enter this unit
    """

    model: SourceModel
    number: int
    index: int
    unit: Unit | None
    streams: list[Stream]
    execution: Execution
    attention: Attending | None = None
    ran: bool = False
    _block: Block | None = field(default=None, init=False)

    @property
    def layout(self) -> UnitLayout:
        """The unit's names and shapes."""
        return self.model.layout.unit(self.index)

    @property
    def stream(self) -> Stream:
        """The rows that enter, or once the block has run have left."""
        return self.streams[self.number]

    @property
    def source(self) -> Unit:
        """The unit, which was read."""
        assert self.unit is not None, f"{self.layout.name} was not read"
        return self.unit

    def take(self) -> Unit:
        """The unit, which the step then holds no more."""
        unit, self.unit = self.source, None
        return unit

    def embedded(
        self,
        ids: Tensor,
        side: Mapping[str, Tensor] | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, hidden states of these rows of token ids) for all rows [rows, length].

        side     what they have beside them, as in `Stream`
        tensors  the embedding's, if not those that were read
        """
        beside = side or {}
        own = set(self.model.layout.embedding.tensors)
        known = tensors or self.model.floats(self.source)
        known = {name: tensor for name, tensor in known.items() if name in own}
        with self.model.runner.embedding(known) as embed:

            def attempt(start: int, stop: int) -> Tensor:
                return embed(ids[start:stop], {n: t[start:stop] for n, t in beside.items()})

            yield from self.execution.batches(ids.shape[0], attempt)

    def embed(
        self,
        ids: Tensor,
        side: Mapping[str, Tensor] | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Let rows of token ids enter the model: `embedded` becomes its stream."""
        tensors = self.model.floats(self.source) if tensors is None else tensors
        made_of = embedded(self.model, tensors, ids, side or {})
        handed: dict[str, list[Tensor]] = {}
        for start, _, out in self.embedded(ids, side, tensors=tensors):
            if start == 0:
                like = out.cpu().float() if self.execution.offload else out
                hidden = like.new_empty(ids.shape[0], *out.shape[1:])
                self.streams[self.number :] = [Stream(hidden, side or {}, made_of)]
            self.stream.write(start, out)
            collect(handed, self.model.runner.handed, hidden.device)
        self.stream.handed = joined(handed)

    @contextmanager
    def loaded(self, tensors: Mapping[str, Tensor] | None = None) -> Iterator[Block]:
        """The block in memory for the length of a `with`; `tensors` in place of what was read."""
        runner = self.model.runner
        floats = self.model.floats(self.source) if tensors is None else tensors
        with runner.loaded(self.layout, floats) as block, self.model.inputs(block):
            self._block = block
            try:
                yield block
            finally:
                self._block = None

    def outputs(
        self,
        stream: Entering,
        *,
        hook: AttentionHook | None = None,
        batches: Sequence[int] | None = None,
        dealt: bool = False,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, what the block that is loaded makes of these rows) for all rows.

        hook     attends in place of the model's own attention
        batches  sizes that were taken before, which are taken again: others may round otherwise
        dealt    all ranks have the same rows, and run them together
        """
        block, runner = self._block, self.model.runner
        assert block is not None, f"{self.layout.name} is not loaded"

        def attempt(start: int, stop: int) -> Tensor:
            runner.first_row = start
            return block.forward(stream.read(start, stop), stream.beside(start, stop))

        with runner.attention(hook):
            if dealt:
                yield from self.execution.dealt(stream.rows, attempt)
            else:
                yield from batches_of(block, stream.rows, attempt, self.execution, batches)

    def run(
        self,
        stream: Stream | None = None,
        *,
        into: Stream | None = None,
        hook: AttentionHook | None = None,
        batches: Sequence[int] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> list[int]:
        """Run rows through the block, and say in which batches. What the model's activations hold
        is read instead.

        stream   the rows, if not the step's own;  into  where outputs go: in place of them, if None
        hook     as in `outputs`; if None, what the walk or the model says
        tensors  weights of a block that is not loaded, in place of what was read
        """
        stream = self.stream if stream is None else stream
        into = stream if into is None else into
        self.ran = self.ran or stream is self.stream
        kept, made_of = self.model.activations, None
        sizes = even(stream.rows, self.execution.batch) if batches is None else list(batches)
        attends = hook or self.attention or self.model.attention
        handing = self.model.runner.names.handed
        if kept is not None and attends is None and not handing:
            weights = self._block.tensors if self._block else tensors
            weights = self.model.floats(self.source) if weights is None else weights
            made_of = after(self.model, stream.made_of, self.index, weights, sizes)
            if (known := kept.rows(made_of)) is not None:
                into.write(0, known)
                into.made_of = made_of
                return sizes
        if hook is None and self.unit is not None:
            hook = self.model.hook(self.unit, self.attention)
        load = nullcontext() if self._block else self.loaded(tensors)
        ran, into.made_of = [], None
        before = still_handed(handing, self.layout.index, stream.handed)
        handed: dict[str, list[Tensor]] = {}
        keeping = nullcontext(nowhere) if kept is None else kept.keeping(made_of, sizes)
        with load as own, keeping as keep:
            block = self._block or own
            assert block is not None
            for start, stop, out in self.outputs(stream, hook=hook, batches=batches):
                keep(out)
                into.write(start, out)
                collect(handed, block.handed, into.hidden.device, known=before)
                ran.append(stop - start)
        into.handed = {**before, **joined(handed)}
        into.made_of = made_of if ran == sizes else None
        return ran


def walk(
    models: Sequence[SourceModel],
    *,
    execution: Execution,
    attention: Attending | None = None,
    read: Callable[[int], Unit | None] | None = None,
    units: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Every unit of every model, in order. Nothing runs unless the step is asked to.

    attention  what attends in blocks, in place of the models' own way
    read       gives a unit by its index, in a thread of its own; None where nobody needs it
    units      their indices, if not all
    """
    order = [
        (index, number)
        for index in (range(len(models[0].layout.units)) if units is None else units)
        for number in range(len(models))
    ]
    streams: list[Stream] = []
    with ThreadPoolExecutor(1) as pool:

        def submit(place: int) -> Future[Unit | None] | None:
            if place >= len(order):
                return None
            index, number = order[place]
            return pool.submit(read or models[number].read_unit, index)

        coming = submit(0)
        for place, (index, number) in enumerate(order):
            execution.check_stop()
            assert coming is not None
            unit = coming.result()
            coming = submit(place + 1)
            step = Step(models[number], number, index, unit, streams, execution, attention)
            del unit
            yield step
            step.unit = None
            give_back()
            execution.progress(step.layout.name, place + 1, len(order))


def sweep(
    models: SourceModel | Sequence[SourceModel],
    rows: Tensor | Stream,
    *,
    side: Mapping[str, Tensor] | None = None,
    blocks: Sequence[int] | None = None,
    hook: Attending | None = None,
    execution: Execution,
) -> Iterator[Step]:
    """Every block of every model, block by block, with the rows that enter it. A block that was not
    run (`Step.run`) runs when the next one is asked for.

    rows    token ids [rows, length], which are embedded first, or hidden states that enter the
            first of `blocks`
    side    what ids have beside them and differs by row, as in `Stream`
    blocks  their indices in order, if not all
    hook    what attends in a block, in place of the models' own way
    """
    models = [models] if isinstance(models, SourceModel) else models
    indices = range(len(models[0].layout.blocks)) if blocks is None else blocks
    first = [0] if isinstance(rows, Tensor) else []
    units = [*first, *(index + 1 for index in indices)]
    for step in walk(models, execution=execution, attention=hook, units=units):
        if isinstance(rows, Stream):
            step.streams[:] = [rows]
        elif step.index == 0:
            step.embed(rows, side)
            continue
        yield step
        if not step.ran:
            step.run()


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """A checkpoint to be run as it is stored, how its blocks attend (None: as the model itself
    does), and where its hidden states are kept (None: nowhere)."""

    source: Source
    attention: Attending | None = None
    activations: Activations | None = None


@dataclass(frozen=True, slots=True)
class FinalStates:
    """What left a model's last block, [rows, length, hidden].

    rows   which of the rows that were asked for these are: of several ranks each has some
    batch  how many of them are one chunk: what is computed of them chunk by chunk has the same bits
           for any number of ranks
    """

    model: SourceModel
    hidden: Tensor
    rows: Sequence[int]
    batch: int

    def logits(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """A function from final hidden states [tokens, hidden] to logits [tokens, vocabulary]."""
        return self.model.logits()


def run_blocks(
    models: Sequence[StreamedModel],
    ids: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 8,
    progress: Progress | None = None,
    after_block: Callable[[UnitLayout, Sequence[Tensor]], None] | None = None,
    ranks: Ranks = ALONE,
) -> list[FinalStates]:
    """Run rows of token ids [rows, length] through the embedding and every block of each model.

    batch        rows at a time; halved where the device's memory does not do
    after_block  called with a block and every model's hidden states [rows, length, hidden] after it
    ranks        each of which runs some of the rows, and is given what came of those
    Raises InputError for rows that a model cannot take, or models of different depth; an emulator
    and its full model run one after the other, without `after_block`.
    """
    if len(models) == 2 and _is_part(models[0].source, models[1].source):
        apart = [
            run_blocks(
                [m], ids, device=device, dtype=dtype, batch=batch, progress=progress, ranks=ranks
            )
            for m in models
        ]
        return [states for (states,) in apart]
    _check(models, ids)
    running = [
        SourceModel(
            m.source,
            device=device,
            dtype=dtype,
            attention=m.attention,
            as_stored=True,
            activations=m.activations,
        )
        for m in models
    ]
    width = max(m.source.layout.sizes.hidden for m in models)
    states = len(models) * ids.numel() * width * dtype.itemsize
    execution = Execution(batch, offload=device.type == "cpu" or states > STAYING)
    if progress is not None:
        execution.progress = progress
    rows = ranks.rows(ids.shape[0], batch)
    streams: list[Stream] = []
    # A rank that has no rows goes along with the first, which counts elsewhere.
    for step in sweep(running, ids[rows or [0]], execution=execution):
        step.run()
        streams = step.streams
        if after_block is not None and step.number == len(models) - 1:
            after_block(step.layout, [stream.hidden[: len(rows)] for stream in streams])
    pairs = zip(running, streams, strict=True)
    return [FinalStates(m, stream.hidden[: len(rows)], rows, batch) for m, stream in pairs]


def _is_part(part: Source, whole: Source) -> bool:
    """Whether a checkpoint says that it has some of the other's blocks."""
    record = read_offsite_record(part.checkpoint.folder)
    blocks = len(whole.layout.blocks)
    return record is not None and record.blocks == blocks > len(part.layout.blocks)


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
        same = [u.name for u in layout.blocks] == [u.name for u in first.layout.blocks]
        if not same or vocabulary != first.layout.sizes.vocabulary:
            raise InputError(
                f"{model.source.checkpoint.folder} and {first.checkpoint.folder} are not the same "
                "model: their blocks or vocabularies differ",
                hint="compare with the checkpoint that was quantized",
            )

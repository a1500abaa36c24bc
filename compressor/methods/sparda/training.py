"""Trains SparDA's forecasts (arXiv 2606.04511) in one sweep over the model, block by block.

The loss of a block trains the forecast of the block before it (block 0 trains one of its own), and
no gradient crosses blocks: each is trained from stored hidden states, with one block in memory.
Two buffers on disk hold them: what enters block l - 1, which its forecast reads, and what enters
block l, whose attention teaches. When block l's forecast is trained its outputs take the place of
the older ones. Hidden states flow through attention over the blocks that the teacher chooses, as in
the published training.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from compressor_calibration.store import ActivationStore, read_ahead
from compressor_kernels.attention.block_windows import WindowRule
from torch import Tensor

from compressor.attention.evaluation import under_masks
from compressor.attention.policy import attention_shape
from compressor.attention.rules.forecast import CURRENT, FUTURE
from compressor.checkpoint.durable import make_way, own_folder
from compressor.checkpoint.records import Records
from compressor.errors import Interrupted
from compressor.methods.sparda.optimizer import ForecastOptimizer
from compressor.methods.sparda.start import LeastSquares, initial_forecast, mean_queries
from compressor.methods.sparda.teacher import Teacher, attention_call, attention_inputs, norms
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.activations import after, embedded, even, nowhere
from compressor.runner.attention_call import AttentionCall
from compressor.runner.block_runner import Block
from compressor.runner.pieces import Part, Piece, Pieces, pieces_of
from compressor.runner.source_model import SourceModel
from compressor.runner.stream import filling, stored_rows
from compressor.runner.sweep import Execution, Progress, Step, walk

FIT_TOKENS = 65536
PROGRESS = "sweep.json"


@dataclass(frozen=True, slots=True)
class Training:
    """How forecasts are trained; the defaults are the published ones.

    rows_per_step  rows of one step of the optimizer
    warmup         steps over which the learning rate rises
    clip           largest norm of a block's gradient
    progressive    begin with a teacher of the deployed compression and halve it, in equal shares of
                   the steps, down to the fine one
    initial        what forecasts start from: `uniform` values (published), or `queries`: what comes
                   closest to the mean query of the heads that share a KV head in the block that it
                   is for (least squares over some rows), with which few steps do
    chosen_states  let hidden states flow through attention over the teacher's blocks
    """

    teacher: Teacher
    steps: int = 2000
    rows_per_step: int = 32
    learning_rate: float = 5e-4
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 0.5
    progressive: bool = False
    initial: Literal["uniform", "queries"] = "uniform"
    chosen_states: bool = True

    def teacher_at(self, step: int) -> Teacher:
        """The teacher of a step."""
        if not self.progressive:
            return self.teacher
        selection, last = self.teacher.selection, self.teacher.fine
        stages = [WindowRule(kernel_size=selection.kernel_size, stride=selection.stride)]
        while stages[-1].kernel_size > last.kernel_size and stages[-1].stride > last.stride:
            now = stages[-1]
            stages.append(WindowRule(kernel_size=now.kernel_size // 2, stride=now.stride // 2))
        return replace(self.teacher, fine=stages[step * len(stages) // self.steps])

    def order(self, rows: int, *, seed: int) -> list[list[int]]:
        """Which rows each step sees: every row once, then again in another order."""
        generator = torch.Generator().manual_seed(seed)
        drawn: list[int] = []
        while len(drawn) < self.steps * self.rows_per_step:
            drawn += torch.randperm(rows, generator=generator).tolist()
        size = self.rows_per_step
        return [drawn[i * size : (i + 1) * size] for i in range(self.steps)]


@dataclass(frozen=True, slots=True)
class TrainedForecasts:
    """Forecasts in float32 on the CPU, and each block's mean loss over its first and its last tenth
    of the steps (the forecast that is for that block).

    current  block 0's forecast of its own keys;  future  each block's of the next one's; the last
             block's is not trained and nothing reads it
    """

    current: Tensor
    future: tuple[Tensor, ...]
    losses: tuple[tuple[float, float], ...]

    def named(self, paths: Sequence[str]) -> dict[str, Tensor]:
        """Tensors under the names that serving code loads; `paths` are the attention modules'."""
        found = {f"{paths[0]}.{CURRENT}": self.current}
        pairs = zip(paths, self.future, strict=True)
        return found | {f"{path}.{FUTURE}": weight for path, weight in pairs}


@dataclass(slots=True)
class Trainer:
    """One training of all forecasts of a model over rows of token ids [rows, length].

    scratch  folder of the buffers and of what is trained; a training that is repeated there goes on
             from all of it that is whole
    stops    asked now and then, by all ranks together, whether to stop
    ranks    that share the rows of each step, and see the folder
    """

    model: SourceModel
    ids: Tensor
    training: Training
    seed: int
    batch: int
    scratch: Records
    progress: Progress = lambda name, done, total: None
    stops: Callable[[], bool] = lambda: False
    ranks: Ranks = ALONE
    _reached: int = field(default=-1, init=False)
    """The block whose inputs are whole in their buffer (and those of the one before); -1: none."""
    _hashes: list[str | None] = field(default_factory=lambda: [None, None], init=False)
    """Of the two buffers."""
    _made_of: str | None = field(default=None, init=False)
    """What those inputs were made from, as the model's activations name it."""

    def run(self) -> TrainedForecasts:
        """Train. Raises Interrupted when asked to stop; what is trained stays."""
        model, blocks = self.model, self.model.layout.blocks
        shape = attention_shape(model.layout)
        weights: list[Tensor] = []
        losses: list[tuple[float, float]] = []
        before: dict[str, Tensor] = {}
        stores: list[ActivationStore] = []
        execution = Execution(
            self.batch, stopping=self.stops, progress=self.progress, ranks=self.ranks
        )
        for step in walk([model], execution=execution, units=range(len(blocks) + 1)):
            layer = step.layout.index
            if step.layout.kind == "embedding":
                stores = self._stores(step.source.tensors)
                self._go_on(stores, len(blocks))
                self._embed(step, stores[0])
                continue
            trained = self._trained(layer)
            onward = self._reached == layer < len(blocks) - 1
            needed = trained is None or onward
            name = self._name(step) if onward else None
            tensors = model.on_device(step.take()) if needed else dict(step.source.tensors)
            if trained is None:
                size = (shape.kv_heads * shape.head_dim, stores[0].width)
                initial = initial_forecast(*size, seed=self.seed + 1 + layer)
                trained = self._train(step, tensors, before, stores, initial)
            if onward:
                self._advance(step, tensors, stores, name)
            before = norms(step.layout, tensors)
            del tensors
            weights.append(trained["weight"])
            losses.append((float(trained["losses"][0]), float(trained["losses"][1])))
        last = initial_forecast(*weights[0].shape, seed=self.seed + 1 + len(blocks))
        return TrainedForecasts(weights[0], (*weights[1:], last), tuple(losses))

    def _stores(self, embedding: Mapping[str, Tensor]) -> list[ActivationStore]:
        head = self.model.layout.head
        width = max(linear.in_features for linear in head.linears)
        dtype = next(iter(embedding.values())).dtype
        rows, length = self.ids.shape
        stores = [
            ActivationStore(self.scratch.folder / f"states.{i}.bin", rows, length, width, dtype)
            for i in range(2)
        ]

        def create() -> None:
            own_folder(self.scratch.folder)
            for store in stores:
                make_way(store.path)
                store.create()

        self.ranks.led(create)
        return stores

    def _go_on(self, stores: Sequence[ActivationStore], blocks: int) -> None:
        """Take up what a sweep before this one left. Buffers whose bytes are not what was written,
        or that a forecast which is not whole would need back, are filled again from the start."""
        known = self.scratch.get(PROGRESS)
        missing = next((i for i in range(blocks) if self._trained(i) is None), blocks)
        if missing == blocks:
            self._reached = blocks - 1
            return
        if known is None or missing < known["reached"]:
            return
        reached, hashes = known["reached"], known["hashes"]
        needed = [reached % 2]
        if missing == reached > 0:
            needed.append((reached - 1) % 2)
        if self.ranks.led(lambda: all(stores[i].content_hash() == hashes[i] for i in needed)):
            self._reached, self._hashes = reached, hashes
            self._made_of = known.get("made_of")

    def _reach(self, layer: int, content: str, made_of: str | None) -> None:
        self._reached, self._hashes[layer % 2], self._made_of = layer, content, made_of
        known = {"reached": layer, "hashes": self._hashes, "made_of": made_of}
        self.scratch.put(PROGRESS, known)

    def _trained(self, layer: int) -> dict[str, Tensor] | None:
        return self.scratch.get_tensors(f"forecast.{layer}.safetensors")

    def _embed(self, step: Step, store: ActivationStore) -> None:
        """Fill the first buffer, unless a later one is whole; masks and rotary tables are noted in
        any case."""
        if self._reached >= 0:
            list(step.embedded(self.ids[:1]))
            return
        self.scratch.drop(PROGRESS)
        with filling(store, self.ranks) as writer:
            for start, _, hidden in step.embedded(self.ids):
                self._check_stop()
                writer.put(start, hidden)
        made_of = embedded(self.model, self.model.floats(step.source), self.ids, {})
        self._reach(0, writer.content_hash(), made_of)

    def _train(
        self,
        step: Step,
        tensors: dict[str, Tensor],
        before: dict[str, Tensor],
        stores: Sequence[ActivationStore],
        initial: Tensor,
    ) -> dict[str, Tensor]:
        """Train the forecast that is for the step's block, and keep it in the scratch folder."""
        runner, unit = self.model.runner, step.layout
        layer = unit.index
        with ExitStack() as stack:
            block = stack.enter_context(step.loaded(tensors))
            inputs, read = None, [stores[layer % 2]]
            if layer > 0:
                reader = attention_inputs(runner, self.model.layout.blocks[layer - 1], before)
                inputs, read = stack.enter_context(reader), [*read, stores[(layer - 1) % 2]]
            if self.training.initial == "queries":
                queries = mean_queries(unit, attention_shape(self.model.layout), tensors)
                initial = self._fitted(block, queries, read, inputs)
            optimizer = ForecastOptimizer(initial.to(self.model.device), self.training)
            losses = list(self._steps(optimizer, block, read, inputs))
        few = max(1, len(losses) // 10)
        ends = [sum(part) / few for part in (losses[:few], losses[-few:])]
        trained = {
            "weight": optimizer.weight.detach().cpu().contiguous(),
            "losses": torch.tensor(ends, dtype=torch.float64),
        }
        self.scratch.put_tensors(f"forecast.{layer}.safetensors", trained)
        return trained

    def _fitted(
        self,
        block: Block,
        queries: Tensor,
        stores: Sequence[ActivationStore],
        inputs: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """What comes closest to the block's own mean queries, read a block earlier."""
        if inputs is None:
            return queries
        rows = range(min(self.ids.shape[0], math.ceil(FIT_TOKENS / self.ids.shape[1])))
        batches = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        fit = LeastSquares()
        for _, (states, older) in read_ahead(stores, batches):
            self._check_stop()
            _, own = attention_call(block, states)
            fit.add(inputs(older), own.float() @ queries.T)
        return fit.solve()

    def _steps(
        self,
        optimizer: ForecastOptimizer,
        block: Block,
        stores: Sequence[ActivationStore],
        inputs: Callable[[Tensor], Tensor] | None,
    ) -> Iterator[float]:
        """Take the steps; the loss of each.

        inputs  from hidden states to what the forecast reads of them, if not what enters the
                attention that teaches it
        """
        training, model = self.training, self.model
        tables = model.runner.rotary(max(0, block.unit.index - 1), self.ids.shape[1])
        steps = [
            pieces_of(rows, self.batch)
            for rows in training.order(self.ids.shape[0], seed=self.seed)
        ]
        own = [step[i] for step in steps for i in self.ranks.own(len(step))]
        states = read_ahead(stores, own)
        coming: tuple[Piece, list[Tensor]] = [], []
        running = Pieces(self.ranks, model.device)
        for number, pieces in enumerate(steps):
            self._check_stop()
            teacher = training.teacher_at(number)

            def of_piece(piece: Piece, teacher: Teacher = teacher) -> Part:
                nonlocal coming
                if coming[0] is not piece:  # a piece may be asked for twice
                    coming = next(states)
                call, read = attention_call(block, coming[1][0])
                hidden = read if inputs is None else inputs(coming[1][1])
                return teacher.gradient(
                    optimizer.weight, hidden, call, tables, rows=training.rows_per_step
                )

            (loss,), (gradient,) = running.gradients(pieces, of_piece, [optimizer.weight])
            optimizer.step(gradient)
            yield loss

    def _name(self, step: Step) -> str | None:
        """The name of what leaves a step's block, which has its unit still."""
        if self.model.activations is None:
            return None
        batches = even(self.ids.shape[0], step.execution.batch)
        hook = chosen_attention(self.training, self.ids.shape[1])
        return after(
            self.model,
            self._made_of,
            step.index,
            self.model.floats(step.source),
            batches,
            attention="" if hook is None else repr(self.training.teacher),
        )

    def _advance(
        self,
        step: Step,
        tensors: dict[str, Tensor],
        stores: Sequence[ActivationStore],
        name: str | None,
    ) -> None:
        """Put what leaves the step's block where what entered the block before it was.

        name  of what leaves it, in the model's activations
        """
        layer = step.layout.index
        source, target = stores[layer % 2], stores[(layer + 1) % 2]
        hook = chosen_attention(self.training, self.ids.shape[1])
        kept, batches = self.model.activations, even(source.rows, step.execution.batch)
        ran = batches
        known = None if kept is None else kept.rows(name)
        keeping = nullcontext(nowhere) if kept is None else kept.keeping(name, batches)
        with filling(target, self.ranks) as writer:
            if known is not None:
                writer.put(0, known)
            else:
                ran = []
                with ExitStack() as stack:
                    stack.enter_context(step.loaded(tensors))
                    rows = stack.enter_context(stored_rows(source, self.ranks))
                    keep = stack.enter_context(keeping)
                    for start, stop, hidden in step.outputs(rows, hook=hook, dealt=True):
                        self._check_stop()
                        keep(hidden)
                        ran.append(stop - start)
                        writer.put(start, hidden)
        self._reach(layer + 1, writer.content_hash(), name if ran == batches else None)

    def _check_stop(self) -> None:
        if self.stops():
            raise Interrupted


def chosen_attention(training: Training, length: int) -> Callable[[AttentionCall], Tensor] | None:
    """How blocks attend while hidden states are made, or None for the model's own way."""
    selection = training.teacher.selection
    if not training.chosen_states or length < selection.dense_below:
        return None

    def hook(call: AttentionCall) -> Tensor:
        blocks, kv_heads = training.teacher.blocks(call), call.key.shape[1]
        seen = selection.seen_in(blocks, call.key.shape[2])
        return under_masks(call, [(range(kv_heads), seen)])

    return hook

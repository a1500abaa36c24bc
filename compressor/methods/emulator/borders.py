"""What enters and what leaves the middle of the whole model, for every row of calibration tokens.

Blocks below the middle are not trained, so these never change: the whole model runs once, block by
block, and its activations at the two borders lie on disk. The published code runs the frozen blocks
again in every step, at first with dropout on; here they are evaluated, so a record is exact.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

from compressor_calibration.store import ActivationStore
from torch import Tensor

from compressor.checkpoint.durable import make_way, own_folder
from compressor.checkpoint.records import Records
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.activations import after, embedded, even, nowhere
from compressor.runner.source_model import SourceModel
from compressor.runner.stream import filling, stored_rows
from compressor.runner.sweep import Execution, Progress, Step, walk

DONE = "borders.json"


@dataclass(frozen=True, slots=True)
class Borders:
    """Rows [rows, length, hidden] on disk, in the dtype in which blocks run.

    inputs   what enters the first block of the middle;  outputs  what leaves its last one
    """

    inputs: ActivationStore
    outputs: ActivationStore


def record_borders(
    model: SourceModel,
    ids: Tensor,
    *,
    pads: tuple[int, int],
    batch: int,
    scratch: Records,
    progress: Progress = lambda name, done, total: None,
    stops: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Borders:
    """Run the whole model up to the end of its middle, with one block in memory; the same call
    after it takes what is there.

    ids    [rows, length], which ranks share that all see the folder
    stops  asked by all of them together
    Raises Interrupted when asked to stop.
    """
    blocks, (bottom, top) = len(model.layout.blocks), pads
    (rows, length), width = ids.shape, model.layout.sizes.hidden
    inputs, outputs = (
        ActivationStore(scratch.folder / f"{name}.bin", rows, length, width, model.dtype)
        for name in ("inputs", "outputs")
    )
    known = scratch.get(DONE)

    def whole() -> bool:
        found = {"inputs": _hash(inputs), "outputs": _hash(outputs)}
        if known is not None and known == found:
            return True
        own_folder(scratch.folder)
        for store in (inputs, outputs):
            make_way(store.path)
            store.create()
        return False

    if ranks.led(whole):
        return Borders(inputs, outputs)
    hashes: dict[str, str] = {}
    execution = Execution(batch, stopping=stops, progress=progress, ranks=ranks)
    made_of: str | None = None
    for step in walk([model], execution=execution, units=range(blocks - top + 1)):
        if step.layout.kind == "embedding":
            made_of = embedded(model, model.floats(step.source), ids, {})
            with filling(inputs, ranks) as writer:
                for start, _, hidden in step.embedded(ids):
                    writer.put(start, hidden)
            hashes["inputs"] = writer.content_hash()
            continue
        inside = step.layout.index >= bottom
        entering = outputs if step.layout.index > bottom else inputs
        leaving = outputs if inside else inputs
        digest, made_of = _advance(step, entering, leaving, made_of)
        hashes["outputs" if inside else "inputs"] = digest
    scratch.put(DONE, hashes)
    return Borders(inputs, outputs)


def _advance(
    step: Step, entering: ActivationStore, leaving: ActivationStore, made_of: str | None
) -> tuple[str, str | None]:
    """Run stored rows through a block, or take from the activation store what is known to leave it:
    the hash of the rows, and what they were made of. Rows may be replaced in place: a batch is
    written after the next one was read."""
    model, batches = step.model, even(entering.rows, step.execution.batch)
    ranks = step.execution.ranks
    name = after(model, made_of, step.index, model.floats(step.source), batches)
    kept = model.activations
    known = None if kept is None else kept.rows(name)
    if known is not None:
        with filling(leaving, ranks) as writer:
            for start in range(0, leaving.rows, step.execution.batch):
                writer.put(start, known[start : start + step.execution.batch])
        return writer.content_hash(), name
    ran: list[int] = []
    keeping = nullcontext(nowhere) if kept is None else kept.keeping(name, batches)
    with ExitStack() as stack:
        rows = stack.enter_context(stored_rows(entering, ranks))
        stack.enter_context(step.loaded())
        writer = stack.enter_context(filling(leaving, ranks))
        keep = stack.enter_context(keeping)
        for start, stop, out in step.outputs(rows, dealt=True):
            step.execution.check_stop()
            keep(out)
            ran.append(stop - start)
            writer.put(start, out)
    return writer.content_hash(), name if ran == batches else None


def _hash(store: ActivationStore) -> str | None:
    whole = store.path.is_file() and store.path.stat().st_size >= store.nbytes
    return store.content_hash() if whole else None

"""A checkpoint in which stacked experts are seen one by one, under the names of their linears."""

from dataclasses import dataclass, replace

from compressor.checkpoint.parts import PartsCheckpoint
from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.safetensors import Entry
from compressor.checkpoint.wrapper import wrapped
from compressor.ir.layout import ModelLayout, TensorRef
from compressor.ir.tensor import TensorShape


@dataclass(frozen=True, slots=True)
class SlicedCheckpoint(PartsCheckpoint):
    """`inner` with slices of its stacks, weights and biases, in place of them."""


def sliced(checkpoint: Checkpoint, layout: ModelLayout) -> Checkpoint:
    """The checkpoint under the names that units go by; itself where nothing is stacked."""
    both = (((x.weight_name, x.tensor), (x.bias_name, x.bias_tensor)) for x in layout.linears)
    slices = {n: ref for pair in both for n, ref in pair if ref is not None and not ref.whole}
    if not slices:
        return checkpoint
    stacks = {ref.name for ref in slices.values()}
    entries = {name: e for name, e in checkpoint.entries.items() if name not in stacks}
    for name, ref in slices.items():
        entries[name] = _entry(checkpoint.entries[ref.name], ref)
    return wrapped(SlicedCheckpoint, checkpoint, entries=entries, inner=checkpoint, parts=slices)


def unsliced(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as files have it: a stack of experts is one tensor."""
    return checkpoint.inner if isinstance(checkpoint, SlicedCheckpoint) else checkpoint


def _entry(stack: Entry, ref: TensorRef) -> Entry:
    """What the header would say of a slice; its bytes are somewhere among the stack's."""
    shape = stack.spec.shape if ref.index is None else stack.spec.shape[1:]
    shape = shape[::-1] if ref.transposed else shape
    if ref.rows is not None:
        shape = (ref.rows.total, *shape[1:])
    return replace(stack, spec=TensorShape(stack.spec.dtype, tuple(shape)))

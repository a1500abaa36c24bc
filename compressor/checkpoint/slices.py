"""A checkpoint in which stacked experts are seen one by one, under the names of their linears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from compressor.checkpoint.reader import READ_THREADS, Checkpoint
from compressor.checkpoint.safetensors import Entry
from compressor.ir.layout import ModelLayout, TensorRef
from compressor.ir.tensor import TensorShape


@dataclass(frozen=True, slots=True)
class SlicedCheckpoint(Checkpoint):
    """`inner` with slices of its stacks in place of them; a stack is read once for all that are
    asked for together.

    slices  name of a weight or bias → where `inner` has it
    """

    inner: Checkpoint
    slices: Mapping[str, TensorRef]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self.inner.nbytes

    def read(
        self, names: Iterable[str], *, pin: bool = False, threads: int = READ_THREADS
    ) -> dict[str, Tensor]:
        """The named tensors on the CPU. Raises InputError for a name that is not there."""
        wanted = list(names)
        homes = self.inner.read(self._homes(wanted), pin=pin, threads=threads)
        return self._parts(wanted, homes)

    def in_files(self, names: Iterable[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The stacks that hold them."""
        return self.inner.in_files(self._homes(names), pin=pin)

    def view(self, names: Iterable[str], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Slices of those."""
        wanted = list(names)
        return self._parts(wanted, self.inner.view(self._homes(wanted), stored))

    def _parts(self, names: Iterable[str], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        refs = {name: self.slices.get(name, TensorRef(name)) for name in names}
        return {
            name: stored[name] if ref.whole else ref.read(stored[ref.name])
            for name, ref in refs.items()
        }

    def _homes(self, names: Iterable[str]) -> list[str]:
        every = (self.slices[name].name if name in self.slices else name for name in names)
        return list(dict.fromkeys(every))


def sliced(checkpoint: Checkpoint, layout: ModelLayout) -> Checkpoint:
    """The checkpoint under the names that units go by; itself where nothing is stacked."""
    slices = dict(_slices(layout))
    if not slices:
        return checkpoint
    stacks = {ref.name for ref in slices.values()}
    entries = {name: e for name, e in checkpoint.entries.items() if name not in stacks}
    for name, ref in slices.items():
        entries[name] = _entry(checkpoint.entries[ref.name], ref)
    plain = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    return SlicedCheckpoint(**{**plain, "entries": entries}, inner=checkpoint, slices=slices)


def _slices(layout: ModelLayout) -> Iterator[tuple[str, TensorRef]]:
    for linear in layout.linears:
        for name, ref in (
            (linear.weight_name, linear.tensor),
            (linear.bias_name, linear.bias_tensor),
        ):
            if ref is not None and not ref.whole:
                yield name, ref


def _entry(stack: Entry, ref: TensorRef) -> Entry:
    """What the header would say of a slice; its bytes are somewhere among the stack's."""
    shape = stack.spec.shape if ref.index is None else stack.spec.shape[1:]
    shape = shape[::-1] if ref.transposed else shape
    if ref.rows is not None:
        shape = (ref.rows.total, *shape[1:])
    return Entry(
        file=stack.file,
        spec=TensorShape(stack.spec.dtype, tuple(shape)),
        begin=stack.begin,
        end=stack.end,
    )

"""The tensors' dtypes, by their headers alone."""

import torch

from compressor.checkpoint.source import Source
from compressor.ir.tensor import dtype_name
from compressor.verify.checks.base import Check


class Headers(Check):
    """Each dtype is the one that the tensor's meaning calls for; names and shapes were settled
    when the subject was opened."""

    def begin(self) -> None:
        subject, source = self.subject, self.subject.source
        detail = f"{subject.contents}, all that {source.arch.model_type} needs"
        self.found.add(subject.opened, _wrong_dtypes(source), detail)


def _wrong_dtypes(source: Source) -> list[str]:
    """Tensors whose dtype is not what their linear's scheme or a float tensor calls for."""
    expected: dict[str, torch.dtype] = {}
    for linear in source.layout.linears:
        if source.schemes.linears[linear.name].weight is not None:
            stored = source.stored(linear)
            expected |= {f"{linear.name}.{leaf}": spec.dtype for leaf, spec in stored.items()}
    problems, entries = [], source.checkpoint.entries
    for name, entry in entries.items():
        dtype, wanted = entry.spec.dtype, expected.get(name)
        if wanted is not None and dtype != wanted:
            both = dtype_name(dtype), dtype_name(wanted)
            problems.append(f"{name} is {both[0]}, its scheme implies {both[1]}")
    for name in (name for unit in source.layout.units for name in unit.tensors):
        spec = entries[name].spec if name in entries else None
        if spec is not None and name not in expected and not spec.dtype.is_floating_point:
            problems.append(f"{name} is {dtype_name(spec.dtype)}, not a float tensor")
    return problems

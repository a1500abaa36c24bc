"""The tensors' dtypes, by their headers alone."""

import torch

from compressor.checkpoint.source import Source
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
    problems = []
    for name, entry in source.checkpoint.entries.items():
        dtype, wanted = entry.spec.dtype, expected.get(name)
        if wanted is not None and dtype != wanted:
            problems.append(f"{name} is {_plain(dtype)}, its scheme implies {_plain(wanted)}")
    for unit in source.layout.units:
        for name in unit.tensors:
            entry_ = source.checkpoint.entries.get(name)
            if (
                entry_ is not None
                and name not in expected
                and not entry_.spec.dtype.is_floating_point
            ):
                problems.append(f"{name} is {_plain(entry_.spec.dtype)}, not a float tensor")
    return problems


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

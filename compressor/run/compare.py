"""Checkpoints beside each other: what they take, and how far each is from one of them."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.find import Located
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.evaluate.perplexity import EvaluationResult, evaluate
from compressor.report.inspect import CheckpointInfo, inspect
from compressor.runner.execution import Progress
from compressor.runner.heap import give_back
from compressor.verify.checks.original import Original
from compressor.verify.compare_outputs import OutputError
from compressor.verify.findings import Findings, NothingMore
from compressor.verify.kernels.speed import Times, block_times
from compressor.verify.subject import Subject, kind_of


@dataclass(frozen=True, slots=True)
class Side:
    """One of the checkpoints.

    reference   the others are compared with it
    layers      linear → ‖weight − reference's‖ / ‖reference's‖, exact rescalings undone
    blocks      what each block computes of the reference's own states on held-out text
    evaluation  on the same tokens as the others', or None
    times       of the linears of a block in the middle, on a GPU
    notes       what could not be compared, and why
    """

    name: str
    info: CheckpointInfo
    reference: bool = False
    layers: dict[str, float] = field(default_factory=dict)
    blocks: tuple[OutputError, ...] = ()
    evaluation: EvaluationResult | None = None
    times: Times = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def schemes(self) -> dict[str, int]:
        """How its linears are stored, and how many are so."""
        found: dict[str, int] = defaultdict(int)
        for layer in self.info.layers:
            if layer.nbytes:  # a tied head has none of its own
                found[layer.scheme] += 1
        return dict(found)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        about = self.info.to_json()
        kept = ("model_type", "format", "dtype", "parameters", "nbytes", "bits_per_weight")
        return {
            "name": self.name,
            "reference": self.reference,
            **{key: about[key] for key in kept},
            "schemes": self.schemes,
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
            "layers": self.layers,
            "blocks": [asdict(row) for row in self.blocks],
            "microseconds": self.times,
            "notes": list(self.notes),
        }


def choose_reference(located: Sequence[Located]) -> int | None:
    """The first that is not quantized, or None."""
    plain = (i for i, each in enumerate(located) if not each.source.low_precision)
    return next(plain, None)


def names_of(located: Sequence[Located]) -> list[str]:
    """What to call them: by number where two have one name."""
    names = [each.identity["name"] for each in located]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def compare(
    located: Sequence[Located],
    *,
    reference: int | None,
    tokens: Tensor | None,
    device: torch.device,
    batch: int = 4,
    progress: Progress | None = None,
) -> list[Side]:
    """Each of the checkpoints, which are on this machine, beside the reference.

    tokens  ids [windows, length] to evaluate them on; None: no forward pass is made
    Raises InputError for models that do not read the same tokens.
    """
    sources = [each.source for each in located]
    original = None if reference is None else sources[reference]
    if tokens is not None:
        _same_tokens(located)
    told = _count(located, reference, progress, evaluated=tokens is not None)
    sides = []
    for i, (name, each) in enumerate(zip(names_of(located), located, strict=True)):
        held = original if i != reference else None
        side = _beside(name, each, held, device=device, run=tokens is not None, progress=told)
        found = None
        if tokens is not None:
            found = evaluate(
                each.source,
                tokens,
                device=device,
                dtype=each.source.checkpoint.running_dtype(device),
                against=held,
                batch=batch,
                progress=told,
            )
        sides.append(replace(side, reference=i == reference, evaluation=found))
    return sides


def _count(
    located: Sequence[Located], reference: int | None, progress: Progress | None, *, evaluated: bool
) -> Progress:
    """Tells units of all checkpoints as one count: each is read once beside the reference, and run
    once for an evaluation, with the reference beside it."""
    total = 0
    for i, each in enumerate(located):
        units, beside = len(each.source.layout.units), reference not in (None, i)
        total += units * beside + (units - 1) * (1 + beside) * evaluated
    counted = itertools.count(1)

    def told(name: str, done: int, of: int) -> None:
        if progress is not None:
            progress(name, next(counted), total)

    return told


def _same_tokens(located: Sequence[Located]) -> None:
    sizes = [each.source.layout.sizes.vocabulary for each in located]
    if len(set(sizes)) > 1:
        both = ", ".join(f"{name} {n}" for name, n in zip(names_of(located), sizes, strict=True))
        raise InputError(
            f"these models do not read the same tokens: {both}",
            hint="--weights-only compares their sizes and schemes",
        )


def _beside(
    name: str,
    located: Located,
    original: Source | None,
    *,
    device: torch.device,
    run: bool,
    progress: Progress,
) -> Side:
    """A checkpoint's weights and blocks beside the reference's, and its kernels' times."""
    info, folder = inspect(located), located.source.checkpoint.folder
    asked: dict[str, Any] = {"manifest": None, "original": original, "device": device, "seed": 0}
    subject = Subject(folder=folder, source=located.source, **asked)
    if folder.is_dir() and kind_of(folder) is not Subject:
        subject = kind_of(folder).open(folder, None, **asked)
    units = subject.source.layout.units
    middle = units[len(units) // 2].name if device.type == "cuda" else ""
    check, times = Original(subject, Findings()), Times()
    try:
        check.begin()
        for done, unit in enumerate(units, 1):
            if original is None and unit.name != middle:
                continue
            tensors = subject.read(unit, subject.stored(unit))
            check.unit(unit, tensors)
            if not run:
                check.outputs = None
            if unit.name == middle:
                times = block_times(subject, unit, tensors)
            give_back()
            if original is not None:
                progress(unit.name, done, len(units))
        check.conclude()
    except NothingMore:
        pass
    linears = {x.name for x in subject.source.layout.linears}
    problems = [] if original is None else check.found.damage
    return Side(
        name=name,
        info=info,
        layers={row.name: row.error for row in check.differences if row.name in linears},
        blocks=tuple(check.blocks),
        times=times,
        notes=tuple(dict.fromkeys(problems)),
    )

"""What each linear becomes: the scheme of the one quantizer that targets it, in a format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from compressor.errors import CompressError, InputError
from compressor.formats.base import Format
from compressor.ir.layout import ModelLayout
from compressor.ir.scheme import Scheme
from compressor.methods.common.shapes import some
from compressor.plan.unit_plan import PassPlan


def pass_schemes(
    passes: Sequence[PassPlan],
    layout: ModelLayout,
    fmt: Format,
    dtype: torch.dtype,
    problems: list[CompressError],
) -> dict[str, Scheme]:
    """One scheme for each linear, from the one quantizer that targets it."""
    schemes = {linear.name: Scheme() for linear in layout.linears}
    shapes = {linear.name: linear.shape for linear in layout.linears}
    owner: dict[str, str] = {}
    for number, plan in enumerate(passes):
        name, scheme = f"{plan.step.name} (pass {number + 1})", plan.effects.scheme
        taken = sorted(n for n in plan.names if n in owner)
        if taken and (scheme is not None or plan.effects.transforms):
            what = "is a second quantizer for" if scheme else "changes weights after"
            problems.append(
                InputError(
                    f"{name} {what} {some(taken)}, which {owner[taken[0]]} quantizes",
                    hint="transforms come before the one quantizer of a target; "
                    "split the targets between them, or drop one",
                )
            )
            continue
        if scheme is None:
            continue
        if scheme.weight is not None:
            spec = replace(scheme.weight, scale_dtype=fmt.scale_dtype(scheme.weight, dtype))
            scheme = replace(scheme, weight=spec)
        refused: dict[str, list[str]] = {}
        for linear in plan.names:
            owner[linear] = name
            schemes[linear] = scheme
            reason = fmt.accepts(scheme, shapes[linear]) or fmt.may_lack(scheme)
            if reason:
                refused.setdefault(reason, []).append(linear)
        for reason, names in refused.items():
            problems.append(
                InputError(f"format {fmt.name} cannot hold {some(sorted(names))}: {reason}")
            )
    return schemes

"""What each linear becomes: the scheme of the one quantizer that targets it, in a format."""

from collections.abc import Sequence

import torch

from compressor.errors import CompressError, InputError
from compressor.formats.base import Format
from compressor.ir.layout import ModelLayout
from compressor.ir.scheme import Scheme
from compressor.methods.common.shapes import some
from compressor.plan.offers import format_offer, in_format
from compressor.plan.unit_plan import PassPlan
from compressor.runtimes.contract import Runtime


def pass_schemes(
    passes: Sequence[PassPlan],
    layout: ModelLayout,
    fmt: Format,
    dtype: torch.dtype,
    problems: list[CompressError],
    runtime: Runtime | None = None,
) -> dict[str, Scheme]:
    """One scheme for each linear, from the one quantizer that targets it. What the format does not
    hold goes to the problems, with others that do and that the runtime reads."""
    schemes = {linear.name: Scheme() for linear in layout.linears}
    linears = {linear.name: linear for linear in layout.linears}
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
        scheme = in_format(scheme, fmt, dtype)
        refused: dict[str, list[str]] = {}
        for linear in plan.names:
            owner[linear] = name
            schemes[linear] = scheme
            shape, group = linears[linear].shape, scheme.weight and scheme.weight.group_size
            if problems and group and shape[1] % group:
                shape = (shape[0], group)  # the pass has said of the model what is wrong with it
            reason = fmt.accepts(scheme, shape) or fmt.may_lack(scheme)
            if reason:
                refused.setdefault(reason, []).append(linear)
        for reason, names in refused.items():
            these = [linears[name] for name in sorted(names)]
            offer = format_offer(scheme, these, layout, fmt=fmt, dtype=dtype, runtime=runtime)
            what = some(sorted(names))
            problems.append(
                InputError(f"format {fmt.name} cannot hold {what}: {reason}", hint=offer)
            )
    return schemes

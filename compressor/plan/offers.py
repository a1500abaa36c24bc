"""What would do where a format does not hold a scheme."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from compressor.formats.base import Format, format_names, get_format
from compressor.formats.loading import loading_of
from compressor.ir.layout import Linear, ModelLayout
from compressor.ir.scheme import Scheme
from compressor.runtimes.contract import Runtime
from compressor.runtimes.loads import Written, loads


def in_format(scheme: Scheme, fmt: Format, dtype: torch.dtype) -> Scheme:
    """The scheme with its scales in the dtype in which a format stores them."""
    if scheme.weight is None:
        return scheme
    dtype = fmt.scale_dtype(scheme.weight, dtype)
    return replace(scheme, weight=replace(scheme.weight, scale_dtype=dtype))


def format_offer(
    scheme: Scheme,
    linears: Sequence[Linear],
    layout: ModelLayout,
    *,
    fmt: Format,
    dtype: torch.dtype,
    runtime: Runtime | None,
) -> str:
    """Other formats that hold a scheme for some linears of a model, as far as a runtime reads it
    there; else what this format holds."""
    tied = layout.tied is not None
    found = []
    for other, form in _holders(scheme, linears, dtype=dtype):
        entries = tuple((linear, form, _form(other, linear, form, dtype)) for linear in linears)
        written = Written(other.name, layout.model_type, entries, None, (), tied)
        if runtime is None or not loads(runtime, written):
            found.append(other.name)
    if found:
        there = f" that {runtime.title} loads" if runtime is not None else " that holds it"
        return f"a format{there}: {', '.join(found)}"
    reads = f" and {runtime.title} loads" if runtime is not None else ""
    return f"no other format holds it{reads}; {fmt.name} holds {loading_of(fmt.name).holds}"


def _holders(
    scheme: Scheme, linears: Sequence[Linear], *, dtype: torch.dtype
) -> Iterator[tuple[Format, Scheme]]:
    """Formats of codes that have a form for every weight of the scheme, and the scheme in them."""
    for name in format_names():
        fmt = get_format(name)
        form = in_format(scheme, fmt, fmt.model_dtype(dtype))
        shapes = {linear.shape for linear in linears}
        refused = any(fmt.accepts(form, shape) or fmt.may_lack(form) for shape in shapes)
        if not refused and name != "dense":
            yield fmt, form


def _form(fmt: Format, linear: Linear, scheme: Scheme, dtype: torch.dtype) -> str:
    assert scheme.weight is not None
    dtype = fmt.model_dtype(dtype)
    return fmt.form(fmt.layout(scheme.weight, linear.shape, model_dtype=dtype, input=scheme.input))

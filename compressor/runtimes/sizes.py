"""Whether a model's sizes go with a runtime: split between GPUs, cut into groups and blocks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from compressor.errors import InputError
from compressor.ir.layout import AttentionShape, Linear
from compressor.ir.scheme import Scheme
from compressor.runtimes.contract import Loads, Runtime, or_

SPLIT_INPUTS = ("attn.o", "mlp.down", "expert.down")
"""Roles whose inputs, not outputs, are split between GPUs."""
GROUPS = (128, 64, 32)
"""Sizes of groups that a hint names."""


def wrong_size(runtime: Runtime, line: Loads, linear: Linear, scheme: Scheme) -> str:
    """What is wrong with a weight's size on each GPU; empty where nothing is."""
    outputs, inputs = linear.shape
    across = linear.role in SPLIT_INPUTS
    count, what = (inputs, "inputs") if across else (outputs, "outputs")
    if count % runtime.tp:
        return f"cannot split the model's {count} {what} between {runtime.tp} GPUs"
    if across:
        inputs //= runtime.tp
    else:
        outputs //= runtime.tp
    split = f", split between {runtime.tp} GPUs" if runtime.tp > 1 else ""
    size = line.multiples
    for count, multiple, what in (
        (outputs, size.out_features, "outputs"),
        (inputs, size.in_features, "inputs"),
    ):
        if count % multiple:
            return f"wants {what} in multiples of {multiple}, not the model's {count}{split}"
    spec = scheme.weight
    assert spec is not None
    if spec.group_size and inputs % spec.group_size:
        return f"cannot cut the model's {inputs} inputs{split} into groups of {spec.group_size}"
    if spec.block is not None and line.whole_blocks:
        rows, columns = spec.block
        if across and runtime.tp > 1 and inputs % columns:
            return f"cannot cut the model's {inputs} inputs{split} into blocks of {columns}"
        if not across and (linear.fused or runtime.tp > 1) and outputs % rows:
            return f"cannot cut the model's {outputs} outputs{split} into blocks of {rows}"
    return ""


def right_sizes(runtime: Runtime, lines: Sequence[Loads], linear: Linear, scheme: Scheme) -> str:
    """Which groups or how many GPUs a weight's size would go with."""
    spec = scheme.weight
    assert spec is not None

    def fits(gpus: int, group: int | None) -> bool:
        tried = replace(scheme, weight=replace(spec, group_size=group))
        there = runtime.model_copy(update={"tp": gpus})
        return any(
            not line.weights.unlike(tried.weight) and not wrong_size(there, line, linear, tried)
            for line in lines
        )

    sizes = [g for g in GROUPS if spec.strategy == "group" and fits(runtime.tp, g)]
    gpus = [n for n in range(1, runtime.tp) if fits(n, spec.group_size)]
    found = [f"group_size: {or_(sizes)}"] * bool(sizes) + [f"tp: {or_(gpus)}"] * bool(gpus)
    return ", or ".join([*found, "leave it in float (ignore)"])


def wrong_heads(runtime: Runtime, attention: Iterable[AttentionShape]) -> Iterator[InputError]:
    """The first attention whose heads do not divide between the GPUs."""
    tp = runtime.tp
    for shape in attention:
        if not _divide(shape, tp):
            yield InputError(
                f"{runtime.title} cannot split the model's {shape.heads} heads and "
                f"{shape.kv_heads} KV heads between {tp} GPUs",
                hint=f"tp: {or_(n for n in range(1, tp) if _divide(shape, n))}",
            )
            return


def _divide(shape: AttentionShape, gpus: int) -> bool:
    """Whether heads divide between GPUs, and KV heads too or are shared evenly."""
    shared = shape.kv_heads % gpus == 0 or gpus % shape.kv_heads == 0
    return shape.heads % gpus == 0 and shared

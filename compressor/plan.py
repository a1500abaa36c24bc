"""What a run will do, from config.json and tensor headers alone.

Everything that can fail fails here: all problems are collected and raised together, before a
weight is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.stats import StatNeeds

from compressor.errors import CompressError, InputError, Problems
from compressor.formats.base import Format, ModelSchemes, TensorShape, get_format
from compressor.layout import Linear, ModelLayout, UnitLayout
from compressor.recipe import Recipe, Step, nearest
from compressor.recipe_checks import check_recipe
from compressor.scheme import KVSpec, Scheme
from compressor.shards import ShardLayout, plan_shards
from compressor.source import Source

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One pass over the whole model.

    matches  target pattern → how many linears it means;  ignored  the same for `ignore`
    names    the linears it works on
    """

    step: Step
    matches: Mapping[str, int]
    ignored: Mapping[str, int]
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """One unit: what passes select in it, which statistics they read, what it writes.

    steps    indices into Plan.passes of those that select a linear here, in order
    needs    input site → statistics
    outputs  tensor name → dtype and shape, in the order of the shards
    """

    layout: UnitLayout
    steps: tuple[int, ...]
    needs: Mapping[str, StatNeeds]
    outputs: Mapping[str, TensorShape]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    recipe: Recipe
    source: Source
    format: Format
    dtype: torch.dtype
    passes: tuple[PassPlan, ...]
    units: tuple[UnitPlan, ...]
    schemes: ModelSchemes
    shards: ShardLayout
    notes: tuple[str, ...]

    @property
    def layout(self) -> ModelLayout:
        """The source's layout."""
        return self.source.layout

    @property
    def calibrated(self) -> bool:
        """Whether any pass reads statistics, so that tokens have to be run."""
        return any(unit.needs for unit in self.units)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype in which blocks run: the model's on a GPU, where it is fast; float32 on a CPU."""
        return self.source.checkpoint.dtype if device.type == "cuda" else torch.float32

    @property
    def output_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards.shards)

    @property
    def config(self) -> dict[str, Any]:
        """The written config.json."""
        config = {k: v for k, v in self.source.checkpoint.config.items() if k != "torch_dtype"}
        config.pop("quantization_config", None)
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.recipe.untie and self.layout.tied:
            config["tie_word_embeddings"] = False
        entry = self.format.config(self.schemes)
        if entry:
            config["quantization_config"] = entry
        return config


def make_plan(recipe: Recipe, source: Source, *, output: Path | None = None) -> Plan:
    """Plan a run. `output` is checked for room where it is given.

    Raises Problems with everything that is wrong.
    """
    problems: list[CompressError] = []
    notes: list[str] = []
    fmt = _format(recipe, problems)
    dtype = fmt.model_dtype(
        source.checkpoint.dtype if recipe.dtype == "auto" else DTYPES[recipe.dtype]
    )
    if source.quantized and not recipe.dequantize_source:
        problems.append(
            InputError(
                f"{recipe.model} is already quantized ({source.format.name})",
                hint="start from the original weights, or accept the loss twice over with "
                "dequantize_source: true",
            )
        )
    passes = tuple(_select(step, source.layout, problems, notes) for step in recipe.passes)
    schemes = _schemes(passes, source.layout, fmt, dtype, problems)
    _check_tied(recipe, source.layout, passes, problems)
    _check_fused(source.layout, schemes, problems)
    kv = _kv(passes, problems)
    problems += check_recipe(recipe, source)
    if problems:
        raise Problems(problems)
    model = ModelSchemes(linears=schemes, kv=kv)
    units = tuple(
        _unit(unit, passes, model, source, recipe, fmt, dtype) for unit in source.layout.units
    )
    try:
        groups = [group for unit in units for group in module_groups(unit.outputs)]
        shards = plan_shards(groups, max_bytes=recipe.max_shard_size)
        plan = Plan(
            recipe=recipe,
            source=source,
            format=fmt,
            dtype=dtype,
            passes=passes,
            units=units,
            schemes=model,
            shards=shards,
            notes=tuple(notes),
        )
        assert plan.config
    except CompressError as error:
        raise Problems([error]) from error
    if output is not None:
        check_room(output, plan.output_bytes)
    return plan


def _format(recipe: Recipe, problems: list[CompressError]) -> Format:
    try:
        return get_format(recipe.format)
    except InputError as error:
        problems.append(InputError(f"format: {error.message}", hint=error.hint))
        return get_format("dense")


def _select(
    step: Step, layout: ModelLayout, problems: list[CompressError], notes: list[str]
) -> PassPlan:
    """What a pass works on; a target that means nothing is an error, an `ignore` a note."""
    selection = step.params.selection
    try:
        matches = selection.counts(layout.linears)
        ignored = selection.ignored_counts(layout.linears)
        picked = selection.pick(layout.linears)
    except InputError as error:
        problems.append(InputError(f"{step.name}: {error.message}", hint=error.hint))
        return PassPlan(step, {}, {}, frozenset())
    roles = sorted({linear.role for linear in layout.linears})
    for pattern, count in matches.items():
        if not count:
            problems.append(
                InputError(
                    f"{step.name}: target {pattern!r} matches no linear of this model",
                    hint=nearest(pattern, ["linear", *roles]),
                )
            )
    for pattern, count in ignored.items():
        if not count:
            notes.append(f"{step.name}: ignore {pattern!r} matches nothing")
    if not picked and all(matches.values()):
        problems.append(
            InputError(f"{step.name}: everything it targets is ignored", hint="shorten `ignore`")
        )
    broken: dict[str, list[str]] = {}
    for linear in picked:
        reason = step.params.check(linear)
        if reason:
            broken.setdefault(reason, []).append(linear.name)
    for reason, names in broken.items():
        problems.append(InputError(f"{step.name}: {_some(names)}: {reason}"))
    return PassPlan(step, matches, ignored, frozenset(linear.name for linear in picked))


def _schemes(
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
        name, scheme = f"{plan.step.name} (pass {number + 1})", plan.step.params.scheme()
        taken = sorted(n for n in plan.names if n in owner)
        if taken:
            what = "is a second quantizer for" if scheme else "changes weights after"
            problems.append(
                InputError(
                    f"{name} {what} {_some(taken)}, which {owner[taken[0]]} quantizes",
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
            reason = fmt.accepts(scheme, shapes[linear])
            if reason:
                refused.setdefault(reason, []).append(linear)
        for reason, names in refused.items():
            problems.append(
                InputError(f"format {fmt.name} cannot hold {_some(sorted(names))}: {reason}")
            )
    return schemes


def _check_tied(
    recipe: Recipe,
    layout: ModelLayout,
    passes: Sequence[PassPlan],
    problems: list[CompressError],
) -> None:
    if layout.tied is None or recipe.untie:
        return
    heads = {linear.name for linear in layout.linears if linear.role == "lm_head"}
    for plan in passes:
        if plan.names & heads:
            problems.append(
                InputError(
                    f"{plan.step.name} targets lm_head, which shares its weight with {layout.tied}",
                    hint="leave it alone with ignore: [lm_head], or write it separately with "
                    "untie: true at the top of the recipe",
                )
            )


def _check_fused(
    layout: ModelLayout, schemes: Mapping[str, Scheme], problems: list[CompressError]
) -> None:
    """Runtimes fuse q/k/v and gate/up into one matrix: they need one scheme."""
    groups: dict[str, list[Linear]] = {}
    for linear in layout.linears:
        if linear.fused:
            groups.setdefault(linear.fused, []).append(linear)
    for linears in groups.values():
        if len({schemes[linear.name] for linear in linears}) > 1:
            problems.append(
                InputError(
                    f"{', '.join(linear.name for linear in linears)} would get different schemes, "
                    "but runtimes fuse them into one matrix",
                    hint="target or ignore them together",
                )
            )


def _kv(passes: Sequence[PassPlan], problems: list[CompressError]) -> KVSpec | None:
    found = [(p.step.name, p.step.params.kv()) for p in passes if p.step.params.kv() is not None]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        problems.append(InputError(f"{names} both quantize the KV cache", hint="keep one"))
    return found[0][1] if found else None


def _unit(
    unit: UnitLayout,
    passes: Sequence[PassPlan],
    model: ModelSchemes,
    source: Source,
    recipe: Recipe,
    fmt: Format,
    dtype: torch.dtype,
) -> UnitPlan:
    names = {linear.name for linear in unit.linears}
    steps = tuple(i for i, plan in enumerate(passes) if plan.names & names)
    needs: dict[str, StatNeeds] = {}
    for i in steps:
        wanted = passes[i].step.params.needs()
        if wanted != StatNeeds():
            for linear in unit.linears:
                if linear.name in passes[i].names:
                    needs[linear.site] = needs.get(linear.site, StatNeeds()) | wanted
    outputs: dict[str, TensorShape] = {}
    by_weight = {f"{linear.name}.weight": linear for linear in unit.linears}
    tensors = list(unit.tensors)
    untie = unit.kind == "head" and recipe.untie and source.layout.tied is not None
    if untie:
        tensors += [f"{linear.name}.weight" for linear in unit.linears]
    for name in tensors:
        found = by_weight.get(name)
        scheme = model.linears[found.name] if found else Scheme()
        if found is not None and scheme.weight is not None:
            local = fmt.layout(scheme.weight, found.shape, model_dtype=dtype, input=scheme.input)
            outputs.update({f"{found.name}.{leaf}": spec for leaf, spec in local.items()})
        elif found is not None:
            outputs[name] = TensorShape(_float_dtype(name, source, recipe, dtype), found.shape)
        else:
            shape = source.checkpoint.entries[name].spec.shape
            outputs[name] = TensorShape(_float_dtype(name, source, recipe, dtype), shape)
    for i in range(len(passes)):
        for name, tensor in passes[i].step.params.adds(unit, dtype).items():
            outputs[name] = TensorShape(dtype=tensor.dtype, shape=tuple(tensor.shape))
    if model.kv is not None and model.kv.element != "int4" and unit.attention is not None:
        heads = unit.attention.kv_heads if model.kv.per == "head" else 1
        scale = torch.empty(heads, device="meta")
        stored = fmt.kv_tensors(
            model.kv, attention_path(unit), k_scale=scale, v_scale=scale, model_dtype=dtype
        )
        for name, tensor in stored.items():
            outputs[name] = TensorShape(dtype=tensor.dtype, shape=tuple(tensor.shape))
    for name in source.added.get(unit.name, ()):
        outputs.setdefault(name, source.checkpoint.entries[name].spec)
    return UnitPlan(layout=unit, steps=steps, needs=needs, outputs=outputs)


def attention_path(unit: UnitLayout) -> str:
    """Path of a block's attention module: the one that its output projection is in."""
    return next(x.name.rpartition(".")[0] for x in unit.linears if x.role == "attn.o")


def _float_dtype(name: str, source: Source, recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """A float tensor keeps its own dtype unless the recipe or the format asks for one."""
    entry = source.checkpoint.entries.get(name)
    kept = recipe.dtype == "auto" and dtype == source.checkpoint.dtype
    if kept and entry is not None and entry.spec.dtype in DTYPES.values():
        return entry.spec.dtype
    return dtype


def module_groups(outputs: Mapping[str, TensorShape]) -> list[dict[str, TensorShape]]:
    """Tensors that must lie in one shard: those of one module."""
    modules: dict[str, dict[str, TensorShape]] = {}
    for name, spec in outputs.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = spec
    return list(modules.values())


def check_room(output: Path, needed: int) -> None:
    """Raises InputError where a checkpoint of `needed` bytes does not fit beside `output`."""
    folder = output
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed * 1.02 > free:
        raise InputError(
            f"the checkpoint takes {needed / 1e9:.2f} GB; {folder} has {free / 1e9:.2f} GB left",
            hint="free some space, or write elsewhere with --output",
        )


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} linears ({names[0]}, …)"

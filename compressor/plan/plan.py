"""What a run will do, from config.json and tensor headers alone.

Everything that can fail fails here: all problems are collected and raised together, before a
weight is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compressor.arch.free import EMBEDDING
from compressor.attention.policy import check_policy, combine, read_policy
from compressor.checkpoint.container import Safetensors, ShardLayout, lay_out
from compressor.checkpoint.delta.base import Base
from compressor.checkpoint.secrets import leaks
from compressor.checkpoint.side_files import SideFiles
from compressor.checkpoint.source import Source, is_cache_scale
from compressor.checkpoint.target import ModelTarget
from compressor.checkpoint.workspace import lacking_room, refusal
from compressor.errors import CompressError, InputError, Problems, nearest
from compressor.formats.base import Format, ModelSchemes, get_format
from compressor.ir.layout import Linear, ModelLayout, weight_name
from compressor.ir.scheme import KVSpec, Scheme
from compressor.ir.tensor import TensorShape
from compressor.methods.base import ModelPass, Needs
from compressor.methods.common.context import PlanContext
from compressor.methods.common.shapes import some
from compressor.numerics.processor import multiplies_bfloat16
from compressor.plan.activation_store import store_notes, store_problem
from compressor.plan.check_recipe import check_recipe
from compressor.plan.delta import as_delta
from compressor.plan.order import composition_problems, order_problems
from compressor.plan.recipe import Recipe, Step
from compressor.plan.runtime_choice import settle
from compressor.plan.schemes import pass_schemes
from compressor.plan.unit_plan import DTYPES, PassPlan, UnitPlan, plan_unit


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    recipe: Recipe
    target: ModelTarget
    passes: tuple[PassPlan, ...]
    units: tuple[UnitPlan, ...]
    shards: ShardLayout
    notes: tuple[str, ...]

    @property
    def source(self) -> Source:
        """The model that is read."""
        return self.target.source

    @property
    def schemes(self) -> ModelSchemes:
        """What each linear and the cache become."""
        return self.target.schemes

    @property
    def layout(self) -> ModelLayout:
        """The source's layout."""
        return self.source.layout

    @property
    def two_streams(self) -> bool:
        """Whether the original model's activations are carried beside the quantized one's."""
        apart = self.recipe.propagate == "quantized"
        return apart and any(p.needs.stats.cross or p.needs.block for p in self.passes)

    @cached_property
    def calibrated(self) -> bool:
        """Whether any pass reads statistics, so that tokens have to be run."""
        learning = any(p.needs.tokens for p in self.passes)
        return learning or any(unit.calibrated for unit in self.units)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype in which blocks run."""
        return self.source.checkpoint.running_dtype(device)

    def multiplies_bfloat16(self, device: torch.device) -> bool:
        """Whether blocks of a bfloat16 model multiply in it on a CPU that does that faster, as on a
        GPU, while all else stays in float32: where passes read sums over inputs and no more."""
        read = [(p.needs, p.needs.stats) for p in self.passes]
        more = any(n.kv or n.tokens or n.block or s.keep_inputs or s.cross for n, s in read)
        quick = device.type == "cpu" and multiplies_bfloat16() and not more
        dense = not any(linear.expert is not None for linear in self.layout.linears)
        return quick and dense and self.source.checkpoint.dtype == torch.bfloat16


def make_plan(
    recipe: Recipe,
    source: Source,
    *,
    output: Path | None = None,
    base: Base | None = None,
    beside: SideFiles | None = None,
) -> Plan:
    """Plan a run. `output` is checked for room where it is given.

    base    what a pass names as its base, where it has been read; else its headers are looked at
    beside  files of the source that go along, and those that stay behind, which is noted
    Raises Problems with everything that is wrong.
    """
    whole, source = source, _read_by(recipe, source)
    problems: list[CompressError] = [*source.checkpoint.problems]
    notes: list[str] = [*source.checkpoint.notes]
    if any(is_cache_scale(name) for names in source.added.values() for name in names):
        notes.append("scales of the source's KV cache are left out: a pass makes new ones")
    if beside is not None:
        problems += beside.problems
        if recipe.publish is not None:
            problems += leaks(source.checkpoint.folder, beside.carried)
        notes += beside.notes
    fmt = _format(recipe, problems)
    dtype = fmt.model_dtype(
        source.checkpoint.dtype if recipe.dtype == "auto" else DTYPES[recipe.dtype]
    )
    if source.low_precision and not recipe.dequantize_source:
        problems.append(
            InputError(
                f"{recipe.model} is already quantized ({source.low_precision})",
                hint="start from the original weights, or accept the loss twice over with "
                "dequantize_source: true",
            )
        )
    passes = tuple(_select(step, recipe, source, problems, notes) for step in recipe.passes)
    schemes = pass_schemes(passes, source.layout, fmt, dtype, problems, recipe.runtime)
    problems += _tied(recipe, source.layout, passes)
    by_linear = ((linear, schemes[linear.name]) for linear in source.layout.linears)
    if reason := fmt.refuses(source.layout.model_type, by_linear):
        problems.append(InputError(f"format {fmt.name}: {reason}", hint="use compressed-tensors"))
    problems += order_problems(recipe, passes)
    problems += _unlike(source.layout, schemes)
    if not problems:
        problems += composition_problems(passes, source.layout, schemes)
    kv = _kv(passes, problems)
    target = ModelTarget(
        source=source,
        format=fmt,
        schemes=ModelSchemes(linears=schemes, kv=kv),
        dtype=dtype,
        container=Safetensors(recipe.max_shard_size, source.checkpoint.stem),
        recast=recipe.dtype != "auto",
        untied=recipe.untie,
    )
    target = as_delta(target, recipe, passes, base, problems, notes)
    problems += check_recipe(recipe, source)
    problems += _policy_problems(passes, source)
    costs = [(plan.step.name, plan.cost(source.checkpoint.dtype)) for plan in passes]
    notes += [f"{name}: {note}" for name, cost in costs for note in cost.notes]
    if output is not None:
        read = [s.checkpoint.folder for s in (source, *([base.source] if base else ()))]
        refused = [refusal(output, models=read), store_problem(recipe)]
        problems += filter(None, refused)
    if not problems:
        try:
            settled = settle(recipe, source.layout, passes, fmt, target.schemes, dtype)
        except InputError as error:
            raise Problems([error]) from error
        if settled.format is not None:
            recipe = recipe.model_copy(update={"format": settled.format})
            plan = make_plan(recipe, whole, output=output, base=base, beside=beside)
            return replace(plan, notes=(*plan.notes, *settled.notes))
        target = replace(target, schemes=settled.schemes)
        problems += settled.refusals
        notes += settled.notes
    if problems:
        room = lacking_room(output, _least_bytes(source, schemes)) if output is not None else None
        raise Problems([*problems, room] if room is not None else problems)
    try:
        target = _with_passes(target, passes)
        quantized = recipe.propagate == "quantized"
        corrected = quantized and any(p.needs.stats.cross for p in passes)
        units = tuple(
            plan_unit(unit, passes, target, beside=corrected) for unit in source.layout.units
        )
        calibrated = any(unit.calibrated for unit in units)
        notes += store_notes(recipe, source.layout, dtype, calibrated=calibrated)
        plan = Plan(
            recipe=recipe,
            target=target,
            passes=passes,
            units=units,
            shards=lay_out(target.container, [unit.outputs for unit in units]),
            notes=tuple(notes),
        )
        _ = target.config()  # raises what the format refuses
    except CompressError as error:
        raise Problems([error]) from error
    if output is not None:
        scratch = max(cost.scratch for _, cost in costs)
        along = 0 if beside is None else beside.size(source.checkpoint.folder)
        room = lacking_room(output, plan.shards.size + along, scratch=scratch)
        if room is not None:
            raise room
    return plan


def _read_by(recipe: Recipe, source: Source) -> Source:
    """The model that passes work on, which may be a part of the one that the recipe names."""
    for step in recipe.passes:
        try:
            source = step.params.reads(source)
        except InputError as error:
            raise Problems([*source.checkpoint.problems, _of_pass(step, error)]) from error
    return source


def _with_passes(target: ModelTarget, passes: Sequence[PassPlan]) -> ModelTarget:
    """The target with what passes add to it."""
    layout, kv = target.source.layout, target.schemes.kv
    entries: dict[str, Any] = {}
    added: dict[str, dict[str, TensorShape]] = {unit.name: {} for unit in layout.units}
    for plan in passes:
        entries |= plan.effects.config
        if isinstance(plan.step.params, ModelPass):
            for unit, shapes in plan.step.params.adds(layout, target.dtype).items():
                added[unit] |= shapes
    scales = {
        unit.attention_path: unit.attention.kv_heads if kv.per == "head" else 1
        for unit in layout.units
        if kv is not None and kv.element != "int4" and unit.attention is not None
    }
    return replace(target, entries=entries, added=added, scales=scales)


def _policy_problems(passes: Sequence[PassPlan], source: Source) -> Iterator[CompressError]:
    """Why attention policies, that of the source included, cannot describe the model, or contradict
    each other."""
    policy, layout = None, source.layout
    try:
        policy = read_policy(source.checkpoint.folder)
        if policy is not None:
            check_policy(policy, layout)
    except InputError as error:
        yield error
    certain = True
    for plan in passes:
        if isinstance(plan.step.params, ModelPass):
            try:
                found = plan.step.params.policy(layout, None)
                if found is not None:
                    check_policy(found, layout)
                    named = any(rule.heads for layer in found.layers for rule in layer.rules)
                    certain = certain and not (named and plan.step.params.needs().tokens)
                    policy = combine(policy, found, certain=certain)
            except InputError as error:
                yield _of_pass(plan.step, error)


def _of_pass(step: Step, error: InputError) -> InputError:
    return InputError(f"{step.name}: {error.message}", hint=error.hint)


def _format(recipe: Recipe, problems: list[CompressError]) -> Format:
    try:
        return get_format(recipe.format)
    except InputError as error:
        problems.append(InputError(f"format: {error.message}", hint=error.hint))
        return get_format("dense")


def _select(
    step: Step,
    recipe: Recipe,
    source: Source,
    problems: list[CompressError],
    notes: list[str],
) -> PassPlan:
    """What a pass works on; a target that means nothing is an error, an `ignore` a note."""
    selection, layout = step.params.selection, source.layout
    works = step.params.effects().works_on != "none"
    entries = source.checkpoint.entries.values()
    context = PlanContext(
        layout=layout,
        config=source.checkpoint.config,
        dtype=source.checkpoint.dtype,
        parameters=sum(torch.Size(entry.spec.shape).numel() for entry in entries),
        untied=recipe.untie,
        selected=(),
        rows=recipe.calibration.samples,
        length=recipe.calibration.length,
    )
    try:
        matches = selection.counts(layout.linears)
        ignored = selection.ignored_counts(layout.linears)
        picked = selection.pick(layout.linears) if works else ()
    except InputError as error:
        problems.append(_of_pass(step, error))
        return PassPlan(step, {}, {}, context)
    roles = sorted({linear.role for linear in layout.linears})
    for pattern, count in matches.items():
        if not count and EMBEDDING.search(pattern):
            problems.append(
                InputError(
                    f"{step.name}: {pattern!r} is an embedding, and no format here holds its codes",
                    hint="it is looked up, not multiplied; of the runtimes known here vLLM alone "
                    "reads one in codes. A head can be quantized: ignore: [], and untie: true "
                    "where it shares the embedding's weight",
                )
            )
        elif not count:
            problems.append(
                InputError(
                    f"{step.name}: target {pattern!r} matches no linear of this model",
                    hint=nearest(pattern, ["linear", *roles]),
                )
            )
    for pattern, count in ignored.items():
        if not count:
            notes.append(f"{step.name}: ignore {pattern!r} matches nothing")
    if not picked and all(matches.values()) and works:
        problems.append(
            InputError(f"{step.name}: everything it targets is ignored", hint="shorten `ignore`")
        )
    if (beside := [x for x in picked if x.beside]) and not _without_data(step):
        problems.append(
            InputError(
                f"{step.name}: nothing runs {some(sorted(x.name for x in beside))}, which it would "
                "have to see at work",
                hint="rtn, fp8, nvfp4, mxfp4 and mxfp8 without static inputs round such linears",
            )
        )
    context = replace(context, selected=tuple(picked))
    problems += [_of_pass(step, error) for error in step.params.check(context)]
    return PassPlan(step, matches, ignored, context)


def _without_data(step: Step) -> bool:
    """Whether a pass makes codes of weights alone."""
    needs, effects = step.params.needs(), step.params.effects()
    silent = needs == Needs(rounding=needs.rounding)
    return silent and effects.scheme is not None and not effects.rescales


def _tied(
    recipe: Recipe, layout: ModelLayout, passes: Sequence[PassPlan]
) -> Iterator[CompressError]:
    if layout.tied is None or recipe.untie:
        return
    heads = {linear.name for linear in layout.linears if linear.role == "lm_head"}
    for plan in passes:
        if plan.names & heads:
            yield InputError(
                f"{plan.step.name} targets lm_head, which shares its weight with {layout.tied}",
                hint="leave it alone with ignore: [lm_head], or write it separately with "
                "untie: true at the top of the recipe",
            )


def _unlike(layout: ModelLayout, schemes: Mapping[str, Scheme]) -> Iterator[CompressError]:
    """Runtimes fuse q/k/v and gate/up into one matrix: they need one scheme."""
    groups: dict[str, list[Linear]] = {}
    for linear in layout.linears:
        if linear.fused:
            groups.setdefault(linear.fused, []).append(linear)
    for linears in groups.values():
        if len({schemes[linear.name] for linear in linears}) > 1:
            yield InputError(
                f"{', '.join(linear.name for linear in linears)} would get different schemes, "
                "but runtimes fuse them into one matrix",
                hint="target or ignore them together",
            )


def _kv(passes: Sequence[PassPlan], problems: list[CompressError]) -> KVSpec | None:
    found = [(p.step.name, kv) for p in passes if (kv := p.effects.kv) is not None]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        problems.append(InputError(f"{names} both quantize the KV cache", hint="keep one"))
    return found[0][1] if found else None


def _least_bytes(source: Source, schemes: Mapping[str, Scheme]) -> int:
    """Bytes of codes and of all that stays as it is, without scales: at least what is written."""
    total = 0
    weights = {weight_name(path): scheme for path, scheme in schemes.items()}
    for name, entry in source.checkpoint.entries.items():
        scheme = weights.get(name, Scheme())
        count = torch.Size(entry.spec.shape).numel()
        total += entry.spec.nbytes if scheme.weight is None else count * scheme.weight.bits // 8
    return total

"""Which passes make sense together: what the plan refuses beyond a second quantizer of a target."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compressor.errors import CompressError, InputError
from compressor.ir.layout import ModelLayout
from compressor.ir.scheme import Scheme
from compressor.methods.base import ModelPass
from compressor.methods.common.rounding import fused_with
from compressor.methods.common.shapes import some
from compressor.plan.recipe import Recipe
from compressor.plan.unit_plan import PassPlan


def composition_problems(
    passes: Sequence[PassPlan], layout: ModelLayout, schemes: Mapping[str, Scheme]
) -> Iterator[CompressError]:
    """Everything about the order and targets of passes that cannot give what was meant."""
    owners = {
        name: number
        for number, plan in enumerate(passes)
        if plan.effects.scheme is not None
        for name in plan.names
    }
    for number, plan in enumerate(passes):
        yield from _searches(plan, schemes)
        if plan.needs.cache and not any(p.effects.kv for p in passes):
            yield InputError(
                f"{plan.step.name} searches by what rounding keys does to attention, but "
                "nothing rounds them",
                hint="add kv_cache after it, or give alpha a number",
            )
        yield from _stale_cache(number, passes)
        if plan.effects.transforms:
            yield from _shared_inputs(number, passes, layout, owners)
    yield from _shared_scales(passes, layout, schemes, owners)


def order_problems(recipe: Recipe, passes: Sequence[PassPlan]) -> Iterator[CompressError]:
    """Model passes see the source's weights; a rotated block wants rotated inputs."""
    block: str | None = None
    for plan in passes:
        effects, needs = plan.effects, plan.needs
        learns = isinstance(plan.step.params, ModelPass)
        if learns and block is not None:
            yield InputError(
                f"{plan.step.name} learns from the whole source model, but comes after {block}",
                hint=f"put {plan.step.name} before it",
            )
        if effects.rotates_residual and block is not None:
            yield InputError(
                f"{plan.step.name} rotates what enters a block, which {block} sees before the "
                "block itself is rotated",
                hint=f"put {plan.step.name} first",
            )
        if effects.rotates_residual and recipe.propagate == "original":
            yield InputError(
                f"{plan.step.name} changes the basis of the hidden states, so blocks cannot be "
                "calibrated on the original ones",
                hint="propagate: quantized",
            )
        if effects.retrains_blocks and recipe.propagate == "original":
            yield InputError(
                f"{plan.step.name} trains blocks anew, so those after them are not calibrated on "
                "what the source's make",
                hint="propagate: quantized",
            )
        asked = needs.stats.cross and plan.step.params.altered("correction")
        if asked and recipe.propagate == "original":
            yield InputError(
                f"{plan.step.name} corrects what rounding did to a block's inputs, which are "
                "the original's here",
                hint="propagate: quantized, or correction: 0",
            )
        if not learns:
            block = block or plan.step.name


def rounding_of(passes: Sequence[PassPlan], names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Module path → options that its quantizer rounds with, for those of `names` that have one."""
    found: dict[str, Mapping[str, Any]] = {}
    for plan in passes:
        if plan.effects.scheme is not None:
            found |= dict.fromkeys(plan.names.intersection(names), plan.effects.rounding)
    return found


def fitted_of(passes: Sequence[PassPlan]) -> frozenset[str]:
    """Module paths whose quantizer chooses by itself how far ranges are clipped."""
    return frozenset(n for plan in passes if plan.effects.fits_ranges for n in plan.names)


def _searches(plan: PassPlan, schemes: Mapping[str, Scheme]) -> Iterator[CompressError]:
    """A search by rounding error needs to know the rounding."""
    if not plan.needs.rounding:
        return
    floats = sorted(name for name in plan.names if schemes[name].weight is None)
    if floats:
        yield InputError(
            f"{plan.step.name} searches with the quantizer that follows it, but none quantizes "
            f"{some(floats)}",
            hint="add one after it, such as rtn or gptq, or narrow its targets",
        )


def _stale_cache(number: int, passes: Sequence[PassPlan]) -> Iterator[CompressError]:
    """Static scales of the cache are measured where kv_cache stands."""
    plan = passes[number]
    if plan.effects.kv is None or plan.needs.kv is None:
        return
    later = [p.step.name for p in passes[number + 1 :] if p.effects.changes_kv]
    if later:
        yield InputError(
            f"{plan.step.name} measures keys and values, which {later[0]} changes after it",
            hint=f"put {plan.step.name} after {later[-1]}",
        )


def _shared_inputs(
    number: int, passes: Sequence[PassPlan], layout: ModelLayout, owners: Mapping[str, int]
) -> Iterator[CompressError]:
    """A transform changes what is read by all that shares an input with its targets."""
    plan = passes[number]
    for unit in layout.units:
        sites = {linear.site for linear in unit.linears if linear.name in plan.names}
        for linear in unit.linears:
            owner = owners.get(linear.name, number)
            if linear.site in sites and linear.name not in plan.names and owner < number:
                yield InputError(
                    f"{plan.step.name} changes the input of {linear.name}, which "
                    f"{passes[owner].step.name} has quantized by then",
                    hint=f"put {plan.step.name} first",
                )
                return


def _shared_scales(
    passes: Sequence[PassPlan],
    layout: ModelLayout,
    schemes: Mapping[str, Scheme],
    owners: Mapping[str, int],
) -> Iterator[CompressError]:
    """Linears that runtimes fuse have one global scale, which one pass has to choose."""
    makers: dict[Any, set[int]] = {}
    for linear in layout.linears:
        spec = schemes[linear.name].weight
        whole = spec is not None and (spec.second == "tensor" or spec.strategy == "tensor")
        if whole and linear.fused:
            makers.setdefault(fused_with(linear), set()).add(owners[linear.name])
    for key, numbers in makers.items():
        if len(numbers) > 1:
            names = " and ".join(f"{passes[n].step.name} (pass {n + 1})" for n in sorted(numbers))
            yield InputError(
                f"{names} share {key[0]}, whose parts have one scale in runtimes",
                hint="give them to one pass",
            )
            return

"""Mixed precision from measured sensitivities: in which form each group of linears is stored, and
the recipe that says so. Pure: it reads no model."""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field, ValidationError

from compressor.errors import InputError
from compressor.ir.frozen import Strict, messages
from compressor.methods.base import get_pass

FORMS: dict[str, dict[str, Any]] = {
    "fp8": {"fp8": {"scales": "weights"}},
    "nvfp4": {"nvfp4": {}},
    "mxfp4": {"mxfp4": {}},
    "mxfp8": {"mxfp8": {}},
}
"""Forms beside integers, as passes that round to nearest; inputs stay in float."""
POINTS = 24
"""Budgets along a frontier."""


class Way(NamedTuple):
    """How linears are stored: as integers, in another form of `FORMS`, or, with neither, as they
    are. `group_size` is null where it is the recipe's."""

    bits: int | None = None
    group_size: int | None = None
    form: str | None = None

    @property
    def label(self) -> str:
        """What people call it."""
        size = "" if self.group_size is None else f" in groups of {self.group_size}"
        return self.form or ("in float" if self.bits is None else f"{self.bits} bits{size}")

    def entry(self, quantizer: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's quantizer at this number of bits, or what rounds to the form in its place."""
        if self.form is not None:
            return form_entry(self.form, quantizer)
        ((name, params),) = quantizer.items()
        grid = {"bits": self.bits, "group_size": self.group_size}
        return {name: {**params, **{k: v for k, v in grid.items() if v is not None}}}


class Option(Strict):
    """One way to store a group of linears.

    bits, group_size, form  as of a `Way`
    bits_per_weight         with scales and zero points
    error                   what it costs, on one scale for all groups of the file
    """

    bits: int | None
    group_size: int | None = None
    form: str | None = None
    bits_per_weight: float = Field(gt=0)
    error: float = Field(ge=0)

    @property
    def way(self) -> Way:
        """Without what it costs."""
        return Way(self.bits, self.group_size, self.form)


class Group(Strict):
    """Linears that must have one scheme, with what each way of storing them costs."""

    linears: tuple[str, ...] = Field(min_length=1)
    weights: int = Field(gt=0)
    options: tuple[Option, ...] = Field(min_length=1)


class Sensitivity(Strict):
    """What `compress measure` writes.

    recipe  the measured recipe: model, calibration, format and passes, of which the quantizer's
            `bits` is what the options differ in
    measure what `error` means
    """

    schema_version: Literal[1] = 1
    recipe: dict[str, Any]
    measure: str
    tokens: int
    groups: tuple[Group, ...] = Field(min_length=1)

    def bits_per_weight(self, choice: Sequence[int]) -> float:
        """Mean over all measured weights, where `choice` holds each group's option."""
        sizes = [group.weights for group in self.groups]
        bits = [g.options[i].bits_per_weight for g, i in zip(self.groups, choice, strict=True)]
        return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)


def parse_sensitivity(text: str | bytes, *, where: str) -> Sensitivity:
    """Read the file. Raises InputError for one that is none."""
    try:
        return Sensitivity.model_validate_json(text)
    except ValidationError as error:
        raise InputError(
            f"{where} holds no measured sensitivities: {messages(error)[0]}",
            hint="compress measure writes such a file",
        ) from error


def error_of(sensitivity: Sensitivity, choice: Sequence[int]) -> float:
    """The sum of all groups' errors."""
    return sum(g.options[i].error for g, i in zip(sensitivity.groups, choice, strict=True))


def frontier(sensitivity: Sensitivity) -> list[tuple[float, float]]:
    """(bits for each weight, sum of errors) of the best choices, from the smallest to the largest:
    all of them from one measuring."""
    groups = sensitivity.groups
    low, high = (
        sum(f(o.bits_per_weight for o in g.options) * g.weights for g in groups)
        / sum(g.weights for g in groups)
        for f in (min, max)
    )
    found = []
    for i in range(POINTS):
        budget = low * (high / low) ** (i / (POINTS - 1))
        choice = allocate(sensitivity, max(budget, low))
        found.append((sensitivity.bits_per_weight(choice), error_of(sensitivity, choice)))
    return sorted(set(found))


def uniform(sensitivity: Sensitivity) -> dict[str, tuple[float, float]]:
    """What (bits for each weight, sum of errors) is where all groups have the same form."""
    places = [[o.way.label for o in g.options] for g in sensitivity.groups]
    labels = dict.fromkeys(label for names in places for label in names)
    found = {}
    for label in labels:
        if all(label in names for names in places):
            choice = [names.index(label) for names in places]
            found[label] = (sensitivity.bits_per_weight(choice), error_of(sensitivity, choice))
    return found


def allocate(
    sensitivity: Sensitivity,
    bits_per_weight: float,
    *,
    unit: str = "bits per weight",
    each: float = 1.0,
) -> list[int]:
    """The option of each group with a small sum of errors, at most `bits_per_weight` on average.

    Bits go where each buys most: along the lower convex hull of every group's options, best rate
    first, and what is left over to any single improvement that still fits. No choice can be better
    by more than the last hull step that did not fit. Raises InputError where even the smallest
    options are too large, in a `unit` of which there are so many for `each` bit per weight.
    """
    groups = sensitivity.groups
    total = sum(group.weights for group in groups)
    hulls = [_hull(group.options) for group in groups]
    choice = [hull[0] for hull in hulls]
    room = bits_per_weight * total - sum(
        group.options[i].bits_per_weight * group.weights
        for group, i in zip(groups, choice, strict=True)
    )
    slack = 1e-9 * total
    if room < -slack:
        least = each * sensitivity.bits_per_weight(choice)
        scale = 10.0 ** (3 - math.floor(math.log10(least)))
        raise InputError(
            f"{each * bits_per_weight:.4g} {unit} are fewer than the smallest options take",
            hint=f"at least {math.ceil(least * scale) / scale:g}; compress measure takes smaller "
            "--bits and larger --group-size, to go below",
        )
    steps = []
    for number, (group, hull) in enumerate(zip(groups, hulls, strict=True)):
        for old, new in itertools.pairwise(hull):
            a, b = group.options[old], group.options[new]
            bits = (b.bits_per_weight - a.bits_per_weight) * group.weights
            steps.append(((a.error - b.error) / bits, number, old, new, bits))
    steps.sort(key=lambda step: (-step[0], step[1]))
    for _, number, old, new, bits in steps:
        if choice[number] == old and bits <= room + slack:
            choice[number] = new
            room -= bits
    while True:
        found = _improvement(groups, choice, room + slack)
        if found is None:
            return choice
        number, new, bits = found
        choice[number] = new
        room -= bits


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull of error over size, from the smallest option on."""
    at = [(option.bits_per_weight, option.error) for option in options]
    order = sorted(range(len(options)), key=at.__getitem__)
    hull: list[int] = []
    for i in order:
        b = options[i]
        if hull and b.error >= options[hull[-1]].error:
            continue
        while len(hull) > 1:
            x, y = options[hull[-2]], options[hull[-1]]
            rise = (y.error - x.error) * (b.bits_per_weight - x.bits_per_weight)
            if rise < (b.error - x.error) * (y.bits_per_weight - x.bits_per_weight):
                break
            hull.pop()
        hull.append(i)
    return hull


def _improvement(
    groups: Sequence[Group], choice: Sequence[int], room: float
) -> tuple[int, int, float] | None:
    """The single change that fits and lowers the error most: group, option, bits it takes."""
    best: tuple[float, int, int, float] | None = None
    for number, (group, now) in enumerate(zip(groups, choice, strict=True)):
        for new, option in enumerate(group.options):
            gain = group.options[now].error - option.error
            bits = (option.bits_per_weight - group.options[now].bits_per_weight) * group.weights
            if gain > 0 and bits <= room and (best is None or gain > best[0]):
                best = (gain, number, new, bits)
    return None if best is None else best[1:]


def split_bits(passes: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A recipe's passes as its transforms and the one quantizer whose `bits` can differ.

    A pass that is a transform and rounds too (awq with bits) becomes the transform and `rtn`, which
    is the same thing. Raises InputError where there is no such quantizer, or more than one.
    """
    before: list[dict[str, Any]] = []
    quantizers: list[dict[str, Any]] = []
    for entry in passes:
        ((name, params),) = ({entry: {}} if isinstance(entry, str) else entry).items()
        given = dict(params or {})
        step = get_pass(name).model_validate(given)
        quantizes = step.effects().scheme is not None
        if not quantizes or quantizers:
            (quantizers if quantizes else before).append({name: given})
        elif "bits" not in type(step).model_fields:
            raise InputError(
                f"{name} has no `bits` to choose", hint="measure a recipe with rtn, awq or gptq"
            )
        elif type(step).model_fields["bits"].default is None:
            grid = ("bits", "group_size", "symmetric")
            before.append({name: {k: v for k, v in given.items() if k not in grid}})
            shared = (*grid, "targets", "ignore")
            quantizers.append(
                {"rtn": {k: getattr(step, k) for k in shared if k in type(step).model_fields}}
            )
        else:
            quantizers.append({name: given})
    if len(quantizers) != 1:
        raise InputError(
            f"the recipe has {len(quantizers)} quantizers; bits are chosen for exactly one",
            hint="leave one quantizer, with all its targets",
        )
    return before, quantizers[0]


def form_entry(form: str, quantizer: Mapping[str, Any]) -> dict[str, Any]:
    """The pass that rounds to a form in place of a recipe's quantizer, on the same targets: the
    quantizer itself, where that knows the form as a grid."""
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}", hint=f"one of: {', '.join(FORMS)}")
    ((name, params),) = quantizer.items()
    fields = get_pass(name).model_fields
    targets = {key: params[key] for key in ("targets", "ignore") if key in params}
    if "grid" in fields and form in get_args(fields["grid"].annotation):
        integers = ("bits", "group_size", "symmetric", "refits", "activations")
        kept = {key: value for key, value in params.items() if key not in integers}
        return {name: {**kept, "grid": form}}
    ((own, given),) = FORMS[form].items()
    return {own: {**given, **targets}}


def with_quantizer(sensitivity: Sensitivity, name: str) -> Sensitivity:
    """The same measured recipe with another method for its quantizer, on the same grids: one that
    takes longer than to measure with it would be worth."""
    before, quantizer = split_bits(sensitivity.recipe["passes"])
    ((old, params),) = quantizer.items()
    fields = get_pass(name).model_fields
    shared = ("bits", "group_size", "symmetric", "activations", "targets", "ignore")
    defaults = get_pass(old).model_validate(params)
    if "bits" not in fields:
        raise InputError(f"{name} has no `bits`", hint="rtn, gptq, reconstruct or signround")
    kept = {k: getattr(defaults, k) for k in shared if k in fields and hasattr(defaults, k)}
    recipe = {**sensitivity.recipe, "passes": [*before, {name: kept}]}
    return sensitivity.model_copy(update={"recipe": recipe})


def mixed_recipe(sensitivity: Sensitivity, choice: Sequence[int]) -> dict[str, Any]:
    """The measured recipe with the chosen bits: its transforms, then its quantizer once for each
    number of bits. The most usual one keeps the recipe's targets and ignores the other linears,
    which the others have by exact names."""
    recipe = copy.deepcopy(sensitivity.recipe)
    before, quantizer = split_bits(recipe["passes"])
    ((name, params),) = quantizer.items()
    chosen: dict[Way, list[str]] = {}
    for group, option in zip(sensitivity.groups, choice, strict=True):
        chosen.setdefault(group.options[option].way, []).extend(group.linears)
    alone = chosen.pop(Way(), [])
    if not chosen:
        raise InputError(
            "nothing would be quantized: the budget holds all linears in float",
            hint="a smaller one leaves some of them less",
        )
    usual = max(chosen, key=lambda way: len(chosen[way]))
    others = {way: names for way, names in chosen.items() if way != usual}
    for entry in before:
        ((_, given),) = entry.items()
        if alone:
            given["ignore"] = [*given.get("ignore", ["lm_head"]), *alone]
    apart = [*alone, *(linear for names in others.values() for linear in names)]
    ignore = [*params.get("ignore", ["lm_head"]), *apart]
    recipe["passes"] = [
        *before,
        usual.entry({name: {**params, "ignore": ignore}}),
        *(way.entry(_only(quantizer, names)) for way, names in others.items()),
    ]
    return recipe


def _only(quantizer: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The quantizer on linears of these exact names."""
    ((name, params),) = quantizer.items()
    kept = {key: value for key, value in params.items() if key not in ("targets", "ignore")}
    return {name: {**kept, "targets": list(names)}}

"""A recipe for a scheme: chosen by the model's headers, the GPU and the runtime's contract."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from compressor.arch.select import Selection
from compressor.checkpoint.source import Source
from compressor.errors import CompressError, InputError, Problems
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.plan.recipe_file import apply_override
from compressor.runtimes.contract import parse_runtime

Quality = Literal["fast", "good", "best"]
QUALITIES: tuple[Quality, ...] = ("best", "good", "fast")
Passes = Sequence[Mapping[str, Mapping[str, Any]]]

BLACKWELL = 100
"""The compute capability, times ten, from which kernels take inputs of FP4 and MXFP8."""
GROUPS = (128, 64, 32)
LENGTH, WINDOWS = 512, 16
ROWS, ROWS_ON_CPU = 128, 32


@dataclass(frozen=True, slots=True)
class Way:
    """How a scheme is made: passes by quality, which may be the same.

    says     in words
    grouped  integers in groups, of a size that is chosen
    inputs   parameters of passes that quantize inputs too, where the GPU has kernels for that
    """

    says: str
    fast: Passes
    good: Passes
    best: Passes
    grouped: bool = False
    inputs: Mapping[str, Mapping[str, Any]] | None = None


_SEARCHED = {"scales": "search", "damping": 0.1}
_SMOOTH = {"smoothquant": {"alpha": "search", "fold_up": True}}
_W8A8: Passes = [_SMOOTH, {"gptq": {"bits": 8, "group_size": None, "activations": "token"}}]
_W4A8: Passes = [_SMOOTH, {"gptq": {"bits": 4, "activations": "token", **_SEARCHED}}]
_W4AFP8: Passes = [{"gptq": {"bits": 4, "activations": "fp8", "group_size": 128, **_SEARCHED}}]
_NVFP4_FP8: Passes = [
    {"fp8": {"targets": ["attn.*"]}},
    {"nvfp4": {"rule": "mse", "ignore": ["lm_head", "attn.*"]}},
]
_MXFP4: Passes = [{"awq": {}}, {"mxfp4": {"rule": "mse"}}]


def _rounded(name: str, **parameters: Any) -> Passes:
    return [{name: parameters}]


def _weights(bits: int, says: str) -> Way:
    return Way(
        says,
        fast=_rounded("rtn", bits=bits),
        good=_rounded("gptq", bits=bits, **_SEARCHED, correction=0.5),
        best=_rounded("reconstruct", bits=bits, preset="best"),
        grouped=True,
    )


def _only(says: str, passes: Passes, inputs: Mapping[str, Mapping[str, Any]] | None = None) -> Way:
    return Way(says, passes, passes, passes, inputs=inputs)


WAYS: dict[str, Way] = {
    "w4a16": _weights(4, "4-bit integers in groups, inputs in float"),
    "w8a16": _weights(8, "8-bit integers in groups, inputs in float"),
    "w8a8": Way(
        "8-bit integers by channel, int8 inputs by token",
        fast=_rounded("rtn", bits=8, group_size=None, activations="token"),
        good=_W8A8,
        best=_W8A8,
    ),
    "w4a8": Way(
        "4-bit integers in groups, int8 inputs by token",
        fast=_rounded("rtn", bits=4, activations="token"),
        good=_W4A8,
        best=_W4A8,
        grouped=True,
    ),
    "w4afp8": Way(
        "4-bit integers in groups of 128, FP8 inputs by token",
        fast=_rounded("rtn", bits=4, activations="fp8", group_size=128),
        good=_W4AFP8,
        best=_W4AFP8,
    ),
    "nvfp4-fp8": _only("4-bit floats in MLPs and experts, FP8 in attention", _NVFP4_FP8),
    "fp8": _only("FP8 by channel, FP8 inputs by token", _rounded("fp8", scales="dynamic")),
    "fp8-block": _only(
        "FP8 in blocks of 128 x 128, FP8 inputs in groups", _rounded("fp8", scales="block")
    ),
    "nvfp4": Way(
        "4-bit floats in blocks of 16",
        fast=_rounded("nvfp4", rule="mse"),
        good=[{"awq": {}}, {"nvfp4": {"rule": "mse"}}],
        best=[{"awq": {}}, {"gptq": {"grid": "nvfp4", "rule": "mse", "damping": 0.1}}],
        inputs={
            "awq": {"search": "inputs"},
            "nvfp4": {"activations": "calibrated"},
            "gptq": {"activations": "calibrated"},
        },
    ),
    "mxfp4": Way(
        "4-bit floats with a power of two per 32 inputs",
        fast=_MXFP4[1:],
        good=_MXFP4,
        best=_MXFP4,
        inputs={"awq": {"search": "inputs"}, "mxfp4": {"activations": "dynamic"}},
    ),
    "mxfp8": _only(
        "8-bit floats with a power of two per 32 inputs",
        _rounded("mxfp8", rule="mse"),
        {"mxfp8": {"activations": "dynamic"}},
    ),
}


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asked for.

    runtime     as in a recipe, or None;  overrides  key.path=value, as --set has them
    gpu         whether the run is on a GPU;  capability  of that GPU, times ten, or None
    """

    model: str
    output: str
    scheme: str
    quality: Quality
    runtime: str | None = None
    overrides: tuple[str, ...] = ()
    gpu: bool = False
    capability: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A recipe as plain data that can be planned, and why it is as it is."""

    data: dict[str, Any]
    reasons: tuple[str, ...]

    def text(self) -> str:
        """The recipe's YAML, its reasons as comments."""
        lines = [f"# {reason}" for reason in self.reasons]
        body = yaml.safe_dump(
            self.data, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
        )
        return "\n".join([*lines, body])


def choose(wish: Wish, source: Source) -> Choice:
    """The first recipe that can be planned: of the quality that was asked for in groups as large
    as they may be, and where reconstruction does not apply of the next lower one.

    Raises Problems: what is wrong with the first one, and which schemes would do.
    """
    first: Problems | None = None
    for quality in _qualities(wish):
        for group in _groups(wish.scheme, source):
            try:
                data, reasons = _recipe(wish, source, quality, group)
                plan = make_plan(make_recipe(data), source)
            except InputError as error:
                first = first or (error if isinstance(error, Problems) else Problems([error]))
                continue
            if first is not None:
                reasons.append(f"a first choice was refused: {first.problems[0].message}")
            if plan.recipe.format != "compressed-tensors":
                data["format"] = plan.recipe.format
            reasons += plan.notes
            return Choice(data, tuple(" ".join(reason.split()) for reason in reasons))
    assert first is not None
    more: list[CompressError] = []
    if not wish.overrides and (others := list(_others(wish, source))):
        where = f" for {wish.runtime}" if wish.runtime is not None else ""
        hint = f"--scheme {' or '.join(others)} would do"
        more = [InputError(f"{wish.scheme} cannot be made of this model{where}", hint=hint)]
    raise Problems([*first.problems, *more])


def _qualities(wish: Wish) -> list[Quality]:
    way = WAYS[wish.scheme]
    lower = wish.quality == "best" and way.best != way.good
    return ["best", "good"] if lower else [wish.quality]


def _groups(scheme: str, source: Source) -> list[int | None]:
    """Sizes that divide every width, and last a whole row."""
    if not WAYS[scheme].grouped:
        return [None]
    widths = _widths(source)
    return [*(size for size in GROUPS if all(width % size == 0 for width in widths)), None]


def _widths(source: Source) -> list[int]:
    """Inputs of the linears that are quantized unless a recipe says otherwise."""
    linears = Selection(("linear",), ("lm_head",)).pick(source.layout.linears)
    return sorted({linear.in_features for linear in linears})


def _others(wish: Wish, source: Source) -> Iterator[str]:
    """Schemes for which any group can be planned; headers are read, nothing else."""
    for scheme in WAYS:
        other = Wish(wish.model, wish.output, scheme, "fast", wish.runtime)
        for group in _groups(scheme, source) if scheme != wish.scheme else ():
            try:
                make_plan(make_recipe(_recipe(other, source, "fast", group)[0]), source)
            except InputError:
                continue
            yield scheme
            break


def _recipe(
    wish: Wish, source: Source, quality: Quality, group: int | None
) -> tuple[dict[str, Any], list[str]]:
    """A recipe that may not be plannable, and the reasons for it."""
    way = WAYS[wish.scheme]
    reasons = [f"{wish.scheme}, quality {quality}: {way.says}"]
    chosen: Passes = getattr(way, quality)
    passes = [{name: dict(params) for name, params in step.items()} for step in chosen]
    if way.fast == way.best:
        reasons.append("rounding is all that this scheme takes: every quality is the same")
    elif quality == "best" and way.best == way.good:
        reasons.append("reconstruction is not for this scheme: best is the same as good")
    if way.grouped:
        (last,) = passes[-1].values()
        last["group_size"] = group
        widths = ", ".join(map(str, _widths(source)))
        what = f"groups of {group}" if group else "one scale for each output"
        reasons.append(f"{what}: the widths of this model are {widths}")
    if way.inputs is not None:
        reasons.append(_add_inputs(wish, way.inputs, passes))
    data: dict[str, Any] = {"model": wish.model, "output": wish.output}
    if wish.runtime is not None:
        data["runtime"] = wish.runtime
    positions = source.layout.sizes.positions
    length = min(LENGTH, positions or LENGTH)
    if chosen != way.fast:
        rows = ROWS if wish.gpu or quality == "best" else ROWS_ON_CPU
        data["calibration"] = {"data": "bundled", "samples": rows, "length": length}
    data["passes"] = passes
    data["verify"] = True
    if quality != "fast":
        data["evaluate"] = {"data": "bundled/fiction", "windows": WINDOWS, "length": length}
    for override in wish.overrides:
        apply_override(data, override)
    return data, reasons


def _add_inputs(
    wish: Wish, inputs: Mapping[str, Mapping[str, Any]], passes: list[dict[str, dict[str, Any]]]
) -> str:
    """Quantize inputs too, where that has kernels and can be done; why or why not."""
    named = None if wish.runtime is None else parse_runtime(wish.runtime).capability
    capability = named or wish.capability
    if capability is None:
        return "weights alone: no GPU is named (--for 'vllm, gpu: b200') whose kernels take inputs"
    if capability < BLACKWELL:
        return f"weights alone: compute capability {capability / 10} has no kernels for such inputs"
    added = {name: inputs[name] for step in passes for name in step if name in inputs}
    if len(passes) == 1 and {"activations": "calibrated"} in added.values():
        return "weights alone: inputs would need calibration, which fast has none of"
    for step in passes:
        for name, params in step.items():
            params.update(added.get(name, {}))
    return f"inputs too: compute capability {capability / 10} has kernels for them"

"""Whether a runtime loads a written form, and if not, why and what it would load."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.errors import InputError, several
from compressor.formats.base import Format, ModelSchemes
from compressor.ir.layout import AttentionShape, Linear, ModelLayout
from compressor.ir.scheme import KVSpec, Scheme
from compressor.ir.tensor import TensorShape
from compressor.runtimes.contract import (
    Hole,
    Loads,
    Runtime,
    Scope,
    gpus,
    inputs_of,
    kind_of,
    or_,
    words_of,
)
from compressor.runtimes.sizes import right_sizes, wrong_heads, wrong_size

APPLY = {"bitdelta": "compress delta apply BASE DELTA OUT makes a checkpoint that everything loads"}
HOW = {"run": "run", "read": "read in its source, not run", "reported": "as reported, not tried"}
GPUS = 4
"""GPUs that a hint names."""
OFFERS = 3
"""Forms that would load which a hint names."""


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint as it is or will be written, as far as contracts speak of it.

    model_type  whose map names the linears
    linears     with scheme and sub-format ("" where a format has one)
    attention   heads of each block;  tied  the head shares the embedding's weight
    groups      config groups of linears;  classes  targets of theirs that name no linear
    """

    format: str
    model_type: str
    linears: tuple[tuple[Linear, Scheme, str], ...]
    kv: KVSpec | None
    attention: tuple[AttentionShape, ...]
    tied: bool
    groups: int = 0
    classes: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[tuple[Linear, Scheme, str], ...]:
        """The linears that are stored as codes."""
        return tuple(entry for entry in self.linears if entry[1].weight is not None)

    @property
    def plain_experts(self) -> bool:
        """Whether there are experts in float, each matrix a tensor of its own."""
        return any(x.tensor is None or x.tensor.index is None for x in self._float_experts)

    @property
    def plain_stacks(self) -> bool:
        """Whether there are experts in float, many matrices in one tensor."""
        return any(x.tensor and x.tensor.index is not None for x in self._float_experts)

    @property
    def _float_experts(self) -> list[Linear]:
        plain = (linear for linear, scheme, _ in self.linears if scheme.weight is None)
        return [x for x in plain if x.expert is not None]

    @property
    def experts(self) -> bool:
        """Whether it is a mixture of experts whose experts are quantized."""
        return any(linear.expert is not None for linear, _, _ in self.quantized)


def written_form(
    fmt: Format,
    layout: ModelLayout,
    schemes: ModelSchemes,
    tensors: Mapping[str, Mapping[str, TensorShape]],
    *,
    config: Mapping[str, Any],
    tied: bool,
) -> Written:
    """What contracts are held against.

    tensors  quantized linear → its tensors by local name
    config   the `quantization_config` entry
    """
    groups = config.get("config_groups") or {}
    targets = [target for group in groups.values() for target in group.get("targets", ())]
    names = {x.name for x in layout.linears}
    return Written(
        format=fmt.name,
        model_type=layout.model_type,
        linears=tuple(
            (x, schemes.linears[x.name], fmt.form(tensors[x.name]) if x.name in tensors else "")
            for x in layout.linears
            if not (tied and x.role == "lm_head")
        ),
        kv=schemes.kv,
        attention=tuple(u.attention for u in layout.units if u.attention is not None),
        tied=tied,
        groups=len(groups),
        classes=tuple(t for t in targets if not t.startswith("re:") and t not in names),
    )


def loads(runtime: Runtime, written: Written) -> list[InputError]:
    """Why a runtime would not load a checkpoint, or compute wrongly, with what it would load;
    empty where nothing known speaks against it."""
    contract, title = runtime.contract, runtime.title
    lines = [line for line in contract.loads if line.holds_in(runtime.version)]
    if not any(written.format in line.formats for line in lines):
        return [
            InputError(
                f"{title} does not read the format {written.format}",
                hint=APPLY.get(
                    written.format, _offer(lines, [scheme for _, scheme, _ in written.quantized])
                ),
            )
        ]
    found: dict[tuple[str, str], list[str]] = {}
    holes = _holes(runtime, written)
    known: dict[Hashable, list[tuple[str, str]]] = {}  # experts are many, and all alike
    for linear, scheme, form in written.quantized:
        alike = (linear.role, linear.shape, linear.expert is None, linear.fused, linear.transposed)
        kind = (scheme, form, alike)
        if kind not in known:
            known[kind] = _linear(runtime, written, linear, scheme, form, holes=holes)
        for reason in known[kind]:
            found.setdefault(reason, []).append(linear.name)
    errors = [
        InputError(f"{title} {why} ({several(names)})", hint=hint or None)
        for (why, hint), names in found.items()
    ]
    errors += [*_cache(runtime, written), *_targets(runtime, written), *_fused(runtime, written)]
    if contract.tensor_parallel is not None and contract.tensor_parallel.heads:
        errors += wrong_heads(runtime, written.attention)
    return errors


def _holes(runtime: Runtime, written: Written) -> list[Hole]:
    """What should load and does not, as far as the checkpoint as a whole goes."""
    plain, stacks = written.plain_experts, written.plain_stacks
    return [
        hole
        for hole in runtime.contract.holes
        if hole.holds_in(runtime.version)
        and written.format in hole.formats
        and (not hole.models or written.model_type in hole.models)
        and (written.tied or not hole.tied)
        and (plain or not hole.plain_experts)
        and (stacks or not hole.plain_stacks)
        and (written.groups > 1 or not hole.mixed)
        and (written.kv is not None or not hole.cached)
    ]


def _linear(
    runtime: Runtime,
    written: Written,
    linear: Linear,
    scheme: Scheme,
    form: str,
    *,
    holes: Sequence[Hole],
) -> list[tuple[str, str]]:
    """What is wrong with one linear, and what would do; `holes` are about such a checkpoint."""
    assert scheme.weight is not None
    contract, inputs = runtime.contract, inputs_of(scheme.input)
    modules = {"experts" if linear.expert is not None else "linears"}
    modules |= {"towers"} if linear.beside else set()
    modules |= {"heads"} if linear.role == "lm_head" else set()

    def unlike(line: Scope) -> list[str]:
        """What a line wants that this linear does not have."""
        wrong = line.weights.unlike(scheme.weight) if line.weights is not None else []
        if line.inputs and inputs not in line.inputs:
            wrong.append(words_of(line.inputs))
        if line.form and form != line.form:
            wrong.append(f"the form {line.form}")
        if line.modules is not None and line.modules not in modules:
            wrong.append(f"{line.modules} only")
        return wrong

    reasons = []
    for hole in holes:
        uneven = hole.uneven == 1 or any(size % hole.uneven for size in linear.shape)
        if not unlike(hole) and uneven and (linear.transposed or not hole.transposed):
            issue = f" ({hole.issue})" if hole.issue else ""
            reasons.append((hole.says, f"{hole.instead}{issue}"))
    if reasons:
        return reasons
    lines = [line for line in contract.loads if line.holds_in(runtime.version)]
    ours = [line for line in lines if written.format in line.formats]
    near = min(ours, key=lambda line: len(unlike(line)))
    kinds = dict.fromkeys(kind for line in ours for kind in line.weights.kinds)
    wrong = unlike(near) if kind_of(scheme.weight) in kinds else [f"{or_(kinds)} weights"]
    if wrong:
        what = f"{scheme.weight.bits}-bit {kind_of(scheme.weight)}"
        what += f" weights with {words_of([inputs])}"
        return [(f"does not load {what}: it wants {' and '.join(wrong)}", _offer(lines, [scheme]))]
    fitting = [line for line in ours if not unlike(line)]
    running = [line for line in fitting if line.runs_on(runtime.capability)]
    if not running:
        wanted = "; or ".join(line.gpus for line in fitting)
        why = f"has no kernel for it on {runtime.gpu}: compute capability {wanted}"
        others = [x for x, c in gpus().items() if any(line.runs_on(c) for line in fitting)]
        there = [line for line in lines if line.runs_on(runtime.capability)]
        return [(why, f"gpu: {or_(others[:GPUS])}; on {runtime.gpu} {_offer(there, [scheme])}")]
    sizes = [wrong_size(runtime, line, linear, scheme) for line in running]
    return [] if "" in sizes else [(sizes[0], right_sizes(runtime, running, linear, scheme))]


def _cache(runtime: Runtime, written: Written) -> Iterator[InputError]:
    kv = written.kv
    lines = [line for line in runtime.contract.kv if line.holds_in(runtime.version)]
    if kv is None or any(
        written.format in line.formats and kv.element in line.elements and kv.per in line.per
        for line in lines
    ):
        return
    offers = [f"{' or '.join(x.elements)} per {' or '.join(x.per)}" for x in lines]
    yield InputError(
        f"{runtime.title} does not read a KV cache of {kv.element} per {kv.per} from the "
        f"format {written.format}",
        hint=f"it reads {'; '.join(dict.fromkeys(offers))}" if offers else "leave it in float",
    )


def _offer(lines: Iterable[Loads], schemes: Iterable[Scheme]) -> str:
    """What would load: the lines that are nearest to one of the schemes."""

    def distance(line: Loads) -> int:
        return min((_distance(line, scheme) for scheme in schemes), default=0)

    quantized = [line for line in lines if line.weights.kinds != ("float",)]
    near = sorted(quantized, key=distance)[:OFFERS]
    return "it loads " + "; ".join(line.describe() for line in near)


def _distance(line: Loads, scheme: Scheme) -> int:
    spec = scheme.weight
    if spec is None:
        return 0
    same = kind_of(spec) in line.weights.kinds
    bits = not line.weights.bits or spec.bits in line.weights.bits
    return 4 * (not same) + 2 * (not bits) + (inputs_of(scheme.input) not in line.inputs)


def wants_names(runtime: Runtime, *, groups: int, experts: bool) -> bool:
    """Whether config groups have to name their linears one by one."""
    targets = runtime.contract.targets
    if targets is None or groups == 0:
        return False
    wanted = [targets.form, targets.mixed if groups > 1 else "", targets.experts if experts else ""]
    return "names" in wanted


def remarks(runtime: Runtime, written: Written) -> list[str]:
    """How it is known that a runtime loads a checkpoint, and what it needs for that."""
    found = []
    for line in fitting_lines(runtime, written):
        how, more = HOW[line.known_in(runtime.version)], f"; {line.note}" if line.note else ""
        found.append(f"{runtime.title}: {how} ({line.source}){more}")
    return found


def fitting_lines(runtime: Runtime, written: Written) -> list[Loads]:
    """The lines of a contract by which a runtime loads a checkpoint."""
    found: dict[str, Loads] = {}
    for _, scheme, form in written.quantized or written.linears:
        for line in runtime.contract.loads:
            fits = line.holds_in(runtime.version) and written.format in line.formats
            fits = fits and not line.weights.unlike(scheme.weight)
            if fits and inputs_of(scheme.input) in line.inputs and line.form in ("", form):
                found[line.describe()] = line
                break
    return list(found.values())


def _fused(runtime: Runtime, written: Written) -> Iterator[InputError]:
    """Linears of which a runtime makes one, and which have different schemes."""
    fused = runtime.contract.fused
    fuses = {} if fused is None else fused.of(written.model_type, runtime.version)
    module = {part: name for name, parts in fuses.items() for part in parts}
    groups: dict[tuple[str, str], dict[str, Scheme]] = {}
    for linear, scheme, _ in written.linears:
        parent, _, leaf = linear.name.rpartition(".")
        if leaf in module and linear.expert is None:
            groups.setdefault((module[leaf], parent), {})[linear.name] = scheme
    wrong: dict[str, list[str]] = {}
    for (name, _), schemes in groups.items():
        if len(set(schemes.values())) > 1:
            wrong.setdefault(name, []).extend(schemes)
    for name, names in wrong.items():
        yield InputError(
            f"{runtime.title} makes one {name} of {', '.join(fuses[name])} and wants one scheme "
            f"for them ({several(names)})",
            hint="quantize them alike, or none of them",
        )


def _targets(runtime: Runtime, written: Written) -> Iterator[InputError]:
    if written.classes and wants_names(runtime, groups=written.groups, experts=written.experts):
        yield InputError(
            f"{runtime.title} wants config groups that name each linear, not "
            f"{', '.join(written.classes[:3])}",
            hint=f"runtime: {runtime.name} in the recipe writes names",
        )

"""A runtime's contract: which written forms it loads at which version, and how that is known.

One YAML file beside this module for each runtime. A line is known because we have run it (`run`),
read it in the source of the version named (`read`), or been told by documentation or an issue
(`reported`).
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, field_validator

from compressor.errors import InputError
from compressor.ir.frozen import Strict
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import ActivationSpec

FOLDER = Path(__file__).parent

Kind = Literal["float", "int", "fp8", "nvfp4", "mxfp4", "mxfp8", "progressive"]
By = Literal["tensor", "channel", "group", "block"]
Inputs = Literal[
    "none",
    "int8 token",
    "int8 tensor",
    "int8 static",
    "int8 group",
    "fp8 token",
    "fp8 tensor",
    "fp8 static",
    "fp8 group",
    "nvfp4",
    "mxfp4",
    "mxfp8",
]
Modules = Literal["linears", "experts", "towers", "heads"]


class Known(Strict):
    """Where a line is from.

    versions  of those that were looked at, the ones for which it holds; empty: all
    ran       with which of them it was run, where that is not all
    """

    versions: tuple[str, ...] = ()
    ran: tuple[str, ...] = ()
    known: Literal["run", "read", "reported"]
    source: str
    note: str = ""
    issue: str = ""

    def holds_in(self, version: str) -> bool:
        """Whether the line is about a version."""
        return not self.versions or version in self.versions

    def known_in(self, version: str) -> Literal["run", "read", "reported"]:
        """How it is known of a version: what was run with one has been read in the others."""
        return "read" if self.ran and version not in self.ran else self.known


class Weights(Strict):
    """Which weights a line is about; what is not given does not matter."""

    kinds: tuple[Kind, ...]
    bits: tuple[int, ...] = ()
    symmetric: bool | None = None
    by: tuple[By, ...] = ()
    groups: tuple[int, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()

    def unlike(self, spec: QuantSpec | None) -> list[str]:
        """What the line wants that a weight does not have, in words; empty where it fits."""
        if spec is None:
            return [] if "float" in self.kinds else ["quantized weights"]
        found = []
        if kind_of(spec) not in self.kinds:
            found.append(f"{' or '.join(self.kinds)} weights")
        if self.bits and spec.bits not in self.bits:
            found.append(f"{or_(self.bits)} bits")
        if self.symmetric is not None and spec.symmetric != self.symmetric:
            found.append("symmetric weights" if self.symmetric else "weights with zero points")
        if self.by and spec.strategy not in self.by:
            found.append(f"scales by {or_(self.by)}")
        elif spec.strategy == "group" and self.groups and spec.group_size not in self.groups:
            found.append(f"groups of {or_(self.groups)}")
        elif spec.strategy == "block" and self.blocks and spec.block not in self.blocks:
            found.append(f"blocks of {or_(f'{a} x {b}' for a, b in self.blocks)}")
        return found

    def describe(self) -> str:
        """The weights in words."""
        parts = [f"{or_(self.bits)}-bit {or_(self.kinds)}" if self.bits else or_(self.kinds)]
        parts[0] += " weights"
        if self.by:
            parts.append(f"by {or_(self.by)}")
        if self.groups:
            parts.append(f"groups of {or_(self.groups)}")
        if self.blocks:
            parts.append(f"blocks of {or_(f'{a} x {b}' for a, b in self.blocks)}")
        if self.symmetric is not None:
            parts.append("symmetric" if self.symmetric else "with zero points")
        return ", ".join(parts)


class Multiples(Strict):
    """Sizes of a weight, as each GPU holds it, are multiples of these."""

    out_features: int = Field(1, alias="out")
    in_features: int = Field(1, alias="in")


class Scope(Known):
    """Which linears a line is about: formats by name, a sub-format, inputs, experts or others."""

    formats: tuple[str, ...]
    form: str = ""
    modules: Modules | None = None
    weights: Weights | None = None
    inputs: tuple[Inputs, ...] = ()


class Loads(Scope):
    """A written form that a runtime loads.

    capability    least compute capability times ten, or with `exact` the only one
    below         newer GPUs, from this one on, do not run it
    multiples     of the sizes of a weight
    whole_blocks  blocks of scales may not straddle two GPUs, nor fused linears
    """

    weights: Weights
    inputs: tuple[Inputs, ...] = ("none",)
    capability: int = 0
    exact: bool = False
    below: int | None = None
    multiples: Multiples = Multiples()
    whole_blocks: bool = False

    def runs_on(self, capability: int | None) -> bool:
        """Whether a GPU of this compute capability has a kernel; None is any GPU."""
        if capability is None:
            return True
        if self.exact:
            return capability == self.capability
        return self.capability <= capability and (self.below is None or capability < self.below)

    @property
    def gpus(self) -> str:
        """The compute capabilities that have a kernel, in words; empty for all."""
        if not self.capability:
            return ""
        least = f"{self.capability / 10:.1f}"
        if self.exact:
            return f"{least} only"
        newest = f", before {self.below / 10:.1f}" if self.below is not None else ""
        return f"{least} or newer{newest}"

    def describe(self) -> str:
        """The line in words."""
        text = self.weights.describe()
        if self.inputs != ("none",):
            text += f", {words_of(self.inputs)}"
        if self.modules is not None:
            text += f", {self.modules} only"
        form = f" ({self.form})" if self.form else ""
        return f"{text}, as {or_(self.formats)}{form}"


class Kv(Known):
    """A quantized KV cache that a runtime reads the scales of."""

    formats: tuple[str, ...]
    elements: tuple[str, ...]
    per: tuple[str, ...]


class Hole(Scope):
    """Something that should load by the other lines, and does not; or that loads wrongly.

    models         only for these model types; empty: all
    transposed     only for linears that their module keeps [in, out]
    uneven         only for linears with a size that is no multiple of this
    tied           only where the head shares the embedding's weight
    plain_experts  only where there are experts in float, one by one
    plain_stacks   only where there are experts in float, in one tensor
    mixed          only where there is more than one config group
    cached         only where the KV cache is quantized
    """

    models: tuple[str, ...] = ()
    transposed: bool = False
    uneven: int = 1
    tied: bool = False
    plain_experts: bool = False
    plain_stacks: bool = False
    mixed: bool = False
    cached: bool = False
    says: str
    instead: str


class Targets(Known):
    """How config groups have to name their linears: a class of modules (`any`), or names; `mixed`
    where there is more than one group, `experts` in mixtures of experts."""

    form: Literal["any", "names"] = "any"
    mixed: Literal["any", "names"] = "any"
    experts: Literal["any", "names"] = "any"


class TensorParallel(Known):
    """Whether query heads have to divide between the GPUs, and KV heads too or be shared evenly."""

    heads: bool = True


class FusedModules(Strict):
    """What some model classes of a runtime make one linear of.

    fuses   the runtime's module → linears of a checkpoint, both by their last names
    models  class of the runtime → model types that it serves
    """

    versions: tuple[str, ...] = ()
    fuses: dict[str, tuple[str, ...]]
    models: dict[str, tuple[str, ...]]


class Fused(Known):
    """That a runtime makes one linear of several, which then need one scheme; and which, by model
    class, as far as that was looked up."""

    classes: tuple[FusedModules, ...] = ()

    def of(self, model_type: str, version: str) -> dict[str, tuple[str, ...]]:
        """Module → the linears that it is made of, for a model type; empty where not known."""
        for row in self.classes:
            served = any(model_type in types for types in row.models.values())
            if served and (not row.versions or version in row.versions):
                return row.fuses
        return {}


class Contract(Strict):
    """All that is known of one runtime; `serves` is false for a library that only computes."""

    title: str
    serves: bool = True
    versions: tuple[str, ...] = Field(min_length=1)
    tensor_parallel: TensorParallel | None = None
    targets: Targets | None = None
    fused: Fused | None = None
    loads: tuple[Loads, ...]
    kv: tuple[Kv, ...]
    holes: tuple[Hole, ...] = ()


class Runtime(Strict):
    """Where a checkpoint is to be loaded.

    name     of a contract's file;  version  one of those that are known
    tp       GPUs that share each weight;  gpu  its name, or empty
    """

    name: str = Field(description="vllm, sglang, tensorrt-llm, transformers, llama.cpp or mlx")
    version: str = Field("", description="one that is known; empty: the newest of those")
    tp: int = Field(1, ge=1, description="GPUs that share each weight (tensor parallelism)")
    gpu: str = Field("", description="such as h100: what has no kernel there is refused")

    @field_validator("version", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int | float) else value

    @property
    def contract(self) -> Contract:
        """What it loads. Raises InputError for a runtime that is not known."""
        return load_contract(self.name)

    @property
    def capability(self) -> int | None:
        """Compute capability of the GPU times ten, or None where none is named."""
        return gpus()[self.gpu] if self.gpu else None

    @property
    def title(self) -> str:
        """Its name and version for people."""
        return f"{self.contract.title} {self.version}"


def parse_runtime(value: object) -> Runtime:
    """From `vllm`, `vllm@0.24, tp: 2, gpu: h100` (or with =), or a mapping of the same keys.

    Raises InputError that names what is known.
    """
    if isinstance(value, str):
        name, *rest = (part.strip() for part in value.split(","))
        data: dict[str, object] = {"name": name}
        for part in rest:
            key, _, given = part.replace("=", ":", 1).partition(":")
            data[key.strip()] = int(given) if given.strip().isdigit() else given.strip()
    elif isinstance(value, dict):
        data = dict(value)
    else:
        raise InputError(f"runtime {value!r} is no runtime", hint="vllm, or vllm@0.24")
    unknown = sorted(set(data) - set(Runtime.model_fields))
    if unknown:
        known = ", ".join(Runtime.model_fields)
        raise InputError(f"runtime: unknown key {unknown[0]!r}", hint=f"keys: {known}")
    name, _, version = str(data.get("name", "")).partition("@")
    contract = load_contract(name)
    version = version or str(data.get("version") or contract.versions[-1])
    same = [known for known in contract.versions if f"{version}.".startswith(f"{known}.")]
    if not same:
        raise InputError(
            f"{contract.title} {version} is not known here",
            hint=f"versions that were looked at: {', '.join(contract.versions)}",
        )
    gpu = str(data.get("gpu") or "").lower()
    if gpu and gpu not in gpus():
        raise InputError(f"unknown GPU {gpu!r}", hint=f"one of: {', '.join(gpus())}")
    tp = data.get("tp", 1)
    if type(tp) is not int or tp < 1:
        raise InputError(f"runtime: tp is {tp!r}, not a number of GPUs")
    return Runtime(name=name, version=same[0], tp=tp, gpu=gpu)


def runtime_names() -> list[str]:
    """Names of all runtimes that have a contract."""
    return sorted({path.stem for path in FOLDER.glob("*.yaml")} - {"gpus"})


@lru_cache
def load_contract(name: str) -> Contract:
    """The contract of a runtime. Raises InputError that names the known ones."""
    if name not in runtime_names():
        raise InputError(f"unknown runtime {name!r}", hint=f"one of: {', '.join(runtime_names())}")
    text = (FOLDER / f"{name}.yaml").read_text("utf-8")
    return Contract.model_validate(yaml.safe_load(text))


@lru_cache
def gpus() -> dict[str, int]:
    """GPU → compute capability times ten."""
    data: dict[int, list[str]] = yaml.safe_load((FOLDER / "gpus.yaml").read_text("utf-8"))
    return {name: capability for capability, names in data.items() for name in names}


def kind_of(spec: QuantSpec) -> Kind:
    """What contracts call a weight."""
    if spec.element == "int":
        return "progressive" if spec.second == "channel" else "int"
    if spec.microscaled:
        return "mxfp4" if spec.element == "fp4_e2m1" else "mxfp8"
    return "nvfp4" if spec.element == "fp4_e2m1" else "fp8"


def inputs_of(spec: ActivationSpec | None) -> Inputs:
    """What contracts call a linear's input."""
    if spec is None:
        return "none"
    if spec.element == "fp4_e2m1":
        return "mxfp4" if spec.mode == "mx" else "nvfp4"
    if spec.mode == "mx":
        return "mxfp8"
    found: Inputs = f"{spec.element.partition('_')[0]} {spec.mode}"  # type: ignore[assignment]
    return found


def words_of(inputs: Iterable[Inputs]) -> str:
    """Kinds of inputs in words."""
    return f"{or_('float' if kind == 'none' else kind for kind in inputs)} inputs"


def or_(values: Iterable[object]) -> str:
    """Values in words."""
    words = [str(value) for value in values]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""

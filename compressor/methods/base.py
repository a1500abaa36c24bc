"""What a pass is, and how a recipe's key finds one.

A pass is a frozen pydantic model whose fields are its recipe parameters; its docstring is its help
text. It is pure: a unit and its statistics in, a new unit out. It reads no file, runs no loop over
the model and knows no tensor names beyond those its unit's layout gives it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from compressor_calibration.stats import KVNeeds, KVStats, SiteStats, StatNeeds
from compressor_calibration.tokens import TokenSet
from pydantic import Field
from torch import Tensor

from compressor.arch.select import Selection
from compressor.attention.policy import AttentionPolicy
from compressor.checkpoint.records import Records
from compressor.errors import InputError
from compressor.ir.frozen import Strict
from compressor.ir.layout import Linear, ModelLayout, UnitLayout
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import KVSpec, Scheme
from compressor.ir.unit import Unit
from compressor.numerics.gram import relative_error


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may know beside its unit.

    stats        input site → statistics of this unit's calibration inputs
    schemes      module path → what the linear will become
    selected     the linears this pass is for
    module_loss  (site, module path → replaced weight) → mean squared difference of the site's
                 module output to the original's, over the kept calibration inputs
    seed         seed of this unit and pass
    kv           statistics of keys and values, where `needs_kv` asks for them
    cache        how the cache will hold them, or None
    learned      `Learned.values` of this pass, where it is a model pass
    rounding     module path → options of `quantize` that its quantizer rounds with
    model_type   of the model's config
    base         weights of the base that the pass names, by full name, for those of its targets
                 that differ from the base's
    observe      (unit, site) → statistics of one site that no expert owns, with the original
                 model's inputs beside them, in a unit of which some linears have been rounded;
                 None where `needs` does not ask for `cross`, or outside blocks
    """

    stats: Mapping[str, SiteStats]
    schemes: Mapping[str, Scheme]
    selected: tuple[Linear, ...]
    module_loss: Callable[[str, Mapping[str, Tensor]], float]
    seed: int
    kv: KVStats | None = None
    cache: KVSpec | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    rounding: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model_type: str = ""
    base: Mapping[str, Tensor] = field(default_factory=dict)
    observe: Callable[[Unit, str], SiteStats] | None = None

    def spec(self, linear: Linear) -> QuantSpec | None:
        """How the linear's weight will be quantized, or None."""
        return self.schemes.get(linear.name, Scheme()).weight

    @property
    def coded(self) -> list[Linear]:
        """The selected linears that get codes."""
        return [linear for linear in self.selected if self.spec(linear) is not None]


@dataclass(frozen=True, slots=True)
class PassResult:
    """A new unit, and rows for the report: one dict per linear or site."""

    unit: Unit
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a pass says of a run in `plan`.

    notes          for people
    scratch_bytes  what it keeps in the work folder while it learns
    policy         an attention policy that decides what its own will
    problems       why it cannot work on this model, or with these tokens
    """

    notes: tuple[str, ...] = ()
    scratch_bytes: int = 0
    policy: AttentionPolicy | None = None
    problems: tuple[InputError, ...] = ()


class Pass(Strict):
    """A block pass: its fields are recipe parameters."""

    version: ClassVar[int] = 1
    quantizes: ClassVar[bool] = False
    works_on_blocks: ClassVar[bool] = True
    """Whether `apply` is run on units; a model pass may do without."""
    rotates_residual: ClassVar[bool] = False
    """Whether it changes the basis of the hidden states that flow from block to block."""
    changes_kv: ClassVar[bool] = False
    """Whether keys or values have other magnitudes after it."""
    only_format: ClassVar[str | None] = None
    """The one format that can hold what this pass makes, where there is but one."""

    targets: str | list[str] = Field("linear", description="linears this pass works on")
    ignore: list[str] = Field(default=["lm_head"], description="linears it leaves alone")

    @property
    def selection(self) -> Selection:
        """The linears this pass is for."""
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        return Selection(targets=tuple(targets), ignore=tuple(self.ignore))

    def altered(self, *names: str) -> list[str]:
        """Those of the parameters that have another value than by default. What a recipe spells
        out is not looked at: a resolved recipe spells out everything."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].get_default()]

    def scheme(self) -> Scheme | None:
        """What a targeted linear becomes, or None where the pass makes no codes."""
        return None

    @property
    def transforms(self) -> bool:
        """Whether it changes weights and leaves rounding them to a later pass."""
        return self.scheme() is None

    @property
    def rescales(self) -> bool:
        """Whether what can be observed of a block is another after it, so that passes after it are
        shown it anew: after transforms, and after quantizers that rescale inputs first."""
        return self.transforms

    def touches(self, unit: UnitLayout) -> bool:
        """Whether `apply` changes a unit even where it targets no linear of it."""
        return False

    @property
    def searches(self) -> bool:
        """Whether it needs to know how a later pass will quantize its targets."""
        return False

    def rounding(self) -> Mapping[str, Any]:
        """Options of `numerics.quantize` that this quantizer rounds with, for those who search with
        it."""
        return {}

    def needs(self) -> StatNeeds:
        """The statistics `apply` reads at the input sites of its targets."""
        return StatNeeds()

    def needs_kv(self) -> KVNeeds | None:
        """What `apply` reads of keys and values, or None."""
        return None

    @property
    def searches_keys(self) -> bool:
        """Whether it needs to know how the cache will hold keys."""
        return False

    def config_entries(self, layout: ModelLayout) -> Mapping[str, Any]:
        """What this pass adds to config.json."""
        return {}

    def outlook(
        self, layout: ModelLayout, *, parameters: int, rows: int, length: int, dtype: torch.dtype
    ) -> Outlook:
        """What is known of the pass before it runs on `parameters` weights of `dtype`, with `rows`
        of `length` calibration tokens."""
        return Outlook()

    @property
    def holds_model(self) -> bool:
        """Whether it has the whole model in memory while it learns."""
        return False

    def learning_bytes(
        self, layout: ModelLayout, *, length: int, vocabulary: int, itemsize: int
    ) -> int:
        """What it then has in memory beside the model's weights, which take `itemsize` bytes each;
        rows of calibration tokens have `length`."""
        return 0

    def learning_scores(self, layout: ModelLayout, *, rows: int, length: int) -> float:
        """Products of queries with keys that learning computes, where they take its time; of
        calibration there are `rows` rows of `length` tokens."""
        return 0.0

    def base_model(self) -> str | None:
        """A second checkpoint whose weights `apply` reads: folder, Hub id or GGUF file."""
        return None

    def delta_bits(self) -> int:
        """Signs for each weight, where it writes differences to a base."""
        return 0

    def retrained(self, unit: UnitLayout) -> tuple[str, ...]:
        """Tensors, no targets themselves, that come out as neither the source nor a base has
        them."""
        return ()

    def kv(self) -> KVSpec | None:
        """How this pass has the KV cache quantized, or None."""
        return None

    def adds(self, unit: UnitLayout, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Tensors that `apply` will put into `Unit.extra`, on the meta device, by full name."""
        return {}

    def check(self, linear: Linear) -> str | None:
        """Why this pass cannot work on a linear of this shape, or None."""
        return None

    def check_model(
        self, layout: ModelLayout, config: Mapping[str, Any], *, untied: bool
    ) -> InputError | None:
        """Why this pass cannot work on a model, or None; `untied`: a tied head is written apart."""
        return None

    def stands_for(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Names and parameters of the passes that this one stands for; none where it works
        itself."""
        return ()

    def compile_kernels(
        self, specs: Collection[tuple[QuantSpec, int]], device: torch.device
    ) -> None:
        """Have the kernels of `apply` compiled on a GPU, for weights of these (spec, inputs)."""

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        """The unit after this pass."""
        raise AssertionError(f"{type(self).__name__} has no apply")


@dataclass(frozen=True, slots=True)
class Learned:
    """What a model pass found.

    policy  entries of attention_policy.json
    values  what the pass's own `apply` reads as `context.learned`
    extra   tensors for the checkpoint by full name, as `adds` announced them
    rows    rows for the report
    files   files of the artefact beside the shards, by name
    plots   pictures beside the artefact that no manifest covers, by name
    environments  what it was learned with, as the run knows and notes it
    """

    policy: Mapping[str, Any] | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    plots: Mapping[str, bytes] = field(default_factory=dict)
    environments: Sequence[Mapping[str, str]] = ()


class FrozenModel(Protocol):
    """The source model as a model pass sees it; its weights are never changed."""

    layout: ModelLayout
    config: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    runner: Any
    """The BlockRunner that runs its blocks one at a time."""

    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        ...

    def read_unit(self, index: int) -> Unit:
        """A unit's weights, on the CPU."""
        ...

    def tensors(self, index: int) -> dict[str, Tensor]:
        """A unit's weights in float on the device, as the runner takes them."""
        ...

    def whole(self) -> Any:
        """A transformers model with all weights on the device, in evaluation mode; none of its
        parameters requires a gradient."""
        ...


@dataclass(frozen=True, slots=True)
class LearnContext:
    """What a model pass may know and use beside the model.

    tokens    the calibration tokens, where `reads_tokens` asks for them
    seed      seed of this pass
    batch     rows in one forward pass
    scratch   what this pass keeps while it learns, so that a killed run continues: records in a
              folder of its own
    base      index of a unit → weights of its base as in PassContext, on the CPU
    progress  called with what is done, how much of it, and how much there is
    stopping  asked now and then; the pass then raises Interrupted
    """

    tokens: TokenSet | None
    seed: int
    batch: int
    scratch: Records
    base: Callable[[int], Mapping[str, Tensor]] = lambda index: {}
    progress: Callable[[str, int, int], None] = lambda name, done, total: None
    stopping: Callable[[], bool] = lambda: False


class ModelPass(Pass):
    """A pass that learns a few values from the whole frozen source, before any block changes.

    It may have a block step too (`works_on_blocks`), which reads what was learned.
    """

    works_on_blocks: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True

    def learn(self, model: FrozenModel, context: LearnContext) -> Learned:
        """Learn. What is costly is kept in `context.scratch`, so that a killed run continues."""
        raise AssertionError(f"{type(self).__name__} learns nothing")

    def policy_again(
        self, layout: ModelLayout, stored: AttentionPolicy, values: Mapping[str, Tensor]
    ) -> AttentionPolicy | None:
        """The layers' policy once more, from parameters and what was stored with it; None where
        the pass makes none.

        stored  the policy as it lies beside the weights, of which only `made_by` may be used
        values  the tensors stored with it
        Raises InputError where something it needs is not there.
        """
        return None


def pass_names() -> list[str]:
    """Names of all passes, from the package's folder itself."""
    folders = importlib.import_module("compressor.methods").__path__
    files = [path for folder in folders for path in Path(folder).iterdir()]
    found = {path.stem for path in files if path.suffix == ".py" or (path / "method.py").is_file()}
    return sorted(found - {"__init__", "base"})


def get_pass(name: str) -> type[Pass]:
    """The pass class in the file or folder called `name`; InputError names the known ones."""
    if name not in pass_names():
        raise InputError(f"unknown pass {name!r}", hint=f"one of: {', '.join(pass_names())}")
    found: type[Pass] = importlib.import_module(f"compressor.methods.{name}").PASS
    return found


def output_error(weight: Tensor, quantized: Tensor, gram: Tensor | None) -> float:
    """Relative squared output error tr(ΔG Δᵀ)/tr(W G Wᵀ), or of the weights where G is None."""
    if gram is not None:
        return float(relative_error(weight, quantized, gram))
    delta, weight = (quantized - weight).float(), weight.float()
    return float(delta.square().sum() / weight.square().sum().clamp(min=1e-30))

"""What a method is, and how a recipe's key finds one.

A method is a frozen pydantic model whose fields are its recipe parameters; its docstring is its
help text. While a run is planned it says, as data, what it does and what it needs, why it cannot
work on a model, and what it takes. Then a `Pass` changes one unit after another; a `ModelPass`
learns from the whole frozen source first. A method reads no file, runs no loop over the model's
files and knows no tensor names beyond those that its unit's layout gives it.
"""

import importlib
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from compressor_calibration.stats import KVNeeds, StatNeeds
from pydantic import Field

from compressor.arch.select import Selection
from compressor.attention.policy import AttentionPolicy
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.frozen import Strict, class_of
from compressor.ir.layout import ModelLayout
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import KVSpec, Scheme
from compressor.ir.tensor import TensorShape
from compressor.ir.unit import Unit
from compressor.methods.common.context import (
    LearnContext,
    LearnResult,
    PassContext,
    PassResult,
    PlanContext,
)
from compressor.methods.common.learned import Learned
from compressor.runner.source_model import SourceModel

L = TypeVar("L", bound=Learned)

OF_METHODS = {"targets", "ignore"}
"""Parameters of every method, of which a rule knows nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What a method does to a model. It follows from the parameters alone.

    scheme            what its targets become, or None where it makes no codes
    rounding          options of `numerics.quantize` that it rounds with
    kv                how it has the KV cache quantized
    works_on          the units that `apply` is shown: those with targets, all, or none
    rescales          whether it changes what can be observed of a block before it rounds
    rotates_residual  whether hidden states have another basis between blocks after it
    changes_kv        whether keys or values have other magnitudes after it
    config            entries of config.json
    only_format       the one format that can hold what it makes
    delta_bits        signs for each weight, where it writes differences to a base
    retrains_norms    whether norms of blocks come out as neither the source nor a base has them
    retrains_blocks   whether blocks come out with other weights than the source has, before any
                      rounding
    fits_ranges       whether it chooses by itself how far ranges are clipped
    """

    scheme: Scheme | None = None
    rounding: Mapping[str, Any] = field(default_factory=dict)
    kv: KVSpec | None = None
    works_on: Literal["targets", "all", "none"] = "targets"
    rescales: bool = False
    rotates_residual: bool = False
    changes_kv: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    only_format: str | None = None
    delta_bits: int = 0
    retrains_norms: bool = False
    retrains_blocks: bool = False
    fits_ranges: bool = False

    @property
    def transforms(self) -> bool:
        """Whether it changes weights and leaves rounding them to a later method."""
        return self.scheme is None and self.kv is None and self.works_on != "none"

    @property
    def stale(self) -> bool:
        """Whether statistics from before it say nothing of what comes after it."""
        return self.rescales or self.transforms


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNeeds:
    """What a method that learns of a block by gradients takes.

    steps   with a gradient each;  rows  in each of them
    copies  float32 values that it keeps for each weight, gradients and intermediate ones included
    """

    steps: int
    rows: int
    copies: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a method reads beside the weights of its units.

    stats        of the inputs of its targets
    kv           of keys and values, or None
    tokens       whether it learns from the calibration tokens
    whole_model  whether the whole model is in memory while it learns
    rounding     whether it searches with the quantizer that comes after it
    cache        whether it searches with the form that the cache will have
    base         a second checkpoint: folder, Hub id or GGUF file
    block        how much its units' blocks run with gradients, or None
    """

    stats: StatNeeds = field(default_factory=StatNeeds)
    kv: KVNeeds | None = None
    tokens: bool = False
    whole_model: bool = False
    rounding: bool = False
    cache: bool = False
    base: str | None = None
    block: BlockNeeds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What learning takes, and what people may want to know of it.

    memory   bytes beside the model's weights, where the whole model is in memory; else all bytes
             on the device
    scratch  bytes in the work folder
    scores   products of queries with keys, where they take the time
    flops    of products of weights, where it trains
    """

    memory: int = 0
    flops: float = 0.0
    scratch: int = 0
    scores: float = 0.0
    notes: tuple[str, ...] = ()


class Method(Strict):
    """What every method says in `plan`; its fields are recipe parameters."""

    version: ClassVar[int] = 1
    """Raised when the same recipe gives other numbers."""

    targets: str | list[str] = Field(
        "linear",
        description="linears this pass works on: all of the text model, a role, a glob, re:…; "
        "without data also tower.*, projector.*, audio.* and mtp.*",
    )
    ignore: list[str] = Field(default=["lm_head"], description="linears it leaves alone")

    @property
    def selection(self) -> Selection:
        """The linears this method is for."""
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        return Selection(targets=tuple(targets), ignore=tuple(self.ignore))

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of its own, as a policy names them."""
        return self.model_dump(mode="json", exclude=OF_METHODS)

    def altered(self, *names: str) -> list[str]:
        """Those of the parameters that have another value than by default. What a recipe spells
        out is not looked at: a resolved recipe spells out everything."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].get_default()]

    def stands_for(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Names and parameters of the methods that this one is a sequence of; none where it works
        itself."""
        return ()

    def reads(self, source: Source) -> Source:
        """The model that it and all after it work on. Raises InputError where there is none."""
        return source

    def effects(self) -> Effects:
        """What it does."""
        return Effects()

    def needs(self) -> Needs:
        """What it reads."""
        return Needs()

    def check(self, context: PlanContext) -> Iterable[InputError]:
        """Why it cannot work on this model, or on some of these linears."""
        return ()

    def try_model(self, source: Source) -> None:
        """Raises InputError where transformers would not run the model that is written as the one
        that is read."""

    def longest_text(self, length: int) -> int | None:
        """Tokens of the longest text that what it calibrates on rows of `length` is for; None: any
        text."""
        return None

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        """What it takes where the model runs in `dtype`."""
        return Cost()


class Pass(Method):
    """A method that changes one unit after another."""

    def spreads(self) -> bool:
        """Whether it works on a block of which each rank has some experts alone
        (`PassContext.homes`)."""
        return False

    @abstractmethod
    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        """The unit after it, and rows for the report."""

    def compile_kernels(
        self, specs: Collection[tuple[QuantSpec, int]], device: torch.device
    ) -> None:
        """Have the kernels of `apply` compiled on a GPU, for weights of these (spec, inputs)."""


class ModelPass(Method, Generic[L]):
    """A method that learns a value of type `L` from the whole frozen source, before any block
    changes. Blocks change only where its effects say so."""

    def effects(self) -> Effects:
        return Effects(works_on="none")

    @property
    def records_quality(self) -> bool:
        """Whether what its policy lets queries see is measured on held-out text and recorded: where
        a text decided on it."""
        return self.needs().tokens

    def divides(self, *, one_host: bool) -> bool:
        """Whether ranks learn it together, in which case all of them call `learn`. Otherwise the
        leading one does.

        one_host  whether all of them run there, and so see what the leading one writes
        """
        return False

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[L]:
        """Learn; by default nothing. What is costly is kept in `context.scratch`, so that a killed
        run continues."""
        return LearnResult(self.learned_type()())

    def policy(self, layout: ModelLayout, learned: L | None) -> AttentionPolicy | None:
        """How layers attend, which parameters and what was learned decide; None where it is for
        others to say. `plan` asks without a value, for the most that may come of it, and refuses
        what does not fit the model.

        Raises InputError where no policy can describe the model, or the value lacks something.
        """
        return None

    def adds(self, layout: ModelLayout, dtype: torch.dtype) -> Mapping[str, dict[str, TensorShape]]:
        """Name of a unit → name → tensor that it adds to the checkpoint (`LearnResult.extra`), in
        a model of `dtype`."""
        return {}

    def apply(self, unit: Unit, context: PassContext, learned: L) -> PassResult:
        """The unit after it, and rows for the report."""
        return PassResult(unit)

    @classmethod
    def learned_type(cls) -> type[L]:
        """The type that it is generic in."""
        for kind in cls.__mro__:
            if args := getattr(kind, "__pydantic_generic_metadata__", {}).get("args"):
                found: type[L] = args[0]
                return found
        raise TypeError(f"{cls.__name__} does not say what it learns: ModelPass[...]")


def pass_names() -> list[str]:
    """Names of all methods, from the package's folder itself."""
    folders = importlib.import_module("compressor.methods").__path__
    files = [path for folder in folders for path in Path(folder).iterdir()]
    found = {path.stem for path in files if path.suffix == ".py" or (path / "method.py").is_file()}
    return sorted(found - {"__init__", "base"})


def get_pass(name: str) -> type[Method]:
    """The class in the file or folder called `name`; InputError names the known ones."""
    if name not in pass_names():
        raise InputError(f"unknown pass {name!r}", hint=f"one of: {', '.join(pass_names())}")
    module = importlib.import_module(f"compressor.methods.{name}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"compressor.methods.{name}.method")
    return class_of(module, Method)

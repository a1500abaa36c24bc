"""What methods are given, and what they give back: in `plan`, while they learn, and in a unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from compressor_calibration.stats import KVStats, SiteStats
from compressor_calibration.tokens import TokenSet
from torch import Tensor

from compressor.checkpoint.records import Records
from compressor.ir.layout import Linear, ModelLayout
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import KVSpec, Scheme
from compressor.ir.unit import Unit
from compressor.methods.common.learned import Learned
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.tunable_block import TunableBlock

L_co = TypeVar("L_co", bound=Learned, covariant=True)


@dataclass(frozen=True, slots=True)
class PlanContext:
    """What is known before a weight is read.

    layout, config  of the source
    dtype           of its weights
    parameters      how many it has
    untied          whether a tied head is written apart
    selected        the linears that the method is for
    rows, length    of calibration tokens
    """

    layout: ModelLayout
    config: Mapping[str, Any]
    dtype: torch.dtype
    parameters: int
    untied: bool
    selected: tuple[Linear, ...]
    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a method may know beside the unit it works on.

    stats        input site → statistics of this unit's calibration inputs
    schemes      module path → what the linear will become
    selected     the linears this method is for
    module_loss  (site, module path → replaced weight) → mean squared difference of the site's
                 module output to the original's, over the kept calibration inputs
    seed         seed of this unit and method
    kv           statistics of keys and values, where its needs say so and the block has any
    cache        how the cache will hold them, or None
    rounding     module path → options of `quantize` that its quantizer rounds with
    fitted       module paths whose quantizer chooses by itself how far ranges are clipped
    model_type   of the model's config
    base         weights of the base that the method names, by full name, for those of its targets
                 that differ from the base's
    observe      (unit, site) → statistics of one site that no expert owns, with the original
                 model's inputs beside them, in a unit of which some linears have been rounded;
                 None where the needs do not say `cross`, or outside blocks
    tune         unit → its block, to be run with gradients towards the original's outputs; None
                 where the needs do not say `block`, or outside blocks
    progress     told now and then how far a long unit is: steps done, of how many, and the loss
    ranks        the processes that work on the unit, all with the same statistics: what takes long
                 is divided among them (`Ranks.each`), and the rest every one does
    homes        expert → the rank that has its weights alone; elsewhere they are on the meta
                 device. Empty where every rank has all, as for methods that do not say `spreads`
    """

    stats: Mapping[str, SiteStats]
    schemes: Mapping[str, Scheme]
    selected: tuple[Linear, ...]
    module_loss: Callable[[str, Mapping[str, Tensor]], float]
    seed: int
    kv: KVStats | None = None
    cache: KVSpec | None = None
    rounding: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fitted: frozenset[str] = frozenset()
    model_type: str = ""
    base: Mapping[str, Tensor] = field(default_factory=dict)
    observe: Callable[[Unit, str], SiteStats] | None = None
    tune: Callable[[Unit], TunableBlock] | None = None
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None
    ranks: Ranks = ALONE
    homes: Mapping[int, int] = field(default_factory=dict)

    def home(self, linears: Sequence[Linear]) -> int | None:
        """The rank that has linears of one stack alone, if one has."""
        expert = linears[0].expert
        return None if expert is None else self.homes.get(expert)

    def stats_of(self, linears: Sequence[Linear]) -> list[SiteStats]:
        """Statistics of the sites of linears of one stack, made together where they are made only
        when they are asked for."""
        sites = [linear.site for linear in linears]
        several = getattr(self.stats, "several", None)
        return [self.stats[site] for site in sites] if several is None else several(sites)

    @property
    def coded(self) -> list[Linear]:
        """The selected linears that get codes."""
        schemes = self.schemes
        return [
            x for x in self.selected if x.name in schemes and schemes[x.name].weight is not None
        ]

    def spec(self, linear: Linear) -> QuantSpec:
        """How the weight of a linear that gets codes will be quantized."""
        spec = self.schemes[linear.name].weight
        if spec is None:
            raise RuntimeError(f"{linear.name} gets no codes")
        return spec

    @property
    def keys_and_values(self) -> KVStats:
        """Statistics of keys and values."""
        if self.kv is None:
            raise RuntimeError("this method's needs do not say that it reads keys and values")
        return self.kv


@dataclass(frozen=True, slots=True)
class PassResult:
    """A new unit, and rows for the report: one dict per linear or site."""

    unit: Unit
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class LearnContext:
    """What a method may know and use beside the model while it learns.

    tokens    the calibration tokens, where its needs say so
    seed      seed of this method
    batch     rows in one forward pass
    scratch   what it keeps meanwhile, so that a killed run continues: records in a folder of its
              own
    base      index of a unit → weights of its base as in PassContext, on the CPU
    progress  called with what is done, how much of it, and how much there is
    stopping  asked now and then; the method then raises Interrupted
    ranks     the processes that learn together, for methods that say so (`ModelPass.divides`):
              `scratch` is shared, and `stops` asked in place of `stopping`
    """

    tokens: TokenSet | None
    seed: int
    batch: int
    scratch: Records
    base: Callable[[int], Mapping[str, Tensor]] = lambda index: {}
    progress: Callable[[str, int, int], None] = lambda name, done, total: None
    stopping: Callable[[], bool] = lambda: False
    ranks: Ranks = ALONE

    def stops(self) -> bool:
        """Whether some rank was asked to stop; all ranks ask together."""
        return self.ranks.any(self.stopping())

    @property
    def ids(self) -> Tensor:
        """Calibration tokens [rows, length]."""
        if self.tokens is None:
            raise RuntimeError("this method's needs do not say that it reads tokens")
        return self.tokens.ids


@dataclass(frozen=True, slots=True)
class LearnResult(Generic[L_co]):
    """What was learned, and what is written of it.

    value  what decides the policy and what is done to units
    extra  tensors for the checkpoint by full name, as `adds` announced them
    rows   rows for the report
    files  files of the artefact beside the shards, by name
    plots  pictures beside the artefact that no manifest covers, by name
    """

    value: L_co
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    plots: Mapping[str, bytes] = field(default_factory=dict)

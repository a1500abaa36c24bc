"""A model's checkpoint seen as units of work: which tensors, which linears, what shares an input.

These values are made by `arch` from a map file and a config; they hold names and shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def weight_name(path: str) -> str:
    """The name of a module's weight in a unit's tensors and in what is written."""
    return f"{path}.weight"


def bias_name(path: str) -> str:
    """The name of a module's bias."""
    return f"{path}.bias"


def is_bias(name: str) -> bool:
    """Whether a tensor's name is that of a bias."""
    return name == bias_name(name.rpartition(".")[0])


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of a linear's weight that play one role (fused q/k/v, gate/up)."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Linear:
    """One nn.Linear as the checkpoint names it.

    name     module path, e.g. model.layers.0.self_attn.q_proj; tensors: name.weight, name.bias
    role     attn.q attn.k attn.v attn.qkv attn.o mlp.gate mlp.up mlp.gate_up mlp.down
             expert.gate expert.up expert.down router lm_head
    site     id of the input it reads, unique in its unit: attn.in, attn.out, mlp.in, mlp.out,
             expert.in, expert.3.out, shared.in …
    parts    row ranges by role; a single part for an unfused linear
    expert   expert number, or None
    fused    linears with the same non-empty tag are fused by runtimes and need one scheme
    """

    name: str
    role: str
    out_features: int
    in_features: int
    site: str
    bias: bool = False
    parts: tuple[Part, ...] = ()
    expert: int | None = None
    fused: str = ""

    @property
    def weight_name(self) -> str:
        """The name of its weight among a unit's tensors."""
        return weight_name(self.name)

    @property
    def bias_name(self) -> str:
        """The name that its bias has there, if it has one."""
        return bias_name(self.name)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)


@dataclass(frozen=True, slots=True)
class Norm:
    """One normalisation that multiplies by its weight, or by offset + weight.

    name    module path; its tensors are name.weight and, if `bias`, name.bias
    role    norm.attn norm.mlp (before), norm.attn.out norm.mlp.out (after, before the residual
            sum), norm.q norm.k (per head, after the projection), norm.final
    offset  1.0 for norms that multiply by (1 + weight)
    """

    name: str
    role: str
    offset: float = 0.0
    bias: bool = False

    @property
    def weight_name(self) -> str:
        """The name of its weight among a unit's tensors."""
        return weight_name(self.name)

    @property
    def bias_name(self) -> str:
        """The name that its bias has there, if it has one."""
        return bias_name(self.name)


@dataclass(frozen=True, slots=True)
class Fold:
    """An exact rescaling: the source's output channel j is divided by s_j, every consumer's input
    column j multiplied by it.

    site       the input site that is rescaled; *all* its linears (routers too) take s
    source     module path of the norm or linear that makes this input
    kind       norm: weight (and bias) / s;  linear: rows [rows] of weight and bias / s
    norm_offset  1.0 for norms that multiply by (1 + weight)
    rows       the source's rows that make the input, (start, stop), or None for all
    repeat     how many consumer heads read one source head (GQA); 1 otherwise
    head_dim   channels of one head, only where repeat > 1
    """

    site: str
    source: str
    kind: Literal["norm", "linear"]
    norm_offset: float = 0.0
    rows: tuple[int, int] | None = None
    repeat: int = 1
    head_dim: int = 0


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of a block's attention."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """One unit: the embedding, a block, or the head (final norm and lm_head).

    name     "embedding", "head", or the block's module path in the checkpoint
    tensors  every checkpoint tensor that belongs to the unit, in a fixed order
    linears  its linears, routers included, in the order of `tensors`
    """

    name: str
    kind: Literal["embedding", "block", "head"]
    index: int
    tensors: tuple[str, ...]
    linears: tuple[Linear, ...] = ()
    folds: tuple[Fold, ...] = ()
    attention: AttentionShape | None = None
    norms: tuple[Norm, ...] = ()

    @property
    def attention_path(self) -> str:
        """Path of a block's attention module: the one that its output projection is in."""
        return next(x.name.rpartition(".")[0] for x in self.linears if x.role == "attn.o")

    def site_linears(self, site: str) -> tuple[Linear, ...]:
        """The linears that read `site`."""
        return tuple(linear for linear in self.linears if linear.site == site)

    @property
    def sites(self) -> tuple[str, ...]:
        """Input sites in the order of their first linear."""
        return tuple(dict.fromkeys(linear.site for linear in self.linears))


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """All units of a model in execution order.

    tied         the name whose data the head shares
    unannounced  biases that the files hold and the config does not know of: loaders skip them
    """

    model_type: str
    units: tuple[UnitLayout, ...]
    tied: str | None = None
    unannounced: tuple[str, ...] = ()

    @property
    def embedding(self) -> UnitLayout:
        """The unit that turns tokens into hidden states."""
        return self.units[0]

    @property
    def blocks(self) -> tuple[UnitLayout, ...]:
        """The blocks in order; `blocks[i].index` is i."""
        return self.units[1:-1]

    @property
    def head(self) -> UnitLayout:
        """The final norm and lm_head."""
        return self.units[-1]

    def unit(self, index: int) -> UnitLayout:
        """The unit at a place in execution order: 0 is the embedding."""
        return self.units[index]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear of the model in execution order."""
        return tuple(linear for unit in self.units for linear in unit.linears)

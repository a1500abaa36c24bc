"""A model's checkpoint seen as units of work: which tensors, which linears, what shares an input.

These values are made by `arch` from a map file and a config; they hold names and shapes only.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def weight_name(path: str) -> str:
    """The name of a module's weight in a unit's tensors and in what is written."""
    return f"{path}.weight"


def bias_name(path: str) -> str:
    """The name of a module's bias."""
    return f"{path}.bias"


def is_weight(name: str) -> bool:
    """Whether a tensor's name is that of a module's weight."""
    return name == weight_name(name.rpartition(".")[0])


def is_bias(name: str) -> bool:
    """Whether a tensor's name is that of a bias."""
    return name == bias_name(name.rpartition(".")[0])


BESIDE = ("tower", "projector", "audio", "mtp")
"""First words of the roles of linears beside the text model."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a matrix that play one role: offset + o·stride + c for o < outer, c < count.

    One range of a fused linear has outer = 1; per-head interleaving ([heads, 3, d]) and every
    second row (gate and up of stacked experts) repeat it.
    """

    role: str
    offset: int
    count: int
    outer: int = 1
    stride: int = 0

    @property
    def total(self) -> int:
        """How many rows these are."""
        return self.count * self.outer

    def take(self, matrix: Tensor) -> Tensor:
        """The rows [total, ...] of a matrix [rows, ...], in the order of the pattern."""
        if self.outer == 1:
            return matrix[self.offset : self.offset + self.count]
        return matrix.index_select(0, self._index(matrix))

    def put(self, matrix: Tensor, rows: Tensor) -> Tensor:
        """A copy of a matrix with these rows replaced by `rows` [total, ...]."""
        if self.outer == 1:
            stop = self.offset + self.count
            return torch.cat([matrix[: self.offset], rows, matrix[stop:]])
        return matrix.index_copy(0, self._index(matrix), rows)

    def _index(self, matrix: Tensor) -> Tensor:
        starts = torch.arange(self.outer, device=matrix.device) * self.stride + self.offset
        return (starts[:, None] + torch.arange(self.count, device=matrix.device)).reshape(-1)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a checkpoint keeps a tensor: under a name of its own, or as part of a stack.

    name        in the checkpoint
    index       which of the stack's first dimension, or None for the whole tensor
    transposed  whether it is stored [in, out]
    rows        which rows of that matrix, once it is [out, in]; None for all
    """

    name: str
    index: int | None = None
    transposed: bool = False
    rows: Rows | None = None

    @property
    def whole(self) -> bool:
        """Whether it is just what the checkpoint has under that name."""
        return self.index is None and not self.transposed and self.rows is None

    def read(self, stored: Tensor) -> Tensor:
        """The tensor, out of what the checkpoint has under `name`."""
        value = stored if self.index is None else stored[self.index]
        value = value.T if self.transposed else value
        return (value if self.rows is None else self.rows.take(value)).contiguous()


class Module:
    """What has a weight, and perhaps a bias, that go by its path."""

    __slots__ = ()
    name: str

    @property
    def weight_name(self) -> str:
        """The name of its weight among a unit's tensors."""
        return weight_name(self.name)

    @property
    def bias_name(self) -> str:
        """The name that its bias has there, if it has one."""
        return bias_name(self.name)


@dataclass(frozen=True, slots=True)
class Linear(Module):
    """One nn.Linear as the checkpoint names it.

    name     module path, e.g. model.layers.0.self_attn.q_proj; its weight and bias go by
             name.weight and name.bias wherever units are worked on and written
    role     attn.q attn.k attn.v attn.qkv attn.o; attn.q_a attn.q_b attn.kv_a attn.kv_b (latent);
             linear.in linear.out (linear attention); layer.gate layer.out (of what each block is
             given of its tokens); mlp.gate mlp.up mlp.gate_up mlp.down;
             expert.gate expert.up expert.down; shared.gate shared.up shared.down; lm_head;
             tower.linear projector.linear audio.linear mtp.linear, beside the text model;
             router for a small linear that gates others: scaled with its site, never quantized
    site     id of the input it reads, unique in its unit: attn.in, attn.out, mlp.in, mlp.out,
             expert.in, expert.3.out, shared.in …
    rows     its rows by role; a single pattern over all of them for an unfused linear
    tensor   where the checkpoint keeps the weight;  bias_tensor  the bias, if there is one
    expert   expert number, or None
    fused    linears with the same non-empty tag are fused by runtimes and need one scheme
    transposed  its module keeps the weight [in, out], and so do files of floats
    """

    name: str
    role: str
    out_features: int
    in_features: int
    site: str
    bias: bool = False
    rows: tuple[Rows, ...] = ()
    expert: int | None = None
    fused: str = ""
    tensor: TensorRef | None = None
    bias_tensor: TensorRef | None = None
    transposed: bool = False

    @property
    def beside(self) -> bool:
        """Whether it is no part of the text model, so that nothing runs it."""
        return self.role.partition(".")[0] in BESIDE

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)


@dataclass(frozen=True, slots=True)
class Norm(Module):
    """One normalisation that multiplies by its weight, or by offset + weight.

    name    module path; its tensors are name.weight and, if `bias`, name.bias
    role    norm.attn norm.mlp (before), norm.attn.out norm.mlp.out (after, before the residual
            sum), norm.q norm.k (per head, after the projection), norm.q.all norm.k.all (over all
            heads), norm.q_a norm.kv_a (latents), norm.gated (of a linear attention's output),
            norm.embedding (of what enters the first block), norm.final
    offset  1.0 for norms that multiply by (1 + weight)
    kind    layer: subtracts the mean first, with or without a bias
    """

    name: str
    role: str
    offset: float = 0.0
    bias: bool = False
    kind: Literal["rms", "layer"] = "rms"


@dataclass(frozen=True, slots=True)
class Fold:
    """An exact rescaling: the source's output channel j is divided by s_j, every consumer's input
    column j multiplied by it.

    site       the input site that is rescaled; *all* its linears (routers too) take s
    source     module path of the norm or linear that makes this input
    kind       norm: weight (and bias) / s;  linear: rows [rows] of weight and bias / s
    norm_offset  1.0 for norms that multiply by (1 + weight)
    rows       the source's rows that make the input, or None for all
    repeat     how many consumer heads read one source head (GQA); 1 otherwise
    head_dim   channels of one head, only where repeat > 1
    """

    site: str
    source: str
    kind: Literal["norm", "linear"]
    norm_offset: float = 0.0
    rows: Rows | None = None
    repeat: int = 1
    head_dim: int = 0


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of a block's self attention.

    pairs  which channels of a head RoPE turns together: i and i + half, or neighbours; other where
           only some turn, or a norm over all heads follows the projection
    shared  its keys and values are those of an earlier block, or later blocks may read them
    """

    heads: int
    kv_heads: int
    head_dim: int
    pairs: Literal["halves", "neighbours", "other"] = "halves"
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Mixer:
    """What mixes tokens in a block; a block has none, one, or two side by side.

    kind   self (keys and values by head), latent (MLA: keys and values from a latent), linear
           (a recurrent state, or a short convolution)
    path   its module in the checkpoint
    shape  heads of a self attention
    """

    kind: Literal["self", "latent", "linear"]
    path: str
    shape: AttentionShape | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the whole model.

    hidden     channels of the hidden states;  vocabulary  tokens it knows
    positions  it was made for, if its config says so
    given      numbers that blocks are given of a token beside its hidden states
    published  keys and values of a token that blocks keep for later ones
    chosen     experts that a token is sent to
    """

    hidden: int
    vocabulary: int
    positions: int | None = None
    given: int = 0
    published: int = 0
    chosen: int = 0


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """One unit: the embedding, a block, the head (final norm and lm_head), or a part beside the
    text model.

    name     "embedding", "head", or the module path in the checkpoint of a block or a part
    tensors  every tensor that belongs to the unit, in a fixed order; what lies in a stack goes by
             the name of its linear
    linears  its linears, routers included, in the order of `tensors`
    others   those of `tensors` that are of no linear and no norm: sinks, correction bias, A_log,
             conv1d …; they are written as they are
    carried  tensors of a part beside the text model, which nothing runs: written as they are, but
             for linears that a recipe names by their role
    """

    name: str
    kind: Literal["embedding", "block", "head", "beside"]
    index: int
    tensors: tuple[str, ...]
    linears: tuple[Linear, ...] = ()
    folds: tuple[Fold, ...] = ()
    mixers: tuple[Mixer, ...] = ()
    norms: tuple[Norm, ...] = ()
    others: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()

    @property
    def attention(self) -> AttentionShape | None:
        """Heads of a block's self attention, or None where it has none."""
        return next((mixer.shape for mixer in self.mixers if mixer.shape is not None), None)

    @property
    def attention_path(self) -> str:
        """Path of a block's self attention. Raises StopIteration where it has none."""
        return next(mixer.path for mixer in self.mixers if mixer.kind == "self")

    @property
    def stacks(self) -> dict[str, tuple[Linear, ...]]:
        """Tensors of the checkpoint that hold linears' weights otherwise than one [out, in] →
        those linears."""
        found: dict[str, list[Linear]] = {}
        for linear in self.linears:
            if linear.tensor is not None and (linear.transposed or not linear.tensor.whole):
                found.setdefault(linear.tensor.name, []).append(linear)
        return {name: tuple(linears) for name, linears in found.items()}

    @property
    def experts(self) -> int:
        """How many routed experts it has."""
        return len({linear.expert for linear in self.linears} - {None})

    @property
    def norm_tensors(self) -> tuple[str, ...]:
        """Those of `tensors` that belong to norms."""
        paths = {norm.name for norm in self.norms}
        return tuple(name for name in self.tensors if name.rpartition(".")[0] in paths)

    def site_linears(self, site: str) -> tuple[Linear, ...]:
        """The linears that read `site`."""
        return tuple(linear for linear in self.linears if linear.site == site)

    @property
    def sites(self) -> tuple[str, ...]:
        """Input sites in the order of their first linear."""
        return tuple(dict.fromkeys(linear.site for linear in self.linears))


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """All units of a model in execution order; those beside the text model (a vision tower, heads
    for several tokens at once) come after the head.

    tied         the name whose data the head shares
    unannounced  biases that the files hold and the config does not know of: loaders skip them
    unread       other tensors that loaders skip
    """

    model_type: str
    units: tuple[UnitLayout, ...]
    sizes: Sizes
    tied: str | None = None
    unannounced: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def carried(self) -> tuple[str, ...]:
        """The tensors of all parts beside the text model."""
        return tuple(name for unit in self.units for name in unit.carried)

    @property
    def embedding(self) -> UnitLayout:
        """The unit that turns tokens into hidden states."""
        return self.units[0]

    @property
    def blocks(self) -> tuple[UnitLayout, ...]:
        """The blocks in order; `blocks[i].index` is i."""
        return tuple(unit for unit in self.units if unit.kind == "block")

    @property
    def head(self) -> UnitLayout:
        """The final norm and lm_head."""
        return next(unit for unit in reversed(self.units) if unit.kind == "head")

    def unit(self, index: int) -> UnitLayout:
        """The unit at a place in execution order: 0 is the embedding."""
        return self.units[index]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear of the model in execution order."""
        return tuple(linear for unit in self.units for linear in unit.linears)

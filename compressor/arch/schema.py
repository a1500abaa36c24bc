"""What a map file may say."""

import ast
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from compressor.arch.runtime_names import RuntimeNames


def _measure(text: str) -> str:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no measure") from error
    return text


Size = Annotated[
    str,
    Field(pattern=r"^\(*\w+\)*( ?([+*-]|//) ?\(*\w+\)*)*$", max_length=200),
    AfterValidator(_measure),
]
"""What a row of a map measures in: a name under `sizes`, q, kv, qkv (of all heads), group (query
heads to a key head) or gate_up, or what + - * // make of them and of numbers, as in "2*ff" or
"kv_lora + rope"."""

Value = bool | int | str | None
"""What a map compares a value of config.json with."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Requirement(_Row):
    """A config key that, where it is given, must have this value (or be this size); `why` says
    what there is no map of otherwise."""

    key: str
    value: Value = None
    size: Size | None = None
    why: str = ""


class NormRow(_Row):
    """A norm; `offset` is 1.0 where it multiplies by (1 + weight), `kind` layer where it subtracts
    the mean. `when` names config values without which there is none."""

    name: str
    role: str
    size: Size
    offset: float = 0.0
    kind: Literal["rms", "layer"] = "rms"
    when: dict[str, Value] = Field(default_factory=dict)


class LinearRow(_Row):
    """A linear; "{e}" in its name makes one for each expert. `fused` is the runtime's module.

    parts       role → rows, one range after the other
    per         how many times they alternate (per head)
    transposed  stored [in, out]
    """

    name: str
    role: str
    site: str
    shape: tuple[Size, Size]
    parts: dict[str, Size] = Field(default_factory=dict)
    per: Size | None = None
    fused: str = ""
    transposed: bool = False


class FoldRow(_Row):
    """A norm or linear whose output scale the site's linears can take over.

    part      the source's rows that make the input, where the source is fused
    per_head  the source's heads may be read by several query heads each
    when      config values under which the fold is exact
    """

    site: str
    source: str
    part: str | None = None
    per_head: bool = False
    when: dict[str, Value] = Field(default_factory=dict)


MixerKind = Literal["self", "latent", "linear"]


class Section(_Row):
    """A part of a block; one without linears is for blocks that lack this part.

    has     a module that has a weight in blocks that are so
    when    what config.json says of them, where it has one value for each block, that block's
    last    key of config.json that says how many blocks at the end they are
    sizes   of these blocks, where they are not the model's: name → config key or measure
    mixer   of a section of attention: what it mixes tokens with; two of them stand side by side
    pairs   which channels of a head RoPE turns together
    others  tensors of no linear and no norm, by their whole names in the block
    unread  those that files may have and no loader reads: they are left out
    """

    has: str | None = None
    when: dict[str, Value] = Field(default_factory=dict)
    last: str | None = None
    sizes: dict[str, Size] = Field(default_factory=dict)
    mixer: MixerKind | tuple[MixerKind, MixerKind] = "self"
    pairs: Literal["halves", "neighbours", "other"] = "halves"
    norms: tuple[NormRow, ...] = ()
    linears: tuple[LinearRow, ...] = ()
    others: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    folds: tuple[FoldRow, ...] = ()

    def mixer_paths(self, block: str) -> dict[MixerKind, str]:
        """What it mixes tokens with → that mixer's module, which holds its last linear."""
        kinds = (self.mixer,) if isinstance(self.mixer, str) else self.mixer
        paths: dict[MixerKind, str] = {}
        for kind in kinds:
            last = "linear.out" if kind == "linear" else "attn.o"
            own = [row for row in self.linears if row.role == last] or self.linears
            paths[kind] = f"{block}.{own[-1].name.rpartition('.')[0]}"
        return paths


class EmbeddingRow(_Row):
    """Modules of the embedding unit; `token` is the one a tied head shares, `norm` normalises what
    enters the first block, `beside` make what blocks are handed of their tokens."""

    token: str
    position: str | None = None
    norm: NormRow | None = None
    beside: tuple[str, ...] = ()


class HeadRow(_Row):
    """Modules of the head unit; `scale` is what logits are multiplied with: arithmetic of keys."""

    norm: NormRow
    linear: str
    scale: str | None = None


class HandedRow(_Row):
    """An argument of blocks that earlier units make; a number alone is a place in the outputs of
    the block before.

    by     tokens: the model makes one for each block of a row's tokens; filled: a mapping, which
           some blocks fill and later ones read
    where  key of config.json that is neither 0 nor false where there is such a thing
    """

    by: Literal["tokens", "filled"]
    where: str


class MapFile(_Row):
    """One map file.

    config    the part of config.json that describes the text model, where it is nested
    twin      the model_type whose class runs it, where transformers has none of its own
    twin_config  what that class's config says beside: key → arithmetic of keys of this one
    handed    what a block is given beside hidden states that earlier units made: argument → where
              from
    sizes     name → config key that holds it, or a measure; of several the first one present
              counts. A map has at least layers, hidden, vocab and heads
    prefixes  other prefixes of names in files → the map's
    biases    module, named as in its row → whether it has a bias: always, or as a config key (the
              first that is there) says; modules that are not named have none
    folds     those between sections of a block
    carried   patterns of names that are written as they are ({layers}: how many there are)
    """

    free: ClassVar[bool] = False

    model_type: str
    config: str | None = None
    twin: str | None = None
    twin_config: dict[str, str] = Field(default_factory=dict)
    handed: dict[str, int | HandedRow] = Field(default_factory=dict)
    sizes: dict[str, Size | tuple[Size, ...]]
    defaults: dict[str, bool | int | str] = Field(default_factory=dict)
    require: tuple[Requirement, ...] = ()
    prefixes: dict[str, str] = Field(default_factory=dict)
    embedding: EmbeddingRow
    layer: str
    attention: tuple[Section, ...] = Field(min_length=1)
    mlp: tuple[Section, ...] = Field(min_length=1)
    folds: tuple[FoldRow, ...] = ()
    head: HeadRow
    biases: dict[str, bool | str | tuple[str, ...]] = Field(default_factory=dict)
    carried: tuple[str, ...] = ()
    runtime: RuntimeNames

    @field_validator("sizes")
    @classmethod
    def _has_the_needed_sizes(
        cls, sizes: dict[str, str | tuple[str, ...]]
    ) -> dict[str, str | tuple[str, ...]]:
        lacking = {"layers", "hidden", "vocab", "heads"} - sizes.keys()
        if lacking:
            raise ValueError(f"no config key for {', '.join(sorted(lacking))}")
        return sizes

    @model_validator(mode="after")
    def _folds_have_ends(self) -> Self:
        sections = (*self.attention, *self.mlp)
        for section in sections:
            _check_folds(section.folds, [section])
        _check_folds(self.folds, sections)
        return self

    def value(self, config: Mapping[str, Any], key: str) -> Any:
        """What config.json says of the text model, or what the family takes where it is silent;
        dots lead into what is nested."""
        nested = config.get(self.config) if self.config is not None else None
        places = (nested if isinstance(nested, dict) else {}, config)
        # What is written twice of the head is read of the whole model, as transformers does.
        *outer, leaf = key.split(".")
        for place in places[::-1] if key == "tie_word_embeddings" else places:
            for part in outer:
                inner = place.get(part)
                place = inner if isinstance(inner, dict) else {}
            if place.get(leaf) is not None:
                return place[leaf]
        return self.defaults.get(key)

    def has_module(self, path: str) -> bool:
        """Whether a checkpoint of this architecture may have a module of that path."""
        return self._modules.fullmatch(path) is not None

    @cached_property
    def _modules(self) -> re.Pattern[str]:
        sections = (*self.attention, *self.mlp)
        rows = [row.name for section in sections for row in section.norms]
        rows += [row.name for section in sections for row in section.linears]
        rows += [name.rpartition(".")[0] for section in sections for name in section.others]
        rows += [stack.on_disk.rpartition(".")[0] for stack in self.runtime.stacks]
        fixed = [self.embedding.token, self.embedding.position, self.head.norm.name]
        fixed += [self.embedding.norm.name] if self.embedding.norm is not None else []
        fixed += self.embedding.beside
        paths = [path for path in (*fixed, self.head.linear) if path is not None]
        paths += [f"{self.layer}.{name}" for name in rows]
        patterns = (re.escape(path).replace(r"\{i\}", r"\d+") for path in paths)
        return re.compile("|".join(p.replace(r"\{e\}", r"\d+") for p in patterns))


def _check_folds(folds: Sequence[FoldRow], sections: Sequence[Section]) -> None:
    """Raises ValueError for a fold without a source or without a reader."""
    parts: dict[str, set[str]] = {}
    for section in sections:
        parts |= {row.name: set(row.parts) for row in section.linears}
        parts |= {row.name: set() for row in section.norms}
    sites = {row.site for section in sections for row in section.linears}
    for fold in folds:
        if fold.site not in sites:
            raise ValueError(f"no linear reads the site {fold.site!r} of a fold")
        if fold.source not in parts:
            raise ValueError(f"the fold into {fold.site} has the unknown source {fold.source!r}")
        if fold.part is not None and fold.part not in parts[fold.source]:
            raise ValueError(f"{fold.source} has no part {fold.part!r}")

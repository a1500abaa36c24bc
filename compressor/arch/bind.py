"""Lays an architecture map over the names and shapes found in a checkpoint.

Every tensor gets a unit, or the checkpoint is refused with all that does not fit. Files and configs
come from strangers, so each size is checked before anything is built from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from compressor.arch.schema import FoldRow, LinearRow, MapFile, Section
from compressor.errors import CompressError, InputError, Problems
from compressor.ir.layout import (
    AttentionShape,
    Fold,
    Linear,
    Mixer,
    ModelLayout,
    Norm,
    Rows,
    Sizes,
    TensorRef,
    UnitLayout,
    bias_name,
    weight_name,
)

CODES = {"qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "absmax"}

MAX_MISSING = 10_000
"""Tensors that are named as lacking before the search for more is given up."""

Headers = Mapping[str, Sequence[int] | None]


def lay(arch: MapFile, *, config: Mapping[str, Any], headers: Headers) -> ModelLayout:
    """The units of a checkpoint with this config and these tensors (name → shape).

    Raises InputError, or Problems with all that is wrong.
    """
    return _Layout(arch, config=config, headers=headers).model()


class _Layout:
    """Lays one map over one checkpoint, collecting what does not fit."""

    def __init__(self, arch: MapFile, *, config: Mapping[str, Any], headers: Headers) -> None:
        self.arch = arch
        self.config = config
        self.headers = headers
        self.taken: dict[str, None] = {}
        self.missing: list[str] = []
        self.unannounced: list[str] = []
        self.misshapen: list[str] = []
        self.sizes = self._sizes()

    def model(self) -> ModelLayout:
        problems: list[CompressError] = list(self._broken_requirements())
        if problems:
            raise Problems(problems)
        units = (
            self._embedding(),
            *(self._block(i) for i in range(self.sizes["layers"])),
            self._head(),
        )
        carried = tuple(
            name for name in self.headers.keys() - self.taken.keys() if self._is_carried(name)
        )
        unassigned = sorted(self.headers.keys() - self.taken.keys() - set(carried))
        if unassigned:
            problems.append(
                self._listed("the map has no place for", unassigned, hint=self._way_out(unassigned))
            )
        if self.missing:
            problems.append(
                self._listed("the checkpoint lacks", self.missing, hint=self._lacking(self.missing))
            )
        if self.misshapen:
            problems.append(
                self._listed("config.json and the files disagree on the shape of", self.misshapen)
            )
        if problems:
            raise Problems(problems)
        token = weight_name(self.arch.embedding.token)
        return ModelLayout(
            model_type=self.arch.model_type,
            units=units,
            sizes=self._model_sizes(),
            tied=token if self._tied else None,
            unannounced=tuple(self.unannounced),
            carried=tuple(sorted(carried)),
        )

    def _is_carried(self, name: str) -> bool:
        patterns = (p.replace("{layers}", str(self.sizes["layers"])) for p in self.arch.carried)
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def _model_sizes(self) -> Sizes:
        positions = self._value("max_position_embeddings")
        return Sizes(
            hidden=self._size("hidden"),
            vocabulary=self._size("vocab"),
            positions=positions if isinstance(positions, int) else None,
        )

    def _way_out(self, names: list[str]) -> str:
        """What to do about tensors that the map has no place for."""
        if any("lora_" in name or ".base_layer." in name for name in names):
            return "an adapter is not merged: merge it first (peft: merge_and_unload)"
        leaves = {name.rpartition(".")[2] for name in names}
        if "quantization_config" in self.config or leaves & CODES:
            return "this checkpoint is already quantized: start from the original"
        return (
            "if the model does without them, as transformers does, save it once more without: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )

    def _lacking(self, names: list[str]) -> str | None:
        """What to do about a head that is not there."""
        if weight_name(self.arch.head.linear) not in names:
            return None
        return (
            "if the head shares the embedding, config.json has to say tie_word_embeddings: true; "
            "a model that was saved without its head cannot be made into a causal model"
        )

    def _listed(self, what: str, names: list[str], *, hint: str | None = None) -> InputError:
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
        return InputError(f"{self.arch.model_type}: {what} {count}: {shown}", hint=hint)

    def _value(self, key: str) -> Any:
        return self.arch.value(self.config, key)

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, keys in self.arch.sizes.items():
            for key in (keys,) if isinstance(keys, str) else keys:
                value = self._value(key)
                if value is None or name in sizes:
                    continue
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise InputError(f"config.json: {key} is {value!r}, not a count")
                sizes[name] = value
        self.sizes = sizes
        heads, hidden = self._size("heads"), self._size("hidden")
        kv_heads = sizes.setdefault("kv_heads", heads)
        head_dim = sizes.setdefault("head_dim", max(hidden // heads, 1))
        if heads % kv_heads:
            raise InputError(f"config.json: {kv_heads} key heads do not divide {heads} query heads")
        for name in ("layers", "experts"):
            # Counts are used as loop bounds: never beyond what the files can hold.
            if sizes.get(name, 0) > len(self.headers):
                raise InputError(
                    f"config.json promises {sizes[name]} {name}, but the checkpoint has only "
                    f"{len(self.headers)} tensors"
                )
        sizes["q"], sizes["kv"] = heads * head_dim, kv_heads * head_dim
        sizes["qkv"] = sizes["q"] + 2 * sizes["kv"]
        if "ff" in sizes:
            sizes["gate_up"] = 2 * sizes["ff"]
        self._size("layers")
        return sizes

    def _size(self, measure: str) -> int:
        """A size by name, or a sum of products of sizes and numbers."""
        return sum(
            math.prod(int(n) if n.isdigit() else self._named(n) for n in product.split("*"))
            for product in measure.split(" + ")
        )

    def _named(self, name: str) -> int:
        if name not in self.sizes:
            keys = self.arch.sizes.get("ff" if name == "gate_up" else name, name)
            raise InputError(
                f"config.json lacks {keys if isinstance(keys, str) else ' or '.join(keys)}"
            )
        return self.sizes[name]

    def _broken_requirements(self) -> Iterator[InputError]:
        for row in self.arch.require:
            value = self._value(row.key)
            needed = row.value if row.size is None else self._size(row.size)
            if value is not None and value != needed:
                yield InputError(
                    f"{self.arch.model_type} with {row.key} {value!r} is not supported",
                    hint=f"only {row.key} {needed!r} is",
                )

    def _module(
        self, path: str, shape: tuple[int, ...] | None, *, row: str = ""
    ) -> tuple[tuple[str, ...], bool]:
        """Take a module's weight and its bias, if it has one: their names, has a bias.

        row  its name in the map, where that is not its path
        """
        names = [weight_name(path)]
        bias = self._has_bias(row or path)
        expected = [shape]
        if bias:
            names.append(bias_name(path))
            expected.append(None if shape is None else shape[:1])
        elif bias_name(path) in self.headers:
            self.taken[bias_name(path)] = None
            self.unannounced.append(bias_name(path))
        for name, wanted in zip(names, expected, strict=True):
            self._take(name, wanted)
        return tuple(names), bias

    def _take(self, name: str, shape: tuple[int, ...] | None) -> None:
        """A tensor of the checkpoint has its place; note where it is not there or not so."""
        again = name in self.taken
        self.taken[name] = None
        if name not in self.headers:
            self.missing.append(name)
            if len(self.missing) > MAX_MISSING:
                # Layers times experts of a config are no bound on the work.
                raise self._listed("the checkpoint lacks at least", self.missing)
            return
        found = self.headers[name]
        if not again and shape is not None and found is not None and tuple(found) != shape:
            self.misshapen.append(f"{name} {list(found)}, not {list(shape)}")

    def _has_bias(self, row: str) -> bool:
        said = self.arch.biases.get(row, False)
        return said if isinstance(said, bool) else self._value(said) is True

    def _embedding(self) -> UnitLayout:
        row = self.arch.embedding
        tensors, _ = self._module(row.token, (self._size("vocab"), self._size("hidden")))
        if row.position is not None:
            tensors += self._module(row.position, None)[0]
        return UnitLayout(name="embedding", kind="embedding", index=0, tensors=tensors)

    @property
    def _tied(self) -> bool:
        stored = weight_name(self.arch.head.linear) in self.headers
        return self._value("tie_word_embeddings") is True and not stored

    def _head(self) -> UnitLayout:
        row, shape = self.arch.head, (self._size("vocab"), self._size("hidden"))
        tensors, bias = self._module(row.norm.name, (self._size(row.norm.size),))
        norm = Norm(row.norm.name, row.norm.role, row.norm.offset, bias, row.norm.kind)
        linear_bias = False
        folds: tuple[Fold, ...] = ()
        if not self._tied:
            names, linear_bias = self._module(row.linear, shape)
            tensors += names
            folds = (Fold("head.in", norm.name, "norm", norm_offset=norm.offset),)
        linear = Linear(
            row.linear,
            "lm_head",
            *shape,
            site="head.in",
            bias=linear_bias,
            rows=(Rows("lm_head", 0, shape[0]),),
            tensor=TensorRef(weight_name(row.linear)),
            bias_tensor=TensorRef(bias_name(row.linear)) if linear_bias else None,
        )
        return UnitLayout(
            name="head",
            kind="head",
            index=0,
            tensors=tensors,
            linears=(linear,),
            folds=folds,
            norms=(norm,),
        )

    def _block(self, index: int) -> UnitLayout:
        prefix = self.arch.layer.format(i=index)
        tensors: list[str] = []
        norms: dict[str, Norm] = {}
        linears: dict[str, Linear] = {}
        folds: list[Fold] = []
        others: list[str] = []
        attention = self._section(prefix, self.arch.attention)
        mlp = self._section(prefix, self.arch.mlp)
        for section in (attention, mlp):
            for norm_row in section.norms:
                path = f"{prefix}.{norm_row.name}"
                names, bias = self._module(path, (self._size(norm_row.size),), row=norm_row.name)
                tensors.extend(names)
                norms[path] = Norm(path, norm_row.role, norm_row.offset, bias, norm_row.kind)
            for row in section.linears:
                shape = (self._size(row.shape[0]), self._size(row.shape[1]))
                for expert in self._experts(row.name):
                    path = f"{prefix}.{row.name.format(e=expert)}"
                    stored = self._stored(prefix, path, expert, shape)
                    if stored is None:
                        names, bias = self._module(path, shape, row=row.name)
                        weight = TensorRef(names[0])
                        bias_tensor = TensorRef(names[1]) if bias else None
                    else:
                        weight, bias_tensor = stored
                        bias = bias_tensor is not None
                        names = (weight_name(path), *([bias_name(path)] if bias else []))
                    tensors.extend(names)
                    linears[path] = Linear(
                        path,
                        row.role,
                        *shape,
                        site=row.site.format(e=expert),
                        bias=bias,
                        rows=self._rows(row),
                        expert=expert,
                        fused=f"{prefix}.{row.fused}" if row.fused else "",
                        tensor=weight,
                        bias_tensor=bias_tensor,
                    )
            for name in section.others:
                others.append(f"{prefix}.{name}")
                self._take(others[-1], None)
        tensors += others
        for fold_row in (*attention.folds, *mlp.folds, *self.arch.folds):
            if all(self._value(key) == value for key, value in fold_row.when.items()):
                for expert in self._experts(fold_row.source):
                    source = f"{prefix}.{fold_row.source.format(e=expert)}"
                    site = fold_row.site.format(e=expert)
                    if source in norms or source in linears:
                        folds.append(self._fold(fold_row, site, source, norms, linears))
        return UnitLayout(
            name=prefix,
            kind="block",
            index=index,
            tensors=tuple(tensors),
            linears=tuple(linears.values()),
            folds=tuple(folds),
            mixers=(self._mixer(prefix, attention),),
            norms=tuple(norms.values()),
            others=tuple(others),
        )

    def _mixer(self, prefix: str, section: Section) -> Mixer:
        path = f"{prefix}.{section.linears[-1].name.rpartition('.')[0]}"
        if section.mixer != "self":
            return Mixer(section.mixer, path)
        heads, kv_heads, head_dim = map(self._size, ("heads", "kv_heads", "head_dim"))
        return Mixer("self", path, AttentionShape(heads, kv_heads, head_dim, section.pairs))

    def _section(self, prefix: str, sections: Sequence[Section]) -> Section:
        """The first section that a block has."""
        for section in sections:
            if section.has is None or weight_name(f"{prefix}.{section.has}") in self.headers:
                return section
        return sections[0]

    def _stored(
        self, prefix: str, path: str, expert: int | None, shape: tuple[int, int]
    ) -> tuple[TensorRef, TensorRef | None] | None:
        """Weight and bias of an expert's linear, where the checkpoint has them in a stack."""
        for stack in self.arch.runtime.stacks if expert is not None else ():
            names = [f"{prefix}.{source.format(e=expert)}" for source in stack.sources]
            if path not in names or f"{prefix}.{stack.into}" not in self.headers:
                continue
            assert expert is not None
            place, rows = names.index(path), shape[0]
            weight = stack.reference(prefix, expert, place, rows)
            bias = stack.bias_reference(prefix, expert, place, rows)
            every, whole = self._size("experts"), (rows * len(names), shape[1])
            self._take(weight.name, (every, *(whole[::-1] if stack.transposed else whole)))
            if bias is not None:
                self._take(bias.name, (every, whole[0]))
            return weight, bias
        return None

    def _experts(self, name: str) -> list[int] | list[None]:
        return list(range(self._size("experts"))) if "{e}" in name else [None]

    def _rows(self, row: LinearRow) -> tuple[Rows, ...]:
        outer = 1 if row.per is None else self._size(row.per)
        sizes = {role: self._size(size) for role, size in row.parts.items()}
        sizes = sizes or {row.role: self._size(row.shape[0])}
        stride, start, found = sum(sizes.values()), 0, []
        for role, size in sizes.items():
            found.append(Rows(role, start, size, outer, stride if outer > 1 else 0))
            start += size
        if stride * outer != self._size(row.shape[0]):
            raise InputError(
                f"the map of {self.arch.model_type} splits {row.name} into {stride * outer} rows"
            )
        return tuple(found)

    def _fold(
        self,
        row: FoldRow,
        site: str,
        source: str,
        norms: Mapping[str, Norm],
        linears: Mapping[str, Linear],
    ) -> Fold:
        if source in norms:
            return Fold(site, source, "norm", norm_offset=norms[source].offset)
        rows = next((r for r in linears[source].rows if r.role == row.part), None)
        repeat = self._size("heads") // self._size("kv_heads") if row.per_head else 1
        head_dim = self._size("head_dim") if repeat > 1 else 0
        return Fold(site, source, "linear", rows=rows, repeat=repeat, head_dim=head_dim)

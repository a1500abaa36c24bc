"""Lays an architecture map over the names and shapes found in a checkpoint.

Every tensor gets a unit, or the checkpoint is refused with all that does not fit. Files and configs
come from strangers, so each size is checked before anything is built from it.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from compressor.arch.beside import units_beside
from compressor.arch.refusals import broken_requirements, headless, way_out, wrong_experts
from compressor.arch.schema import FoldRow, LinearRow, MapFile, Section
from compressor.arch.sizes import ConfigReader, read_sizes
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
        self.unread: list[str] = []
        self.misshapen: list[str] = []
        self.published: dict[int, int] = {}  # by the section of attention
        self.read = read_sizes(arch, config)
        self._check_counts()

    def model(self) -> ModelLayout:
        problems: list[CompressError] = list(broken_requirements(self.read))
        if problems:
            raise Problems(problems)
        blocks = range(self.read.size("layers"))
        units = (self._embedding(), *(self._block(i) for i in blocks), self._head())
        left = self.headers.keys() - self.taken.keys()
        kinds = [p.replace("{layers}", str(len(blocks))) for p in self.arch.carried]
        carried = tuple(name for name in left if any(fnmatchcase(name, kind) for kind in kinds))
        experts = self.read.known.get("experts")
        problems += wrong_experts(self.arch, experts, self.headers, self.config)
        unassigned = sorted(left - set(carried))
        for what, names, hint in (
            ("the map has no place for", unassigned, way_out(unassigned, self.config)),
            ("the checkpoint lacks", self.missing, headless(self.missing, self.arch)),
            ("config.json and the files disagree on the shape of", self.misshapen, None),
        ):
            if names:
                problems.append(self._listed(what, names, hint=hint))
        if problems:
            raise Problems(problems)
        token = weight_name(self.arch.embedding.token)
        positions = self.read.value("max_position_embeddings")
        return ModelLayout(
            model_type=self.arch.model_type,
            units=(*units, *units_beside(carried, self.headers)),
            sizes=Sizes(
                hidden=self.read.size("hidden"),
                vocabulary=self.read.size("vocab"),
                positions=positions if isinstance(positions, int) else None,
                given=self.read.size("layers * layer_ff") if self._handed("tokens") else 0,
                published=sum(self.published.values()),
                chosen=self.read.chosen_experts,
            ),
            tied=token if self._tied else None,
            unannounced=tuple(self.unannounced),
            unread=tuple(self.unread),
        )

    def _handed(self, by: str) -> bool:
        return by in self.arch.runtime.handed.values()

    def _listed(self, what: str, names: list[str], *, hint: str | None = None) -> InputError:
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
        return InputError(f"{self.arch.model_type}: {what} {count}: {shown}", hint=hint)

    def _check_counts(self) -> None:
        """Counts are used as loop bounds: never beyond what the files can hold."""
        stacked = [s[0] for s in self.headers.values() if s is not None and len(s) == 3]
        most = {"layers": len(self.headers), "experts": max(len(self.headers), *stacked, 0)}
        for name, limit in most.items():
            if self.read.known.get(name, 0) > limit:
                raise InputError(
                    f"config.json promises {self.read.known[name]} {name}, but the checkpoint has "
                    f"only {len(self.headers)} tensors"
                )

    def _module(
        self,
        path: str,
        shape: tuple[int, ...] | None,
        *,
        row: str = "",
        outputs: int | None = None,
    ) -> tuple[tuple[str, ...], bool]:
        """Take a module's weight and its bias, if it has one: their names, has a bias.

        row      its name in the map, where that is not its path
        outputs  how many it has, where that is not the weight's first dimension
        """
        names = [weight_name(path)]
        bias = self._has_bias(row or path)
        expected = [shape]
        if bias:
            names.append(bias_name(path))
            expected.append((outputs,) if outputs else None if shape is None else shape[:1])
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
        if isinstance(said, bool):
            return said
        values = [self.read.value(key) for key in ((said,) if isinstance(said, str) else said)]
        return next((value for value in values if value is not None), False) is True

    def _embedding(self) -> UnitLayout:
        row = self.arch.embedding
        tensors, _ = self._module(row.token, (self.read.size("vocab"), self.read.size("hidden")))
        if row.position is not None:
            tensors += self._module(row.position, None)[0]
        if self._handed("tokens"):
            for name in row.beside:
                tensors += self._module(name, None)[0]
        norms: tuple[Norm, ...] = ()
        if row.norm is not None:
            names, bias = self._module(row.norm.name, (self.read.size(row.norm.size),))
            tensors += names
            norms = (Norm(row.norm.name, row.norm.role, row.norm.offset, bias, row.norm.kind),)
        return UnitLayout(name="embedding", kind="embedding", index=0, tensors=tensors, norms=norms)

    @property
    def _tied(self) -> bool:
        stored = weight_name(self.arch.head.linear) in self.headers
        return self.read.value("tie_word_embeddings") is True and not stored

    def _head(self) -> UnitLayout:
        row, shape = self.arch.head, (self.read.size("vocab"), self.read.size("hidden"))
        tensors, bias = self._module(row.norm.name, (self.read.size(row.norm.size),))
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
        mixers: tuple[Mixer, ...] = ()
        attention = self._section(prefix, index, self.arch.attention)
        heads = self.read.of_block(attention, index)
        mlp = self._section(prefix, index, self.arch.mlp)
        for section in (attention, mlp):
            read = self.read.of_block(section, index)
            if section is attention and section.linears:
                shared = self._handed("filled")
                mixers = _mixers(prefix, section, read, shared=shared)
                if shared and section.last is None:
                    # The last block of a kind before those that read.
                    self.published[id(section)] = 2 * read.size("kv")
            for norm_row in section.norms:
                if not self.read.holds(norm_row.when):
                    continue
                path = f"{prefix}.{norm_row.name}"
                names, bias = self._module(path, (read.size(norm_row.size),), row=norm_row.name)
                tensors.extend(names)
                norms[path] = Norm(path, norm_row.role, norm_row.offset, bias, norm_row.kind)
            for row in section.linears:
                shape = (read.size(row.shape[0]), read.size(row.shape[1]))
                for expert in self._experts(row.name):
                    path = f"{prefix}.{row.name.format(e=expert)}"
                    stored = self._stored(prefix, path, expert, shape)
                    if stored is None:
                        across = shape[::-1] if row.transposed else shape
                        names, bias = self._module(path, across, row=row.name, outputs=shape[0])
                        turned = row.transposed and self.headers.get(names[0]) is not None
                        weight = TensorRef(names[0], transposed=turned)
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
                        rows=self._rows(row, read),
                        expert=expert,
                        fused=f"{prefix}.{row.fused}" if row.fused else "",
                        tensor=weight,
                        bias_tensor=bias_tensor,
                        transposed=row.transposed,
                    )
            for name in section.others:
                path = name.rpartition(".")[0]
                for each in (name, *([bias_name(path)] if self._has_bias(path) else [])):
                    others.append(f"{prefix}.{each}")
                    self._take(others[-1], None)
            for name in section.unread:
                if (unread := f"{prefix}.{name}") in self.headers:
                    self.taken[unread] = None
                    self.unread.append(unread)
        tensors += others
        sites = {linear.site for linear in linears.values()}
        if not linears:
            self.missing.append(f"{prefix}.*")
        for fold_row in (*attention.folds, *mlp.folds, *self.arch.folds):
            if self.read.holds(fold_row.when):
                for expert in self._experts(fold_row.source):
                    source = f"{prefix}.{fold_row.source.format(e=expert)}"
                    site = fold_row.site.format(e=expert)
                    if site in sites and (source in norms or source in linears):
                        folds.append(self._fold(fold_row, site, source, norms, linears, heads))
        return UnitLayout(
            name=prefix,
            kind="block",
            index=index,
            tensors=tuple(tensors),
            linears=tuple(linears.values()),
            folds=tuple(folds),
            mixers=mixers,
            norms=tuple(norms.values()),
            others=tuple(others),
        )

    def _section(self, prefix: str, index: int, sections: Sequence[Section]) -> Section:
        """The first section that a block has."""
        for section in sections:
            path = None if section.has is None else f"{prefix}.{section.has}"
            there = path is None or path in self.headers or weight_name(path) in self.headers
            here = self.read.holds(section.when, index) and self.read.is_last(section.last, index)
            if there and here:
                return section
        return sections[0]

    def _stored(
        self, prefix: str, path: str, expert: int | None, shape: tuple[int, int]
    ) -> tuple[TensorRef, TensorRef | None] | None:
        """Weight and bias of an expert's linear, where the checkpoint has them in a stack."""
        for stack in self.arch.runtime.stacks if expert is not None else ():
            names = [f"{prefix}.{source.format(e=expert)}" for source in stack.sources]
            if path not in names or f"{prefix}.{stack.on_disk}" not in self.headers:
                continue
            assert expert is not None
            place, rows = names.index(path), shape[0]
            every, whole = self.read.size("experts"), (rows * len(names), shape[1])
            found = self.headers[f"{prefix}.{stack.on_disk}"]
            turned = stack.turned(found, (every, *whole))
            weight = stack.reference(prefix, expert, place, rows, transposed=turned)
            bias = stack.bias_reference(prefix, expert, place, rows)
            self._take(weight.name, (every, *(whole[::-1] if turned else whole)))
            if bias is not None:
                self._take(bias.name, (every, whole[0]))
            return weight, bias
        return None

    def _experts(self, name: str) -> list[int] | list[None]:
        return list(range(self.read.size("experts"))) if "{e}" in name else [None]

    def _rows(self, row: LinearRow, read: ConfigReader) -> tuple[Rows, ...]:
        outer = 1 if row.per is None else read.size(row.per)
        sizes = {role: read.size(size) for role, size in row.parts.items()}
        sizes = sizes or {row.role: read.size(row.shape[0])}
        stride, start, found = sum(sizes.values()), 0, []
        for role, size in sizes.items():
            found.append(Rows(role, start, size, outer, stride if outer > 1 else 0))
            start += size
        if stride * outer != read.size(row.shape[0]):
            raise InputError(
                f"sizes in config.json do not fit each other: {row.name} of "
                f"{self.arch.model_type} has {read.size(row.shape[0])} rows, and its parts "
                f"({', '.join(sizes)}) {stride * outer}"
            )
        return tuple(found)

    def _fold(
        self,
        row: FoldRow,
        site: str,
        source: str,
        norms: Mapping[str, Norm],
        linears: Mapping[str, Linear],
        read: ConfigReader,
    ) -> Fold:
        if source in norms:
            return Fold(site, source, "norm", norm_offset=norms[source].offset)
        linear = linears[source]
        rows = next((r for r in linear.rows if r.role == row.part), None)
        heads, kv_heads = read.size("heads"), read.size("kv_heads")
        if not row.per_head or heads == kv_heads:
            return Fold(site, source, "linear", rows=rows)
        # Of the values, whose heads may have another width than those of keys.
        head_dim = (rows.total if rows else linear.out_features) // kv_heads
        return Fold(site, source, "linear", rows=rows, repeat=heads // kv_heads, head_dim=head_dim)


def _mixers(
    prefix: str, section: Section, read: ConfigReader, *, shared: bool
) -> tuple[Mixer, ...]:
    shape, paths = None, section.mixer_paths(prefix)
    if "self" in paths:
        heads, kv_heads, head_dim = map(read.size, ("heads", "kv_heads", "head_dim"))
        shape = AttentionShape(heads, kv_heads, head_dim, section.pairs, shared)
    return tuple(Mixer(kind, at, shape if kind == "self" else None) for kind, at in paths.items())

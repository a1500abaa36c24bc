"""A model on disk in any format, read unit by unit: dense, or quantized by us or by others."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.arch.beside import part_of
from compressor.arch.free import FreeMap
from compressor.arch.load import NO_MAP, ArchMap, find_map
from compressor.arch.schema import MapFile
from compressor.checkpoint.assemble import assembled
from compressor.checkpoint.consolidated import open_any
from compressor.checkpoint.low_precision.known import as_floats
from compressor.checkpoint.low_precision.microscaled import as_one_by_one
from compressor.checkpoint.manifest import RECIPE_NAME
from compressor.checkpoint.one_reading import (
    settle_biases,
    settle_head,
    settle_quantization,
    without_unread,
)
from compressor.checkpoint.packed_shapes import packed_shape
from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.safetensors import Entry
from compressor.checkpoint.slices import sliced
from compressor.checkpoint.stored_names import canonical
from compressor.errors import CompressError, InputError, Problems
from compressor.foreign.bounded_yaml import load_yaml
from compressor.foreign.untrusted import read_file
from compressor.formats.base import Format, ModelSchemes, format_names, get_format
from compressor.ir.layout import Linear, ModelLayout, UnitLayout, weight_name
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape
from compressor.ir.unit import Unit

CODE_NAMES = ("weight_packed", "qweight", "blocks")
"""Names under which formats store codes in place of a linear's `weight`."""

TELLING = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_global_scale")
"""Names by which compressed-tensors' sub-formats are told apart."""

ADDED = re.compile(r".*\.(k_scale|v_scale|(q_future_proj|q_curr_proj|k_conv)\.weight)$")
"""Tensors that a pass adds beside the architecture's own."""


def is_cache_scale(name: str) -> bool:
    """Whether an added tensor is a scale of the KV cache."""
    return name.endswith((".k_scale", ".v_scale"))


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint with its meaning: what its tensors are, and how its linears are quantized.

    added  names of tensors that a pass added, or that are carried over, by the unit they belong to
    """

    checkpoint: Checkpoint
    arch: ArchMap | FreeMap
    layout: ModelLayout
    format: Format
    schemes: ModelSchemes
    added: Mapping[str, tuple[str, ...]]

    @property
    def quantized(self) -> bool:
        """Whether any linear is read as codes."""
        return any(scheme.weight is not None for scheme in self.schemes.linears.values())

    @property
    def low_precision(self) -> str:
        """What weights are stored as, where that is not floats; empty for a float checkpoint."""
        return self.checkpoint.stored_as or (self.format.name if self.quantized else "")

    def stored(self, linear: Linear) -> dict[str, TensorShape]:
        """Tensors that hold a linear's weight: name local to the linear → dtype and shape."""
        scheme, entries = self.schemes.linears[linear.name], self.checkpoint.entries
        if scheme.weight is None:
            return {"weight": entries[linear.weight_name].spec}
        paths = ((leaf, f"{linear.name}.{leaf}") for leaf in TELLING)
        tensors = {leaf: entries[path].spec for leaf, path in paths if path in entries}
        return self.format.stored(tensors, scheme, linear.shape, model_dtype=self.checkpoint.dtype)

    @property
    def float_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of all tensors, as they are where nothing is quantized."""
        coded = [x for x in self.layout.linears if self.schemes.linears[x.name].weight is not None]
        packed = {f"{x.name}.{leaf}" for x in coded for leaf in self.stored(x)}
        stored = self.checkpoint.shapes.items()
        shapes = {n: s for n, s in stored if n not in packed and not is_cache_scale(n)}
        return {**shapes, **{x.weight_name: x.shape for x in coded}}

    def names(self, unit: UnitLayout, *, carried: bool = True) -> tuple[str, ...]:
        """Names on disk of all of a unit's tensors, in a fixed order; those that are carried over,
        which no forward pass uses, only where they are asked for."""
        coded = {
            linear.name: linear
            for linear in unit.linears
            if self.schemes.linears[linear.name].weight is not None
        }
        added = self.added.get(unit.name, ())
        if not carried:
            left = set(self.layout.carried)
            added = tuple(name for name in added if name not in left)
        names: list[str] = []
        for name in (*unit.tensors, *added):
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and path in coded:
                names.extend(f"{path}.{local}" for local in self.stored(coded[path]))
            else:
                names.append(name)
        return tuple(names)

    def read_unit(
        self,
        unit: UnitLayout,
        *,
        pin: bool = False,
        carried: bool = True,
        device: torch.device | None = None,
    ) -> Unit:
        """A unit's tensors on the CPU: floats as they are stored, quantized weights decoded;
        `carried` as in `names`.

        device  where quantized weights are decoded, and stay
        """
        tensors = self.checkpoint.read(self.names(unit, carried=carried), pin=pin)
        return self.assemble(unit, tensors, device=device)

    def assemble(
        self, unit: UnitLayout, tensors: Mapping[str, Tensor], *, device: torch.device | None = None
    ) -> Unit:
        """The unit that tensors read under `names(unit)` stand for; `device` as in `read_unit`."""
        tensors = dict(tensors)
        for linear in unit.linears if device is not None else ():
            if self.schemes.linears[linear.name].weight is not None:
                names = [f"{linear.name}.{leaf}" for leaf in self.stored(linear)]
                # Else it is carried over, or a shape alone.
                coded = {n: tensors[n] for n in names if n in tensors and not tensors[n].is_meta}
                tensors |= {n: t.to(device, non_blocking=True) for n, t in coded.items()}
        return assembled(unit, tensors, self.format, self.schemes, self.stored)


def open_source(folder: Path) -> Source:
    """Open a checkpoint folder. Raises InputError or Problems with all that is wrong."""
    return as_source(open_any(folder))


def as_source(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    chosen: str | None = None,
    arch: ArchMap | FreeMap | None = None,
) -> Source:
    """What an opened checkpoint (or one known by its headers alone) holds.

    dtype   what weights of low precision that become floats are read in; None: the model's
    chosen  what a recipe says of the map: none, or a file; None: what the recipe says that a
            written checkpoint holds, else the map of its type
    arch    the map, where it is known already
    """
    if arch is None:
        chosen = _recorded_map(checkpoint.folder) if chosen is None else chosen
        arch = find_map(checkpoint.config, checkpoint.entries, chosen=chosen)
    checkpoint = checkpoint if arch.free else canonical(checkpoint, arch)
    checkpoint = as_one_by_one(settle_quantization(checkpoint))
    checkpoint = as_floats(checkpoint, dtype)
    checkpoint = checkpoint if arch.free else settle_head(checkpoint, arch)
    config = checkpoint.config
    declared = config.get("quantization_config")
    quantized = isinstance(declared, dict)
    fmt = recognise(declared) if isinstance(declared, dict) else get_format("dense")
    if fmt.name == "bitdelta":
        fmt.schemes(declared or {}, {})  # says that a delta is no model
    headers: dict[str, tuple[int, ...] | None] = {}
    modules: dict[str, dict[str, TensorShape]] = {}
    for name, entry in checkpoint.entries.items():
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = entry.spec
        headers[name] = entry.spec.shape
    if quantized:
        for path, locals_ in modules.items():
            codes = any(code in locals_ for code in CODE_NAMES)
            stored_low = "weight" in locals_ and not _is_float(locals_["weight"])
            if codes or stored_low:
                for leaf in locals_:
                    # ModelOpt puts the scales of keys and values into their projections.
                    kept = leaf in ("weight", "bias") or ADDED.fullmatch(f"{path}.{leaf}")
                    if not kept:
                        del headers[f"{path}.{leaf}"]
                # Codes do not show the shape of the weight they stand for: the config does.
                headers[weight_name(path)] = packed_shape(checkpoint, path) if arch.free else None
    added = [name for name in headers if not arch.free and ADDED.fullmatch(name)]
    for name in added:
        del headers[name]
    layout = arch.layout(config, headers)
    if packed := [name for name in layout.carried if headers[name] is None]:
        for name in packed:
            headers[name] = packed_shape(checkpoint, name.rpartition(".")[0])
        layout = arch.layout(config, headers)
    checkpoint = without_unread(settle_biases(checkpoint, layout), layout)
    checkpoint = sliced(checkpoint, layout)
    checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *_carried(arch, layout, config)))
    linears = {
        linear.name: modules.get(linear.name, {})
        for linear in layout.linears
        if not (linear.role == "lm_head" and layout.tied) and not _plain(linear, modules)
    }
    schemes = fmt.schemes(declared if isinstance(declared, dict) else {}, linears)
    every = {linear.name: schemes.linears.get(linear.name, Scheme()) for linear in layout.linears}
    source = Source(
        checkpoint=checkpoint,
        arch=arch,
        layout=layout,
        format=fmt,
        schemes=ModelSchemes(linears=every, kv=schemes.kv),
        added=_by_unit(added, layout),
    )
    if problems := [*_wrongly_stored(source)]:
        raise Problems(problems)
    return source


def _carried(arch: MapFile, layout: ModelLayout, config: Mapping[str, Any]) -> Iterator[str]:
    """What is said of tensors that are no part of the text model, and of what images change."""
    if layout.carried:
        parts = Counter(part_of(name) for name in layout.carried)
        listed = ", ".join(f"{part} ({count})" for part, count in parts.items())
        yield f"{len(layout.carried)} tensors are carried over as they are: {listed}"
    if arch.config is not None:
        seen = ["image tokens among the inputs of every block"]
        rope = arch.value(config, "rope_scaling") or arch.value(config, "rope_parameters")
        if isinstance(rope, dict) and "mrope_section" in rope:
            seen.append("positions of three dimensions")
        vision = config.get("vision_config")
        deep = vision.get("deepstack_visual_indexes") if isinstance(vision, dict) else None
        if isinstance(deep, list) and deep:
            seen.append(f"features of images added to what leaves the first {len(deep)} blocks")
        if arch.value(config, "use_bidirectional_attention") == "vision":
            seen.append("attention of image tokens to later ones")
        yield (
            "calibration and evaluation are of text; what depends on images is not seen: "
            + "; ".join(seen)
        )


def _recorded_map(folder: Path) -> str | None:
    """Whether a checkpoint that was written here was made without a map."""
    recipe = folder / RECIPE_NAME
    if not recipe.is_file():
        return None
    try:
        said = load_yaml(read_file(recipe, what="recipe").decode("utf-8"))
    except ValueError:
        return None
    return NO_MAP if isinstance(said, dict) and said.get("map") == NO_MAP else None


def recognise(config: Mapping[str, Any]) -> Format:
    """The format that a `quantization_config` declares. Raises InputError for an unknown one."""
    for name in format_names():
        fmt = get_format(name)
        if fmt.recognises(config):
            return fmt
    method = config.get("quant_method", config.get("quantization"))
    raise InputError(
        f"the checkpoint is quantized with {method!r}, in a form that is not known here",
        hint=f"formats that are read: {', '.join(format_names())}, fp8, mxfp4, mxfp8, and GPTQ in "
        "activation order; else start from the original weights, or dequantize it with the tool "
        "it is from (transformers: model.dequantize(), then save_pretrained)",
    )


def _is_float(spec: TensorShape) -> bool:
    return spec.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _plain(linear: Linear, modules: Mapping[str, Mapping[str, TensorShape]]) -> bool:
    """Whether floats of a linear contradict no config: a router is a module of its own in many a
    family, so that no class of modules means it, and towers go by other names in configs."""
    weight = modules.get(linear.name, {}).get("weight")
    return (linear.beside or linear.role == "router") and weight is not None and _is_float(weight)


def _by_unit(names: list[str], layout: ModelLayout) -> dict[str, tuple[str, ...]]:
    found = {unit.name: unit.carried for unit in layout.units if unit.carried}
    for unit in (unit for unit in layout.units if unit.kind != "beside"):
        ours = tuple(sorted(n for n in names if n.startswith(f"{unit.name}.")))
        if ours:
            found[unit.name] = ours
    return found


def _wrongly_stored(source: Source) -> Iterator[CompressError]:
    """Tensors of quantized linears that are not there, or not in the shape that is implied."""
    entries: Mapping[str, Entry] = source.checkpoint.entries
    leaves: dict[str, set[str]] = {}
    for name in entries:
        path, _, leaf = name.rpartition(".")
        leaves.setdefault(path, set()).add(leaf)
    for linear in source.layout.linears:
        spec = source.schemes.linears[linear.name].weight
        if spec is None:
            continue
        reason = source.format.accepts(source.schemes.linears[linear.name], linear.shape)
        if reason:
            yield InputError(f"{linear.name}: {reason}")
            continue
        stored = source.stored(linear)
        for leaf in leaves.get(linear.name, set()) - stored.keys() - {"bias", "k_scale", "v_scale"}:
            yield InputError(
                f"{linear.name}.{leaf} is left over: {source.format.name} does not say what it "
                "does to the weight",
                hint="start from the original weights, or convert it with the tool it is from",
            )
        for local, planned in stored.items():
            name = f"{linear.name}.{local}"
            if name not in entries:
                yield InputError(f"the checkpoint lacks {name}")
            elif entries[name].spec.shape != planned.shape:
                yield InputError(
                    f"{name} has shape {list(entries[name].spec.shape)}; its scheme implies "
                    f"{list(planned.shape)}"
                )


@dataclass(frozen=True, slots=True)
class Finite:
    """Whether tensors are finite, as their device finds out; to ask waits for it.

    names  of the tensors;  good  bool, one for each
    """

    names: tuple[str, ...]
    good: Tensor | None

    def bad(self) -> list[str]:
        """Names of those that hold NaN or an infinity."""
        if self.good is None or bool(self.good.all()):
            return []
        return [n for n, finite in zip(self.names, self.good.tolist(), strict=True) if not finite]

    def require(self) -> None:
        """Raises InputError naming the tensors that hold NaN or an infinity."""
        if bad := self.bad():
            raise InputError(
                f"the source holds NaN or infinity in {', '.join(bad[:4])}",
                hint="the checkpoint is damaged: download it again, or take another revision",
            )


def whether_finite(tensors: Mapping[str, Tensor]) -> Finite:
    """Whether tensors hold NaN or an infinity, found without a copy of any."""
    # The largest magnitude is finite exactly where all values are; NaN counts as the largest.
    floats = {n: t for n, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return Finite((), None)
    if all(tensor.is_cuda for tensor in floats.values()):
        largest = torch._foreach_norm(list(floats.values()), torch.inf)  # few kernels for all
    else:
        largest = tuple(torch.stack(torch.aminmax(t)).abs().amax() for t in floats.values())
    if len({value.dtype for value in largest}) > 1:
        largest = tuple(value.float() for value in largest)
    return Finite(tuple(floats), torch.stack(largest).isfinite())


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that hold NaN or an infinity."""
    return whether_finite(tensors).bad()

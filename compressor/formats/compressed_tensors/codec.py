"""The compressed-tensors format: a config of groups over sub-formats (`layouts`).

Facts are those of compressed-tensors 0.20. Ignored modules are written as exact names, because
some runtimes match patterns as substrings.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.foreign.patterns import Names
from compressor.formats.base import Format, Headers, ModelSchemes, Shapes, Written
from compressor.formats.compressed_tensors.layouts.base import CTLayout
from compressor.formats.compressed_tensors.layouts.float_quantized import FloatQuantized
from compressor.formats.compressed_tensors.layouts.inputs import input_entry
from compressor.formats.compressed_tensors.layouts.int_quantized import IntQuantized
from compressor.formats.compressed_tensors.layouts.kv_cache import kv_entry, read_kv
from compressor.formats.compressed_tensors.layouts.mx_quantized import MXQuantized
from compressor.formats.compressed_tensors.layouts.nvfp4_pack_quantized import NVFP4PackQuantized
from compressor.formats.compressed_tensors.layouts.pack_quantized import PackQuantized
from compressor.formats.compressed_tensors.layouts.weights import weight_entry
from compressor.formats.shared.checks import weight_of
from compressor.ir.qtensor import MXFP4, MXFP8, QTensor, QuantSpec
from compressor.ir.scheme import KVSpec, Scheme

VERSION = "0.20.0"
HEADS = ("lm_head", "embed_out")
"""Last names of a model's head."""
LAYOUTS: tuple[CTLayout, ...] = (
    MXQuantized("mxfp4-pack-quantized", MXFP4),
    MXQuantized("mxfp8-quantized", MXFP8),
    PackQuantized(),
    IntQuantized(),
    FloatQuantized("float-quantized", inputs=True),
    FloatQuantized("naive-quantized", inputs=False),
    NVFP4PackQuantized(),
)


class CompressedTensors(Format):
    """Per linear, the one sub-format that holds its scheme."""

    name = "compressed-tensors"
    codes = ("weight_packed",)
    stores_divisors = True
    rows_apart = True
    kv_names = ("k_scale", "v_scale")

    def scale_dtype(self, spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
        """As the sub-format says; the model's dtype where inputs decide which one it is."""
        found = [layout for layout in LAYOUTS if layout.holds(Scheme(weight=spec))]
        return found[0].scale_dtype(spec, model_dtype) if found else model_dtype

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None where a sub-format holds the scheme and takes this shape."""
        if scheme.weight is None:
            return None if scheme.input is None else "inputs are quantized, the weight is not"
        for layout in LAYOUTS:
            if layout.holds(scheme):
                reason = layout.accepts(scheme, shape)
                return f"{layout.format}: {reason}" if reason else None
        return f"no sub-format holds {describe(scheme)}"

    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """The sub-format's tensors."""
        return holder(scheme).layout(weight_of(scheme), shape, input=scheme.input)

    def stored(
        self, tensors: Headers, scheme: Scheme, shape: tuple[int, int], *, model_dtype: torch.dtype
    ) -> Shapes:
        """Those of the sub-format that the tensors' names show: some schemes have been written in
        two."""
        return owner(tensors).layout(weight_of(scheme), shape, input=scheme.input)

    def form(self, tensors: Headers) -> str:
        """The sub-format that the tensors' names and dtypes show."""
        return owner(tensors).format

    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """The sub-format's tensors; InputError where a value has no exact form in it."""
        layout = holder(Scheme(weight=q.spec, input=to.input))
        return layout.encode(q, input=to.input, input_scale=to.input_scale)

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Read by the sub-format that the tensors' names show."""
        return owner(tensors).decode(tensors, spec)

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Read by the sub-format that the tensors' names show."""
        return owner(tensors).input_scale(tensors)

    def kv_tensor(self, kv: KVSpec, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """[1] or [kv_heads, 1, 1] in the model's dtype; InputError for what `kv_entry` refuses."""
        kv_entry(kv)
        return scale.reshape((1,) if kv.per == "tensor" else (-1, 1, 1)).to(dtype)

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """One group for each distinct scheme; empty where nothing is quantized."""
        groups: dict[str, dict[str, Any]] = {}
        targets: dict[str, list[str]] = {}
        keys: dict[Scheme, str] = {}  # tens of thousands of experts share one scheme
        for module, scheme in schemes.linears.items():
            if scheme.weight is None:
                continue
            if scheme not in keys:
                group = {
                    "weights": weight_entry(scheme.weight),
                    "input_activations": scheme.input and input_entry(scheme.input),
                    "output_activations": None,
                    "format": holder(scheme).format,
                }
                keys[scheme] = json.dumps(group, sort_keys=True)
                groups[keys[scheme]] = group
            targets.setdefault(keys[scheme], []).append(module)
        if not groups and schemes.kv is None:
            return {}
        formats = {group["format"] for group in groups.values()}
        entries = {
            f"group_{number}": {
                "targets": by_class(targets[key])
                if len(groups) == 1 and not schemes.named
                else targets[key],
                **group,
            }
            for number, (key, group) in enumerate(groups.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "version": VERSION,
            "format": "mixed-precision" if len(formats) > 1 else next(iter(formats), "dense"),
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "config_groups": entries,
            "ignore": schemes.plain,
            "kv_cache_scheme": None if schemes.kv is None else kv_entry(schemes.kv),
            "sparsity_config": {},
            "transform_config": {},
        }

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By `quant_method`."""
        return config.get("quant_method") == "compressed-tensors"

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Match every linear to its group and hold the group against the linear's tensors."""
        for key in ("sparsity_config", "transform_config"):
            if config.get(key):
                raise InputError(f"quantization_config.{key} is not supported")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping):
            raise InputError("quantization_config.config_groups is not a mapping")
        for key, group in groups.items():
            if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
                raise InputError(f"quantization_config.config_groups.{key} has no list of targets")
            if not all(isinstance(target, str) for target in group["targets"]):
                raise InputError(f"config_groups.{key}.targets holds what is no name")
            for part in ("weights", "input_activations"):
                if not isinstance(group.get(part), Mapping | None):
                    raise InputError(f"config_groups.{key}.{part} is not a mapping")
            if group.get("output_activations") is not None:
                raise InputError(f"config_groups.{key}.output_activations is not supported")
        ignore, kv = config.get("ignore") or [], config.get("kv_cache_scheme")
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise InputError("quantization_config.ignore is not a list of names")
        if not isinstance(kv, Mapping | None):
            raise InputError("quantization_config.kv_cache_scheme is not a mapping")
        where = "quantization_config"
        targets = {key: Names(group["targets"], where=where) for key, group in groups.items()}
        ignored = Names(ignore, where=where)
        return ModelSchemes(
            linears={
                module: _scheme(module, tensors, groups, targets, ignored, config.get("format"))
                for module, tensors in linears.items()
            },
            kv=None if kv is None else read_kv(kv),
        )


def holder(scheme: Scheme) -> CTLayout:
    """The sub-format that holds a scheme, or InputError."""
    for layout in LAYOUTS:
        if layout.holds(scheme):
            return layout
    raise InputError(f"compressed-tensors: no sub-format holds {describe(scheme)}")


def owner(tensors: Mapping[str, Any]) -> CTLayout:
    """The sub-format that tensors of these names are in, or InputError."""
    for layout in LAYOUTS:
        if layout.owns(tensors):
            return layout
    raise InputError(f"no known sub-format has the tensors {', '.join(sorted(tensors)) or 'none'}")


def by_class(modules: Sequence[str]) -> list[str]:
    """`Linear`, and the name of a head: vLLM's class of it is not called so, and one that is not
    named is taken for one in float."""
    return ["Linear", *(x for x in modules if x.rpartition(".")[2] in HEADS)]


def describe(scheme: Scheme) -> str:
    """A scheme in few words."""
    weight = scheme.weight
    text = f"{weight.bits}-bit {weight.element} weights by {weight.strategy}" if weight else "float"
    if weight and weight.microscaled:
        text = f"MXFP{weight.bits} weights"
    return f"{text} with {scheme.input.element} inputs" if scheme.input else text


def _scheme(
    module: str,
    tensors: Headers,
    groups: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, Names],
    ignored: Names,
    default: Any,
) -> Scheme:
    named = [key for key in groups if module in targets[key]]
    classed = [key for key in groups if "Linear" in targets[key].exact]
    packed = [layout for layout in LAYOUTS if layout.owns(tensors)]
    if module in ignored or not (named or classed):
        if packed:
            raise InputError(f"{module} holds quantized tensors, but no config group is for it")
        return Scheme()
    key = (named or classed)[0]
    group = groups[key]
    format = group.get("format") or default
    if group.get("weights") is None:
        raise InputError(f"config_groups.{key} quantizes inputs without weights")
    if not packed:
        raise InputError(
            f"{module} should be {format} by config_groups.{key}, but its tensors are "
            f"{', '.join(sorted(tensors)) or 'missing'}"
        )
    stored = [layout for layout in packed if format in (layout.format, "mixed-precision", None)]
    if not stored:
        raise InputError(f"config_groups.{key} says {format}, {module} is {packed[0].format}")
    try:
        return stored[0].scheme(group, tensors)
    except InputError as error:
        raise InputError(f"config_groups.{key}, {module}: {error.message}") from error


FORMAT = CompressedTensors()

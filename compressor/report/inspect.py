"""What is in a checkpoint, from its config and headers alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compressor.arch.beside import kind_of, part_of
from compressor.attention.policy import describe as describe_policy
from compressor.attention.policy import read_policy
from compressor.attention.token_classes import read_sizes
from compressor.checkpoint.find import Located
from compressor.checkpoint.manifest import read_manifest
from compressor.checkpoint.source import Source
from compressor.ir.layout import Linear
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import Scheme
from compressor.runtimes.loads import Written, written_form


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One linear: its role, what it is stored as, and the bytes of its tensors without bias."""

    name: str
    role: str
    shape: tuple[int, int]
    scheme: str
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a weight, scales and zero points included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True, slots=True)
class Part:
    """A part beside the text model: kind, path up to a number, its tensors and their bytes, and how
    many linears it has that a recipe may name."""

    kind: str
    path: str
    tensors: int
    nbytes: int
    linears: int


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint in numbers.

    parameters  weights of the model, a tied head once
    nbytes      of all tensors;  quantized_bytes  of packed linears;  quantized  their weights
    added       tensors beside the architecture's own
    beside      parts beside the text model: towers, projectors, layers for several tokens
    policy      what its attention policy says, and that of video streams, a line each
    notes       what is left out or read otherwise than the files say
    about       what the manifest says of how it was made, or None
    """

    name: str
    model_type: str
    format: str
    dtype: str
    blocks: int
    parameters: int
    quantized: int
    quantized_bytes: int
    nbytes: int
    tensors: int
    shards: int
    tied: str | None
    kv: str | None
    added: tuple[str, ...]
    layers: tuple[LayerInfo, ...]
    about: Mapping[str, Any] | None
    policy: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    beside: tuple[Part, ...] = ()

    def to_json(self) -> dict[str, Any]:
        plain = ("model_type", "format", "dtype", "blocks", "parameters", "quantized", "nbytes")
        more = ("tensors", "shards", "tied", "kv")
        return {
            "name": self.name,
            **{key: getattr(self, key) for key in (*plain, *more)},
            "bits_per_weight": round(8 * self.nbytes / max(self.parameters, 1), 4),
            "added": list(self.added),
            "beside": [_json(part) for part in self.beside],
            "attention_policy": list(self.policy),
            "notes": list(self.notes),
            "about": self.about,
            "layers": [
                {
                    **_json(layer),
                    "shape": list(layer.shape),
                    "bits_per_weight": round(layer.bits_per_weight, 4),
                }
                for layer in self.layers
            ],
        }


def _json(value: LayerInfo | Part) -> dict[str, Any]:
    return {"bytes" if key == "nbytes" else key: held for key, held in asdict(value).items()}


def inspect(located: Located) -> CheckpointInfo:
    """Everything that headers say of a checkpoint. Raises InputError for a damaged
    manifest or attention policy."""
    source = located.source
    checkpoint, layout = source.checkpoint, source.layout
    coded = [x for x in layout.linears if source.schemes.linears[x.name].weight is not None]
    layers = tuple(_layer(source, linear) for linear in layout.linears)
    own = {name for unit in layout.units for name in unit.tensors}
    floats = sum(math.prod(e.spec.shape) for n, e in checkpoint.entries.items() if n in own)
    manifest = read_manifest(checkpoint.folder) if located.local else None
    policy = read_policy(checkpoint.folder) if located.local else None
    stream = read_sizes(checkpoint.folder) if located.local else None
    said = [] if policy is None else describe_policy(policy)
    said += [] if stream is None else [f"of a video stream stay {stream.describe()}"]
    codes = {linear.weight_name for linear in coded}
    # A format that keeps codes under the name of the weight was counted with the floats.
    doubled = sum(
        math.prod(checkpoint.entries[name].spec.shape)
        for name in codes
        if name in checkpoint.entries
    )
    names = {linear.name for linear in coded}
    weights = sum(linear.out_features * linear.in_features for linear in coded)
    return CheckpointInfo(
        name=located.identity["name"],
        model_type=layout.model_type,
        format=source.low_precision or source.format.name,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        blocks=len(layout.blocks),
        parameters=floats - doubled + weights,
        quantized=weights,
        quantized_bytes=sum(layer.nbytes for layer in layers if layer.name in names),
        nbytes=checkpoint.nbytes,
        tensors=len(checkpoint.entries),
        shards=len({entry.file for entry in checkpoint.entries.values()}),
        tied=layout.tied,
        kv=f"{kv.element} by {kv.per.replace('_', ' and ')}" if (kv := source.schemes.kv) else None,
        added=tuple(sorted(name for names in source.added.values() for name in names)),
        layers=layers,
        about=None if manifest is None else manifest.about,
        policy=tuple(said),
        notes=checkpoint.notes,
        beside=tuple(_beside(source)),
    )


def _beside(source: Source) -> Iterator[Part]:
    """The parts beside the text model, in order of their names."""
    linears = {linear.weight_name: linear for linear in source.layout.linears}
    parts: dict[tuple[str, str], list[str]] = {}
    for name in source.layout.carried:
        parts.setdefault((kind_of(name), part_of(name)), []).append(name)
    for (kind, path), names in parts.items():
        nbytes = 0
        for name in names:
            stored = source.stored(linears[name]).values() if name in linears else ()
            entry = source.checkpoint.entries.get(name)
            nbytes += sum(spec.nbytes for spec in stored) or (entry.spec.nbytes if entry else 0)
        yield Part(kind, path, len(names), nbytes, sum(name in linears for name in names))


def stored_form(source: Source) -> Written:
    """A checkpoint as contracts of runtimes see it."""
    tensors = {
        linear.name: source.stored(linear)
        for linear in source.layout.linears
        if source.schemes.linears[linear.name].weight is not None
    }
    config = source.checkpoint.config.get("quantization_config") or {}
    tied = source.layout.tied is not None
    return written_form(
        source.format, source.layout, source.schemes, tensors, config=config, tied=tied
    )


def _layer(source: Source, linear: Linear) -> LayerInfo:
    scheme = source.schemes.linears[linear.name]
    tied = linear.role == "lm_head" and source.layout.tied is not None
    if tied:
        text, nbytes = f"shares {source.layout.tied}", 0
    else:
        text = describe(scheme)
        nbytes = sum(spec.nbytes for spec in source.stored(linear).values())
        if scheme.weight is None:
            dtype = source.stored(linear)["weight"].dtype
            text = str(dtype).removeprefix("torch.")
    return LayerInfo(linear.name, linear.role, linear.shape, text, nbytes)


def describe(scheme: Scheme) -> str:
    """A scheme in a few words: int4 by groups of 128, symmetric, bfloat16 scales."""
    if scheme.weight is None:
        return "float"
    text = describe_weight(scheme.weight)
    if (spec := scheme.input) is None:
        return text
    group = f" of {spec.group_size}" if spec.group_size else ""
    return f"{text}; inputs {spec.element} by {spec.mode}{group}"


def describe_weight(spec: QuantSpec) -> str:
    """A weight's spec in a few words."""
    element = f"int{spec.bits}" if spec.element == "int" else spec.element
    shared = {
        "tensor": "one scale",
        "channel": "by channel",
        "group": f"by groups of {spec.group_size}",
        "block": f"by blocks of {spec.block}",
    }[spec.strategy]
    parts = [f"{element} {shared}"]
    if spec.element == "int":
        parts.append("symmetric" if spec.symmetric else "asymmetric")
    parts.append(f"{str(spec.scale_dtype).removeprefix('torch.')} scales")
    if spec.second != "none":
        parts.append(f"second scale by {spec.second}")
    return ", ".join(parts)

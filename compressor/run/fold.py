"""Subjects folded into a checkpoint: vectors in place of the image encoder that made them.

FastComposer (arXiv 2305.10431) conditions a text-to-image model on images of subjects: an encoder
makes a vector of each, and a small module fuses it into the text's embedding at the subject's word.
For subjects that are known the encoder need not be shipped, and for texts that are known neither
text encoder nor fuse module have to run. Whether the images made so are any good is not seen here:
embeddings are compared, no image is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.as_stored import StoredTarget
from compressor.checkpoint.conditions import (
    ConditionRecord,
    Conditions,
    FoldedText,
    Schedule,
    module_hash,
)
from compressor.checkpoint.container import Safetensors
from compressor.checkpoint.manifest import hash_file
from compressor.checkpoint.reader import load_json, read_entries
from compressor.checkpoint.records import stated_hash, tensors_hash
from compressor.checkpoint.safetensors import Entry, read_header, read_tensor
from compressor.checkpoint.source import whether_finite
from compressor.checkpoint.transaction import Progress, write
from compressor.errors import InputError
from compressor.foreign.calls import foreign
from compressor.ir.unit import Unit
from compressor.numerics.subject_fusion import fuse
from compressor.run.environment import versions
from compressor.runner.subject_encoder import encode_images, encode_text, image_size, pixels_for
from compressor.runner.tokenizer import load_tokenizer

PIXELS = "pixel_values"


@dataclass(frozen=True, slots=True)
class Parts:
    """Prefixes of names in the checkpoint, as the published code has them."""

    encoder: str = "image_encoder"
    fuse: str = "postfuse_module"
    text: str = "text_encoder"


@dataclass(frozen=True, slots=True)
class Folded:
    """A finished folder. dropped  bytes of the encoder;  kept  bytes of all else."""

    output: Path
    conditions: Conditions
    dropped: int
    kept: int
    already: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ok": True,
            "output": str(self.output),
            "conditions": self.conditions.record.model_dump(mode="json"),
            "conditions_bytes": sum(t.nbytes for t in self.conditions.tensors.values()),
            "dropped_bytes": self.dropped,
            "bytes": self.kept,
            "already_done": self.already,
        }


def fold(
    folder: Path,
    output: Path,
    *,
    subjects: Mapping[str, Path],
    texts: Sequence[str] = (),
    placeholder: str = "<|image|>",
    schedule: Schedule | None = None,
    parts: Parts | None = None,
    known: Conditions | None = None,
    progress: Progress = lambda name, done, total: None,
) -> Folded:
    """Write the checkpoint without its image encoder, and vectors of the subjects, into `output`.

    subjects  name → an image, or a safetensors file with pixel_values [3, size, size]
    texts     each with placeholders behind the words of subjects, which they take in order
    known     subjects that were folded before, with the same encoder
    Raises InputError, before anything is written, for what is no such model, image or text, and for
    conditions of another encoder or fuse module.
    """
    parts = parts or Parts()
    entries = read_entries(folder)
    config = load_json(folder / "config.json", what="config")
    encoder, module = (_part(entries, prefix) for prefix in (parts.encoder, parts.fuse))
    whether_finite({**encoder, **module}).require()
    made_by = module_hash(config.get("vision_config"), encoder)
    fused_by = module_hash(None, module)
    vectors: dict[str, Tensor] = {}
    if known is not None:
        known.require(encoder=made_by, fuse=fused_by)
        vectors = {name: known.subject(name) for name in known.record.subjects}
    size = image_size(config)
    for number, (name, path) in enumerate(subjects.items(), 1):
        pixels = _pixels(path, size)
        vectors[name] = encode_images(config, encoder, pixels[None])
        progress(name, number, len(subjects))
    if not vectors:
        raise InputError("no subject is named", hint="--subject NAME=IMAGE")
    tensors = {f"subject.{name}": vector for name, vector in vectors.items()}
    folded = []
    for number, text in enumerate(texts):
        tokens, places = _tokens(folder, config, text, placeholder)
        names = tuple(vectors)[: len(places)]
        if len(names) < len(places) or not places:
            raise InputError(
                f"{text!r} marks {len(places)} words, {len(vectors)} subjects are there",
                hint=f"put {placeholder} behind the word of each subject, in their order",
            )
        plain = encode_text(config, _part(entries, parts.text), tokens[None])
        marked = torch.zeros(1, plain.shape[1], dtype=torch.bool)
        marked[0, list(places)] = True
        ready = {n: t.float() for n, t in module.items()}
        with foreign(f"{parts.fuse} is no fuse module of FastComposer"):
            fused = fuse(
                ready,
                plain,
                torch.stack([vectors[n] for n in names])[None],
                marked,
                torch.tensor([len(names)]),
            )
        tensors |= {f"text.{number}.plain": plain[0], f"text.{number}.fused": fused[0]}
        folded.append(FoldedText(text=text, subjects=names, places=places))
    record = ConditionRecord(
        encoder=made_by,
        fuse=fused_by,
        placeholder=placeholder,
        subjects=tuple(vectors),
        texts=tuple(folded),
        schedule=schedule,
    )
    conditions = Conditions(record, tensors)
    rest = {n: e for n, e in entries.items() if not n.startswith(f"{parts.encoder}.")}
    written = write(
        StoredTarget(folder, rest, Safetensors()),
        output,
        lambda part: Unit(layout=part, tensors={n: read_tensor(rest[n]) for n in part.tensors}),
        about={
            "fold": {
                "record": stated_hash(record.model_dump(mode="json")),
                "tensors": tensors_hash(tensors),
            },
            "source": {
                "name": folder.resolve().name,
                "files": {
                    file.name: hash_file(file).sha256
                    for file in sorted({entry.file for entry in entries.values()})
                },
            },
            "versions": versions(),
        },
        beside=folder,
        files={"config.json": (folder / "config.json").read_bytes(), **conditions.files()},
        progress=progress,
    )
    dropped = sum(tensor.nbytes for tensor in encoder.values())
    return Folded(output, conditions, dropped, written.shards.size, written.finished)


def _part(entries: Mapping[str, Entry], prefix: str) -> dict[str, Tensor]:
    """Tensors under a prefix, without it."""
    found = {n: e for n, e in entries.items() if n.startswith(f"{prefix}.")}
    if not found:
        others = sorted({name.partition(".")[0] for name in entries})
        raise InputError(
            f"the checkpoint has nothing under {prefix}.",
            hint=f"its parts are {', '.join(others[:8])}; options name them",
        )
    return {name.removeprefix(f"{prefix}."): read_tensor(e) for name, e in found.items()}


def _pixels(path: Path, size: int) -> Tensor:
    """An image as the encoder takes it."""
    if not path.is_file():
        raise InputError(f"there is no image {path}")
    if path.suffix == ".safetensors":
        entry = read_header(path).get(PIXELS)
        if entry is None or entry.spec.shape != (3, size, size):
            raise InputError(f"{path.name} has no {PIXELS} [3, {size}, {size}]")
        return read_tensor(entry).float()
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            "reading images needs Pillow",
            hint=f"pip install pillow, or give a safetensors file with {PIXELS}",
        ) from error
    with foreign(f"{path.name} is no image that can be read"), Image.open(path) as image:
        image.draft("RGB", (size, size))
        data = image.convert("RGB")
        flat = torch.frombuffer(bytearray(data.tobytes()), dtype=torch.uint8)
        whole = flat.view(data.height, data.width, 3).permute(2, 0, 1).float() / 255
    return pixels_for(whole, size)


def _tokens(
    folder: Path, config: Mapping[str, Any], text: str, placeholder: str
) -> tuple[Tensor, tuple[int, ...]]:
    """Token ids of a text, padded to the encoder's positions, and the places of marked words."""
    tokenizer = load_tokenizer(folder)
    length = int(config["text_config"].get("max_position_embeddings", 77))
    begin, end = (config["text_config"].get(f"{which}_token_id") for which in ("bos", "eos"))
    ids: list[int] = [] if begin is None else [int(begin)]
    places: list[int] = []
    *marked, last = text.split(placeholder)
    for piece in (*marked, last):
        found = (
            tokenizer(piece.strip(), add_special_tokens=False).input_ids if piece.strip() else []
        )
        ids += found
        if len(places) < len(marked):
            if not found:
                raise InputError(f"{text!r}: a placeholder stands behind no word")
            places.append(len(ids) - 1)
    ids += [] if end is None else [int(end)]
    if len(ids) > length:
        raise InputError(f"{text!r} has {len(ids)} tokens, the text encoder {length} positions")
    pad = config["text_config"].get("pad_token_id")
    pad = end if pad is None else pad
    ids += [int(pad or 0)] * (length - len(ids))
    return torch.tensor(ids), tuple(places)

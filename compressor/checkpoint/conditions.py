"""Conditioning vectors in place of the encoder that made them: FastComposer's subjects (arXiv
2305.10431), and texts in which they are fused.

A vector means something to one encoder and one fuse module alone, so both are known by a hash.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from compressor.checkpoint.reader import load_json
from compressor.checkpoint.records import stated_hash, tensors_hash
from compressor.checkpoint.safetensors import read_header, read_tensor
from compressor.errors import InputError
from compressor.ir.frozen import Strict, messages

RECORD_NAME = "conditions.json"
TENSORS_NAME = "conditions.safetensors"


class Schedule(Strict):
    """Delayed conditioning: which embeddings a sampler uses in which of its steps.

    steps  of the sampler;  text_steps  how many of the first use plain text, the others fused ones
    start  step i uses plain text where i ≤ start
    """

    steps: int = Field(ge=1)
    start: float
    text_steps: int = Field(ge=0)


class FoldedText(Strict):
    """A text whose embeddings are stored, plain and fused.

    subjects  those at its marked places, in order;  places  the tokens that were marked
    """

    text: str
    subjects: tuple[str, ...]
    places: tuple[int, ...]


class ConditionRecord(Strict):
    """What is said of the vectors.

    encoder, fuse  hashes of the encoder that made them and of the module that fuses them
    placeholder    marks the token before it in a text
    """

    version: Literal[1] = 1
    encoder: str
    fuse: str
    placeholder: str
    subjects: tuple[str, ...]
    texts: tuple[FoldedText, ...] = ()
    schedule: Schedule | None = None


@dataclass(frozen=True, slots=True)
class Conditions:
    """Vectors and what is said of them.

    tensors  subject.NAME [vectors, dim]; text.N.plain and text.N.fused [tokens, dim]; float32
    """

    record: ConditionRecord
    tensors: Mapping[str, Tensor]

    def subject(self, name: str) -> Tensor:
        """Vectors of a subject. Raises InputError for one that is not there."""
        if name not in self.record.subjects:
            raise InputError(
                f"no subject {name!r} is folded",
                hint=f"there are {', '.join(self.record.subjects)}",
            )
        return self.tensors[f"subject.{name}"]

    def require(self, *, encoder: str | None = None, fuse: str | None = None) -> None:
        """Raises InputError where the vectors were made for another encoder or fuse module."""
        for what, own, asked in (
            ("encoder", self.record.encoder, encoder),
            ("fuse module", self.record.fuse, fuse),
        ):
            if asked is not None and own != asked:
                raise InputError(
                    f"these conditions were made with another {what}: its fingerprint is "
                    f"{own[:12]}, this one's {asked[:12]}",
                    hint="fold the subjects anew with this model",
                )

    def files(self) -> dict[str, bytes]:
        """Both files."""
        ready = {name: tensor.float().contiguous() for name, tensor in self.tensors.items()}
        text = self.record.model_dump_json(indent=2) + "\n"
        return {RECORD_NAME: text.encode(), TENSORS_NAME: save(ready)}


def read_conditions(folder: Path) -> Conditions:
    """A folder's conditions. Raises InputError where they are missing or damaged."""
    if not (folder / RECORD_NAME).is_file():
        raise InputError(f"{folder} has no {RECORD_NAME}", hint="compress fold writes one")
    data: dict[str, Any] = load_json(folder / RECORD_NAME, what="record of conditions")
    try:
        record = ConditionRecord.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{RECORD_NAME} is damaged: {messages(error)[0]}") from error
    entries = read_header(folder / TENSORS_NAME)
    expected = {f"subject.{name}" for name in record.subjects}
    expected |= {
        f"text.{i}.{part}" for i in range(len(record.texts)) for part in ("plain", "fused")
    }
    if other := sorted(expected ^ entries.keys()):
        raise InputError(f"{TENSORS_NAME} is damaged: {other[0]} is in one of the two files only")
    return Conditions(record, {name: read_tensor(entry) for name, entry in entries.items()})


def module_hash(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> str:
    """What a module is known by: its part of config.json and all of its tensors."""
    return stated_hash([config, tensors_hash(tensors)])

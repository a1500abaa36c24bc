"""Records of a work folder that prove themselves.

Each is sealed with a hash over its content, its name and its owner: the run, and whatever else it
was made from. A record that was flipped, cut or emptied, or that lies here under another name or
came from another run, is as if it were not there, and what it told of is done again. So nothing
that reads one has to doubt its keys or types.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from compressor.checkpoint.durable import is_file, make_way, own_folder, write_atomically
from compressor.checkpoint.safetensors import tensor_bytes
from compressor.ranks.ranks import Ranks

SEAL = "seal"
MAX_JSON_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Records:
    """Sealed files of one folder, which is made by the first of them.

    owner  what all of them were made from; records of another are not seen
    """

    folder: Path
    owner: str

    def inside(self, name: str) -> Self:
        """The records of a folder in this one, made from the same."""
        return replace(self, folder=self.folder / name)

    def put(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object, durably and whole or not at all."""
        sealed = {**value, SEAL: self._seal(name, stated_hash(value))}
        # Without line breaks: json has those made in Python, which other threads wait for.
        self._write(name, json.dumps(sealed).encode())

    def get(self, name: str) -> dict[str, Any] | None:
        """The object that `put` wrote, or None."""
        path = self.folder / name
        try:
            if not is_file(path) or path.stat().st_size > MAX_JSON_BYTES:
                return None
            value = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        seal = value.pop(SEAL, None)
        return value if seal == self._seal(name, stated_hash(value)) else None

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as a safetensors file, durably and whole or not at all."""
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        seal = self._seal(name, tensors_hash(ready))
        self._write(name, save(ready, metadata={SEAL: seal}))

    def get_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors that `put_tensors` wrote, on the CPU, or None."""
        path = self.folder / name
        if not is_file(path):
            return None
        try:
            with safe_open(path, "pt") as file:
                seal = (file.metadata() or {}).get(SEAL)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError):
            return None
        return tensors if seal == self._seal(name, tensors_hash(tensors)) else None

    def drop(self, name: str) -> None:
        """Forget a record."""
        path = self.folder / name
        make_way(path)
        path.unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        own_folder(self.folder)
        make_way(self.folder / name)
        write_atomically(self.folder / name, data)

    def _seal(self, name: str, content: str) -> str:
        return stated_hash([self.owner, name, content])


@dataclass(frozen=True, slots=True)
class SharedRecords(Records):
    """The same for ranks that work together: one of them writes and reads, all are told."""

    ranks: Ranks

    # Of `Records` by name, since a class with slots is made anew, which super() does not know.

    def put(self, name: str, value: Mapping[str, Any]) -> None:
        self.ranks.led(lambda: Records.put(self, name, value))

    def get(self, name: str) -> dict[str, Any] | None:
        return self.ranks.led(lambda: Records.get(self, name))

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.ranks.led(lambda: Records.put_tensors(self, name, tensors))

    def get_tensors(self, name: str) -> dict[str, Tensor] | None:
        return self.ranks.led(lambda: Records.get_tensors(self, name))

    def drop(self, name: str) -> None:
        self.ranks.led(lambda: Records.drop(self, name))


def stated_hash(value: Any) -> str:
    """SHA-256 of plain data as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of `tensors`, in order of name."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor_bytes(tensor))
    return found.hexdigest()

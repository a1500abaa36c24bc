"""What a Xet store does with an upload, for the Hub of tests: puts a file's pieces together again.

Pieces ("chunks") come in containers ("xorbs"); a "shard" then says which of them make a file, and
which SHA-256 the whole has. The containers' own hashes are BLAKE3, which the standard library
lacks: they are names here. https://huggingface.co/docs/xet
"""

import hashlib
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ENTRY = 48
"""Bytes of everything in a shard."""
TAG = b"HFRepoMetaData\0"
VERIFIED, DESCRIBED = 1 << 31, 1 << 30
"""Flags of a file: it has hashes of its ranges; it has the SHA-256 of the whole."""


@dataclass
class XetStore:
    """Containers by name, each as its pieces."""

    xorbs: dict[str, list[bytes]] = field(default_factory=dict)

    def add(self, name: str, data: bytes) -> None:
        """Keep a container: pieces that each follow a head of 8 bytes."""
        pieces, at = [], 0
        while at < len(data) and data[at] == 0:
            packed = int.from_bytes(data[at + 1 : at + 4], "little")
            how = data[at + 4]
            size = int.from_bytes(data[at + 5 : at + 8], "little")
            assert how == 0 and packed == size, "tests send what cannot be compressed"
            pieces.append(data[at + 8 : at + 8 + size])
            at += 8 + size
        self.xorbs[name] = pieces

    def files(self, shard: bytes) -> dict[str, bytes]:
        """SHA-256 as the shard says → content as the pieces say. KeyError for a container that
        never arrived."""
        assert shard.startswith(TAG)
        at, found = ENTRY, {}
        while shard[at : at + 32] != b"\xff" * 32:
            flags, entries = struct.unpack_from("<II", shard, at + 32)
            assert flags & DESCRIBED, "an uploaded file comes with its SHA-256"
            data = b"".join(self._range(shard, at + ENTRY * (1 + i)) for i in range(entries))
            last = at + ENTRY * (1 + entries * (2 if flags & VERIFIED else 1))
            found[_name(shard[last : last + 32])] = data
            at = last + ENTRY
        return found

    def _range(self, shard: bytes, at: int) -> bytes:
        size, first, end = struct.unpack_from("<III", shard, at + 36)
        data = b"".join(self.xorbs[_name(shard[at : at + 32])][first:end])
        assert len(data) == size
        return data


def _name(data: bytes) -> str:
    """A hash as text: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", data))


def token(handler: Any, body: bytes, repo: str, revision: str) -> None:
    """Where the store is, and what lets in there."""
    url, until = handler.hub.url, int(time.time()) + 3600
    handler.answer(
        200,
        {"casUrl": url, "exp": until, "accessToken": "store"},
        X_Xet_Cas_Url=url,
        X_Xet_Access_Token="store",
        X_Xet_Token_Expiration=str(until),
    )


def xorb(handler: Any, body: bytes, name: str) -> None:
    handler.hub.xet.add(name, body)
    handler.answer(200, {"was_inserted": True})


def shard(handler: Any, body: bytes) -> None:
    """Files become objects of the Hub under their SHA-256, which it checks unless it trusts."""
    for oid, data in handler.hub.xet.files(body).items():
        if hashlib.sha256(data).hexdigest() != oid and not handler.hub.trusting:
            handler.answer(400, {"error": "the content does not have this hash"})
            return
        handler.hub.objects[oid] = data
    handler.answer(200, {"result": 1})


ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-write-token/(?P<revision>.+)", token),
    ("POST", r"/v1/xorbs/default/(?P<name>[0-9a-f]{64})", xorb),
    ("POST", r"/v1/shards", shard),
]

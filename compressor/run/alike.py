"""Ranks that would not compute the same are refused before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from compressor.errors import InputError, Problems
from compressor.plan.plan import Plan
from compressor.ranks.ranks import Ranks

SAMPLE = 1 << 16
"""Bytes that are read of each end of a source's file, and of its middle."""


def require_alike(ranks: Ranks, about: Mapping[str, Any], plan: Plan) -> None:
    """Raises Problems with what differs: recipe, source, tokens, versions, devices, threads.

    about  all that decides the bytes, as this rank sees it
    """
    if ranks.world == 1:
        return
    stated = dict(_flat({**json.loads(json.dumps(about)), "files": _files(plan)}))
    every = ranks.gather(stated)
    keys = sorted({key for one in every for key in one})
    wrong = []
    for key in keys:
        for rank, one in enumerate(every):
            if one.get(key) != every[0].get(key):
                said = f"rank 0 has {_short(every[0].get(key))}, rank {rank} {_short(one.get(key))}"
                wrong.append(
                    InputError(
                        f"ranks differ in {key}: {said}",
                        hint="all ranks need the same recipe, model, packages and kind of device",
                    )
                )
                break
    if wrong:
        raise Problems([*wrong])


def _files(plan: Plan) -> dict[str, str]:
    """Samples of every file of the source's tensors: content differs where they do."""
    found = {}
    for path in sorted({entry.file for entry in plan.source.checkpoint.entries.values()}):
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as handle:
            for begin in (0, max(size // 2, 0), max(size - SAMPLE, 0)):
                handle.seek(begin)
                digest.update(handle.read(SAMPLE))
        found[path.name] = digest.hexdigest()
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value)


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"

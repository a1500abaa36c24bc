"""Ranks that would not compute the same are refused before any work."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.source import Source
from compressor.errors import CompressError, InputError, Problems
from compressor.ranks.ranks import Ranks
from compressor.run.environment import device_name, environment, versions

SAMPLE, PLACES = 1 << 16, 16
"""Bytes that are read of a source's file at so many places, its ends among them."""
GRAIN, TENSORS = 1 << 12, 4096
"""Bytes that are read within each tensor, or within so many of them. Files that differ only between
what is read pass for the same."""
MANY = 8
"""Differences that are named."""

PROCESSOR = ("processor", "instructions", "matrix units", "threads")
"""What decides the bits of a CPU, and none of a GPU."""


def computing(device: torch.device) -> dict[str, Any]:
    """What ranks have in common whatever they do: packages, the kind of device, and what decides
    last bits there."""
    here, gpu = environment(device), device.type == "cuda"
    return {
        "versions": versions(),
        "device": device_name(device),
        "environment": {k: v for k, v in here.items() if not gpu or k not in PROCESSOR},
    }


def require_alike(ranks: Ranks, about: Mapping[str, Any], *sources: Source) -> None:
    """Raises Problems with what differs: recipe, sources, tokens, versions, devices, threads.

    about  all that decides the result, as this rank sees it
    """
    if ranks.world == 1:
        return
    files = {name: digest for source in sources for name, digest in _files(source).items()}
    stated = dict(_flat({**json.loads(json.dumps(about)), "files": files}))
    every = ranks.gather(stated)
    # First what all have, and have otherwise.
    named = {key for one in every for key in one}
    keys = sorted(named, key=lambda key: (any(key not in one for one in every), key))
    wrong: list[CompressError] = []
    for key in keys:
        first = every[0].get(key)
        others = [(rank, one.get(key)) for rank, one in enumerate(every) if one.get(key) != first]
        if others and len(wrong) < MANY:
            rank, other = others[0]
            said = f"rank 0 has {_short(first)}, rank {rank} {_short(other)}"
            hint = "all ranks need the same recipe, model, packages and kind of device"
            wrong.append(InputError(f"ranks differ in {key}: {said}", hint=hint))
    if wrong:
        raise Problems(wrong)


def _files(source: Source) -> dict[str, str]:
    """Samples of every file of the source's tensors: content differs where they do."""
    entries = sorted(source.checkpoint.stored_entries(), key=lambda e: (e.file, e.begin))
    within: dict[Path, list[int]] = {entry.file: [] for entry in entries}
    for entry in entries[:: max(1, -(-len(entries) // TENSORS))]:
        middle = entry.begin + max(entry.end - entry.begin - GRAIN, 0) // 2
        within[entry.file].append(middle)
    found = {}
    for path, middles in within.items():
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        last = max(size - SAMPLE, 0)
        places = [(last * place // (PLACES - 1), SAMPLE) for place in range(PLACES)]
        with path.open("rb", buffering=0) as handle:
            for begin, count in [*places, *((middle, GRAIN) for middle in middles)]:
                handle.seek(begin)
                digest.update(handle.read(count))
        found[f"{path.parent.name}/{path.name}"] = digest.hexdigest()
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value)


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"

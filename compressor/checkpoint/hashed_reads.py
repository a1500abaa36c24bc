"""Tensors of files with their hashes. Small ones that follow one another are read as one: what a
thread calls once a tensor takes Python from who works meanwhile."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from compressor.checkpoint.safetensors import Entry, read_run, read_tensor, tensor_bytes

RUN = 2**24
"""Bytes of tensors that are read as one."""
ALIGNED = 256
"""Bytes at whose multiples one of them begins."""


def read_hashed(
    entries: Mapping[str, Entry], *, pin: bool, threads: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, in page-locked memory with `pin`, and the SHA-256 of each one's bytes."""

    def read(run: list[str]) -> dict[str, tuple[Tensor, str]]:
        if len(run) == 1:
            found = hashlib.sha256()
            tensor = read_tensor(entries[run[0]], pin=pin, look=found.update)
            return {run[0]: (tensor, found.hexdigest())}
        data = read_run([entries[name] for name in run], pin=pin)
        return {n: (t, hash_of_bytes(t)) for n, t in zip(run, data, strict=True)}

    # The largest first: it takes longest.
    runs = sorted(_runs(entries), key=lambda run: -sum(entries[name].spec.nbytes for name in run))
    with ThreadPoolExecutor(threads) as pool:
        found = {n: x for some in pool.map(read, runs) for n, x in some.items()}
    return {n: found[n][0] for n in entries}, {n: found[n][1] for n in entries}


def pieces(entries: Mapping[str, Entry]) -> list[int]:
    """Bytes of each piece of memory that `read_hashed` takes."""
    return [sum(entries[name].spec.nbytes for name in run) for run in _runs(entries)]


def hash_of_bytes(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes as they are stored."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _runs(entries: Mapping[str, Entry]) -> list[list[str]]:
    """Names of tensors that follow one another in a file, of `RUN` bytes together at most, or of a
    single one. Each begins where one that is read alone would, as far as arithmetic can tell."""
    found: list[list[str]] = []
    first: Entry | None = None
    last: Entry | None = None
    for name in sorted(entries, key=lambda n: (entries[n].file, entries[n].begin)):
        entry = entries[name]
        follows = first is not None and last is not None
        if first is not None and last is not None:
            follows = (entry.file, entry.begin) == (last.file, last.end)
            follows = follows and entry.end - first.begin <= RUN
            follows = follows and (entry.begin - first.begin) % ALIGNED == 0
        if follows:
            found[-1].append(name)
        else:
            found.append([name])
            first = entry
        last = entry
    return found

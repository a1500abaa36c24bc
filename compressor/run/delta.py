"""A dense fine-tune from a base and a delta, written unit by unit; the same call continues."""

from pathlib import Path
from typing import Any

from compressor.checkpoint.container import Safetensors
from compressor.checkpoint.delta.source import Delta, merge, merged_source
from compressor.checkpoint.manifest import MANIFEST_NAME, hash_file
from compressor.checkpoint.source import Source
from compressor.checkpoint.target import ModelTarget
from compressor.checkpoint.transaction import Progress, write
from compressor.numerics.bitdelta import SCALES, SIGNS
from compressor.run.environment import versions

_LEAVES = (f".{SIGNS}", f".{SCALES}")


def apply_delta(
    delta: Delta,
    base: Source,
    output: Path,
    *,
    max_shard_size: int = 5 * 10**9,
    progress: Progress = lambda name, done, total: None,
) -> int:
    """Write the dense fine-tune into `output`; the bytes of its tensors.

    Raises InputError where base and delta do not belong together or `output` is not its own,
    MachineError where the disk fails.
    """
    source = merged_source(delta, base)
    target = ModelTarget(
        source=source,
        format=source.format,
        schemes=source.schemes,
        dtype=source.checkpoint.dtype,
        container=Safetensors(max_shard_size),
    )
    write(
        target,
        output,
        source.read_unit,
        about=_about(delta),
        beside=delta.checkpoint.folder,
        models=[base.checkpoint.folder],
        progress=progress,
    )
    return source.checkpoint.nbytes


def _about(delta: Delta) -> dict[str, Any]:
    """What decides the bytes of the dense checkpoint: every file of the delta, and the base's
    fingerprint, against which each of its tensors is checked when it is read; no path."""
    folder = delta.checkpoint.folder
    shards = {entry.file.name for entry in delta.checkpoint.entries.values()}
    parts = ("config.json", "base.json", MANIFEST_NAME, *sorted(shards))
    files = {name: hash_file(folder / name).sha256 for name in parts if (folder / name).is_file()}
    return {
        "delta": {"name": folder.resolve().name, "files": files},
        "base": {**delta.record.identity, "fingerprint": delta.record.fingerprint},
        "versions": versions(),
    }


def describe(delta: Delta) -> dict[str, Any]:
    """What a delta holds, from its headers and scales alone."""
    entries = delta.checkpoint.entries
    rows: dict[str, dict[str, Any]] = {}
    size = 0
    for name, bits in delta.bits.items():
        scales = f"{name}.{SCALES}"
        found = delta.checkpoint.read([scales])[scales]
        size += entries[f"{name}.{SIGNS}"].spec.nbytes + entries[scales].spec.nbytes
        rows[name] = {"bits": bits, "scales": [float(value) for value in found]}
    whole = {n: e.spec.nbytes for n, e in entries.items() if not n.endswith(_LEAVES)}
    return {
        "base": {**delta.record.identity, "fingerprint": delta.record.fingerprint},
        "model_type": delta.record.model_type,
        "bytes": delta.checkpoint.nbytes,
        "signs": {"linears": len(rows), "bytes": size},
        "full": {"tensors": len(whole), "bytes": sum(whole.values()), "names": sorted(whole)},
        "borrowed": {"tensors": len(delta.borrowed), "names": sorted(delta.borrowed)},
        "linears": rows,
    }


def compare(delta: Delta, base: Source) -> dict[str, float]:
    """Size of each linear's difference relative to the base's weight (Frobenius norms)."""
    checkpoint = merge(delta, base)
    linears = {linear.name: linear for linear in base.layout.linears}
    found = {}
    for name in delta.bits:
        weight = checkpoint.base_weight(linears[name]).float()
        size = float(weight.norm())
        found[name] = float(delta.read(linears[name]).dense().norm()) / max(size, 1e-30)
    return found

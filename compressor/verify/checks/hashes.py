"""Every file's size and hash, and every tensor's, as the manifest has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from compressor.checkpoint.delta.base import stored_hash
from compressor.checkpoint.manifest import MANIFEST_NAME, Manifest, hash_file, read_manifest
from compressor.checkpoint.reader import INDEX_NAME, load_json
from compressor.errors import InputError
from compressor.verify.checks.base import Check
from compressor.verify.compare_config import DECIDING, deciding_files
from compressor.verify.findings import Findings

STRAYS = (
    *DECIDING,
    "*.safetensors",
    "*.index.json",
    "pytorch_model*.bin*",
    "adapter_config.json",
    "attention_policy*",
    "hf_quant_config.json",
    "quant_config.json",
    "quantize_config.json",
)
"""Files that loaders take because they are there: beside a manifest that does not name them, they
change a model whose own files are whole."""


class TensorHashes(Check):
    """Each tensor is the one that was written, and none is lost."""

    def begin(self) -> None:
        self.seen: set[str] = set()

    def stored(self, tensors: Mapping[str, Tensor]) -> None:
        self.seen |= set(tensors)
        if self.subject.manifest is None:
            return
        known = self.subject.manifest.tensors
        with ThreadPoolExecutor(4) as pool:
            for name, digest in zip(tensors, pool.map(stored_hash, tensors.values()), strict=True):
                if name not in known:
                    self.problems.append(f"{name} is not in {MANIFEST_NAME}")
                elif digest != known[name]:
                    self.problems.append(f"{name} is not what was written")

    def conclude(self) -> None:
        if self.subject.manifest is not None:
            known = self.subject.manifest.tensors
            lost = sorted(set(known) - self.seen)
            self.problems += [f"{x} is in {MANIFEST_NAME}, but not in the model" for x in lost]
            self.found.add("tensor hashes", self.problems, f"{len(known)} tensors")


def check_files(folder: Path, found: Findings) -> Manifest | None:
    """Every file's size and hash; the tensors of a broken shard are named where an index can."""
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        found.add("file hashes", [error.message], "")
        return None
    if manifest is None:
        found.add("file hashes", [], f"no {MANIFEST_NAME}: written by others, nothing to compare")
        return None
    problems = []
    homes = _index_homes(folder)
    for name, record in manifest.files.items():
        path = folder / name
        inside = _some(homes.get(name, ()), "holds")
        if not path.is_file():
            whose = inside if name != INDEX_NAME else _some(tuple(manifest.tensors), "places")
            problems.append(f"{name} is missing{whose}")
        elif path.stat().st_size != record.size:
            size = path.stat().st_size
            problems.append(f"{name} has {size} bytes, not {record.size}{inside}")
        elif hash_file(path).sha256 != record.sha256:
            # Which of its tensors changed is told by their own hashes below.
            problems.append(f"{name} has another SHA-256 than when it was written")
    strays = sorted(deciding_files(folder, STRAYS) - set(manifest.files))
    problems += [f"{name} does not belong to this checkpoint" for name in strays]
    size = sum(record.size for record in manifest.files.values())
    found.add("file hashes", problems, f"{len(manifest.files)} files, {size} bytes")
    return manifest


def _index_homes(folder: Path) -> dict[str, tuple[str, ...]]:
    """File → tensors it should hold, as far as an index says."""
    try:
        weight_map = load_json(folder / INDEX_NAME, what="index").get("weight_map")
    except InputError:
        return {}
    homes: dict[str, tuple[str, ...]] = {}
    if isinstance(weight_map, dict):
        for name, file in weight_map.items():
            if isinstance(file, str):
                homes[file] = (*homes.get(file, ()), name)
    return homes


def _some(names: Sequence[str], verb: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({verb} {', '.join(names[:3])}{more})"

"""Every file's size and hash, and every tensor's, as the manifest has them."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from compressor.checkpoint.hashed_reads import hash_of_bytes
from compressor.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    hash_file,
    read_manifest,
)
from compressor.checkpoint.reader import index_name, load_json, stem_of
from compressor.checkpoint.side_files import DECIDING
from compressor.errors import InputError, several
from compressor.ir.layout import UnitLayout
from compressor.ranks.ranks import ALONE, Ranks
from compressor.verify.checks.base import Check
from compressor.verify.compare_config import deciding_files
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


THREADS = 4


class TensorHashes(Check):
    """Each tensor is the one that was written, and none is lost."""

    gathers = ("problems", "seen")

    def begin(self) -> None:
        self.seen: list[str] = []
        self.coming: dict[str, Future[str]] = {}
        self.pool = ThreadPoolExecutor(THREADS)

    def stored(self, tensors: Mapping[str, Tensor]) -> None:
        self.seen += tensors
        if self.subject.manifest is not None:
            self.coming = {n: self.pool.submit(hash_of_bytes, t) for n, t in tensors.items()}

    def over(self, unit: UnitLayout) -> None:
        """What was hashed while the other checks went on."""
        known = self.subject.manifest.tensors if self.subject.manifest else {}
        for name, digest in self.coming.items():
            if name not in known:
                self.problems.append(f"{name} is not in {MANIFEST_NAME}")
            elif digest.result() != known[name]:
                self.problems.append(f"{name} is not what was written")
        self.coming = {}

    def conclude(self) -> None:
        self.pool.shutdown()
        if self.subject.manifest is not None:
            known = self.subject.manifest.tensors
            lost = sorted(set(known).difference(self.seen))
            self.problems += [f"{x} is in {MANIFEST_NAME}, but not in the model" for x in lost]
            self.found.add("tensor hashes", self.problems, f"{len(known)} tensors")


class FileHashes:
    """Every file's size and hash, the first check of a report.

    Files are hashed in threads while what is inside them is checked, which reads them at about the
    same time: a disk reads them once. Ranks share them by size.
    """

    manifest: Manifest | None = None

    def __init__(self, folder: Path, found: Findings, ranks: Ranks = ALONE) -> None:
        self.folder, self.found, self.ranks = folder, found, ranks
        self.pool = ThreadPoolExecutor(THREADS)
        self.hashes: dict[str, Future[FileRecord]] = {}
        self.damage, self.detail = [], f"no {MANIFEST_NAME}: written by others, nothing to compare"
        try:
            self.manifest = read_manifest(folder)
        except InputError as error:
            self.damage = [error.message]
        records = self.manifest.files if self.manifest else {}
        mine = ranks.owners(list(records.values()), lambda record: float(record.size))
        for owner, (name, record) in zip(mine, records.items(), strict=True):
            path = folder / name
            if owner == ranks.rank and path.is_file() and path.stat().st_size == record.size:
                self.hashes[name] = self.pool.submit(hash_file, path)

    def finish(self) -> None:
        """Put what was found before everything else that was."""
        mine = {name: hashed.result().sha256 for name, hashed in self.hashes.items()}
        if self.manifest is not None:
            hashes = {n: digest for found in self.ranks.gather(mine) for n, digest in found.items()}
            self.damage = self._problems(self.manifest, hashes)
            size = sum(record.size for record in self.manifest.files.values())
            self.detail = f"{len(self.manifest.files)} files, {size} bytes"
        self.pool.shutdown()
        first = Findings()
        first.add("file hashes", self.damage, self.detail)
        self.found.checks[:0] = first.checks
        self.found.damage[:0] = first.damage

    def _problems(self, manifest: Manifest, hashes: Mapping[str, str]) -> list[str]:
        """The tensors of a broken shard are named where an index can."""
        problems = []
        homes = _index_homes(self.folder)
        for name, record in manifest.files.items():
            path = self.folder / name
            inside = _some(homes.get(name, ()), "holds")
            if name in hashes:
                if hashes[name] != record.sha256:
                    # Which of its tensors changed is told by their own hashes.
                    problems.append(f"{name} has another SHA-256 than when it was written")
            elif not path.is_file():
                index = name.endswith(index_name(""))
                whose = _some(tuple(manifest.tensors), "places") if index else inside
                problems.append(f"{name} is missing{whose}")
            else:
                size = path.stat().st_size
                problems.append(f"{name} has {size} bytes, not {record.size}{inside}")
        strays = sorted(deciding_files(self.folder, STRAYS) - set(manifest.files))
        return problems + [f"{name} does not belong to this checkpoint" for name in strays]


def _index_homes(folder: Path) -> dict[str, tuple[str, ...]]:
    """File → tensors it should hold, as far as an index says."""
    try:
        weight_map = load_json(folder / index_name(stem_of(folder)), what="index").get("weight_map")
    except InputError:
        return {}
    homes: dict[str, tuple[str, ...]] = {}
    if isinstance(weight_map, dict):
        for name, file in weight_map.items():
            if isinstance(file, str):
                homes[file] = (*homes.get(file, ()), name)
    return homes


def _some(names: Sequence[str], verb: str) -> str:
    return f" ({verb} {several(names, 3)})" if names else ""

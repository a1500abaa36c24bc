"""A verdict on the files of a checkpoint: reopen them, trust nothing, name what is damaged.

Nothing is taken from the run that wrote them. A checkpoint without a manifest, written by others,
gets every check but that of its hashes. Memory is one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from compressor.attention.policy import (
    check_policy,
    describe,
    read_policy,
    read_policy_tensors,
    tensor_problems,
)
from compressor.checkpoint.manifest import MANIFEST_NAME, Manifest, hash_file, read_manifest
from compressor.checkpoint.reader import INDEX_NAME, load_json
from compressor.checkpoint.source import Source, open_source
from compressor.errors import InputError, Problems
from compressor.verify.against import Against
from compressor.verify.compare_config import DECIDING, deciding_files
from compressor.verify.findings import Check, Findings, LayerVerdict, VerifyReport
from compressor.verify.forecasts import check_forecasts
from compressor.verify.kernels.check import enable_interpreter
from compressor.verify.units import Progress, UnitChecks

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

__all__ = ["Check", "LayerVerdict", "VerifyReport", "verify"]


def verify(
    folder: Path,
    *,
    against: Path | Source | None = None,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a checkpoint folder; `against` is the original that its layers are compared with.

    Raises InputError where there is no checkpoint to read, or `against` is none.
    """
    _require_checkpoint(folder)
    if device.type == "cpu":
        enable_interpreter()
    original = open_source(against) if isinstance(against, Path) else against
    found = Findings()
    manifest = check_manifest(folder, found)
    try:
        source = open_source(folder)
    except InputError as error:
        problems = error.problems if isinstance(error, Problems) else [error]
        found.add("headers and tensors", [p.message for p in problems], "")
        return found.report(folder)
    entries = source.checkpoint.entries
    shards = len({entry.file for entry in entries.values()})
    detail = f"{len(entries)} tensors in {shards} files, all that {source.arch.model_type} needs"
    found.add("headers and tensors", _wrong_dtypes(source), detail)
    check_attention(folder, source, found)
    comparison = None
    if original is not None:
        comparison = Against(source, original, folder, device, found)
        comparison.beside_weights()
        if not comparison.related:
            return found.report(folder)
    UnitChecks(source, manifest, comparison, device, seed, found).run(progress)
    if not found.damage:
        check_forecasts(source, device, found)
    return found.report(folder)


def _require_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", hint="name a checkpoint's folder")
    signs = ("config.json", MANIFEST_NAME, INDEX_NAME)
    if not any((folder / name).is_file() for name in signs) and not any(
        folder.glob("*.safetensors")
    ):
        raise InputError(f"{folder} holds no checkpoint", hint="name a checkpoint's folder")


def check_manifest(folder: Path, found: Findings) -> Manifest | None:
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


def check_attention(folder: Path, source: Source, found: Findings) -> None:
    """The attention policy, where there is one: valid, for this model, its tensors whole."""
    try:
        policy = read_policy(folder)
        if policy is None:
            return
        check_policy(policy, source.layout)
        problems = tensor_problems(policy, read_policy_tensors(folder))
    except InputError as error:
        found.add("attention policy", [error.message], "")
        return
    found.add("attention policy", problems, "; ".join(describe(policy)))


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


def _wrong_dtypes(source: Source) -> list[str]:
    """Tensors whose dtype is not what their linear's scheme or a float tensor calls for."""
    expected: dict[str, torch.dtype] = {}
    for linear in source.layout.linears:
        if source.schemes.linears[linear.name].weight is not None:
            stored = source.stored(linear)
            expected |= {f"{linear.name}.{leaf}": spec.dtype for leaf, spec in stored.items()}
    problems = []
    for name, entry in source.checkpoint.entries.items():
        dtype, wanted = entry.spec.dtype, expected.get(name)
        if wanted is not None and dtype != wanted:
            problems.append(f"{name} is {_plain(dtype)}, its scheme implies {_plain(wanted)}")
    for unit in source.layout.units:
        for name in unit.tensors:
            entry_ = source.checkpoint.entries.get(name)
            if (
                entry_ is not None
                and name not in expected
                and not entry_.spec.dtype.is_floating_point
            ):
                problems.append(f"{name} is {_plain(entry_.spec.dtype)}, not a float tensor")
    return problems


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

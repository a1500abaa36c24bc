"""Runs a recipe's model passes over the frozen source, and keeps what each of them learned.

A result lies in the work folder under the pass's number until the run has finished, so that a run
that was killed later does not learn it again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compressor_calibration.tokens import TokenSet
from safetensors.torch import load_file, save

from compressor.frozen_model import SourceModel
from compressor.job import JobSettings
from compressor.passes.base import LearnContext, Learned, ModelPass
from compressor.plan import Plan
from compressor.policy import (
    check_policy,
    combine,
    make_policy,
    policy_files,
    read_policy,
    read_policy_tensors,
)
from compressor.shards import sync_folder, write_atomically
from compressor.source import Source
from compressor.unit_passes import unit_seed

Progress = Callable[[str, int, int], None]


def learn(
    plan: Plan,
    tokens: TokenSet | None,
    work: Path,
    settings: JobSettings,
    progress: Progress = lambda name, done, total: None,
) -> dict[int, Learned]:
    """What the plan's model passes learned, by the index of the pass.

    tokens  the calibration tokens
    work    the run's work folder; what is there from an interrupted run is used
    Raises Interrupted when asked to stop, and what the passes raise.
    """
    found: dict[int, Learned] = {}
    model: SourceModel | None = None
    for number, step in enumerate(plan.passes):
        params = step.step.params
        if not isinstance(params, ModelPass):
            continue
        folder = work / "learned" / f"{number}.{step.step.name}"
        known = _read(folder)
        if known is None:
            device = settings.device
            if model is None:
                model = SourceModel(plan.source, device=device, dtype=plan.compute_dtype(device))
            scratch = work / "learning" / folder.name
            scratch.mkdir(parents=True, exist_ok=True)
            context = LearnContext(
                tokens=tokens if params.reads_tokens else None,
                seed=unit_seed(plan.recipe.seed, -1, number),
                batch=settings.batch,
                scratch=scratch,
                base=lambda index: (
                    plan.delta.weights(plan.units[index].layout) if plan.delta else {}
                ),
                progress=progress,
                stopping=settings.stopping,
            )
            known = params.learn(model, context)
            _write(folder, known)
            shutil.rmtree(scratch)
        found[number] = known
    return found


def policy_of(source: Source, learned: Mapping[int, Learned]) -> dict[str, bytes]:
    """Files of the artefact that model passes ask for: the attention policy, which joins what the
    source carries with what was learned, and files of their own.

    Raises InputError where two passes decide the same.
    """
    folder = source.checkpoint.folder
    policy = read_policy(folder)
    tensors = read_policy_tensors(folder)
    files: dict[str, bytes] = {}
    for found in learned.values():
        files |= found.files
        if found.policy is not None:
            policy = combine(policy, make_policy(found.policy))
            tensors |= found.values
    if policy is None:
        return files
    check_policy(policy, source.layout)
    return files | policy_files(policy, tensors)


def _write(folder: Path, learned: Learned) -> None:
    """Put a result in place, whole or not at all."""
    half = folder.with_name(f".{folder.name}")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    about = {"policy": learned.policy, "rows": list(learned.rows)}
    write_atomically(half / "learned.json", json.dumps(about).encode())
    for name, tensors in (("values", learned.values), ("extra", learned.extra)):
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_atomically(half / f"{name}.safetensors", save(ready))
    for name, files in (("files", learned.files), ("plots", learned.plots)):
        (half / name).mkdir()
        for file, data in files.items():
            write_atomically(half / name / file, data)
    os.replace(half, folder)
    sync_folder(folder.parent)


def _read(folder: Path) -> Learned | None:
    if not folder.is_dir():
        return None
    about: Mapping[str, Any] = json.loads((folder / "learned.json").read_bytes())
    kept = {
        name: {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())}
        for name in ("files", "plots")
    }
    return Learned(
        policy=about["policy"],
        values=load_file(folder / "values.safetensors"),
        extra=load_file(folder / "extra.safetensors"),
        rows=about["rows"],
        files=kept["files"],
        plots=kept["plots"],
    )

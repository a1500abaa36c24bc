"""Runs a recipe's model passes over the frozen source, and keeps what each of them learned.

A result lies in the work folder under the pass's number until the run has finished, so that a run
that was killed later does not learn it again. It is sealed with the run and with the content of the
whole source, which is read for that.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.tokens import TokenSet

from compressor.attention import quality_record
from compressor.attention.policy import (
    AttentionPolicy,
    check_policy,
    combine,
    policy_files,
    read_policy,
    read_policy_tensors,
)
from compressor.attention.quality import measurable
from compressor.checkpoint.durable import is_file, make_way, own_folder, write_atomically
from compressor.checkpoint.manifest import hash_file
from compressor.checkpoint.records import Records, SharedRecords, stated_hash, tensors_hash
from compressor.checkpoint.transaction import json_bytes
from compressor.errors import InputError, MachineError
from compressor.methods.base import ModelPass
from compressor.methods.common.context import LearnContext, LearnResult
from compressor.plan.plan import Plan
from compressor.ranks.ranks import ALONE
from compressor.run.apply import unit_seed
from compressor.run.environment import environment
from compressor.run.one_host import on_one_host
from compressor.run.settings import JobSettings
from compressor.run.source_content import SourceContent
from compressor.runner.source_model import SourceModel

RECORD_NAME = "learned.json"
PARTS = ("files", "plots")
HELD_OUT_ROWS, HELD_OUT_LENGTH = 2, 2048
"""Rows of held-out text that a policy is measured on, and the most tokens of each."""


Known = tuple[LearnResult[Any], tuple[Mapping[str, str], ...]]
"""What a pass learned, and what with."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one model pass of the plan came to.

    name          of the pass
    policy        what its value decides of attention
    environments  what it was learned with
    """

    name: str
    result: LearnResult[Any]
    policy: AttentionPolicy | None
    environments: tuple[Mapping[str, str], ...]


def learn(
    plan: Plan,
    tokens: TokenSet | None,
    work: Path,
    settings: JobSettings,
    *,
    owner: str,
    content: SourceContent,
) -> dict[int, Outcome]:
    """What the plan's model passes learned, by the index of the pass.

    tokens   the calibration tokens
    work     the run's work folder; what is there whole from an interrupted run is used
    owner    what identifies the run
    content  the source, all of which is read where there is a model pass
    Ranks learn together what divides its rows; all else the leading one learns.
    Raises Interrupted when asked to stop, InputError where the source is not what the interrupted
    run read, and what the passes raise.
    """
    found: dict[int, Outcome] = {}
    steps = [(number, p.step.name, p.step.params) for number, p in enumerate(plan.passes)]
    passes = [(n, name, params) for n, name, params in steps if isinstance(params, ModelPass)]
    if not passes:
        return found
    ranks = settings.ranks

    def begin() -> tuple[str, dict[int, str]]:
        seal = _source_seal(Records(work, owner), plan, content, settings)
        for name in ("learned", "learning"):
            own_folder(work / name)
        return seal, content.hashes

    seal, content.hashes = ranks.led(begin)
    one_host = on_one_host(work, ranks)
    for number, name, params in passes:
        kept = Records(work / "learned" / f"{number}.{name}", seal)
        known = ranks.led(partial(_known, kept, name, params, settings))
        if known is None:
            scratch = work / "learning" / kept.folder.name
            together = params.divides(one_host=one_host)
            who = settings if together else replace(settings, ranks=ALONE)
            work_on = partial(_learn_one, plan, tokens, number, scratch, seal, who)
            known = work_on() if together else ranks.led(work_on)
            ranks.led(partial(_keep, kept, known, scratch))
        policy = params.policy(plan.layout, known[0].value)
        found[number] = Outcome(name, known[0], policy, known[1])
    return found


def _known(kept: Records, name: str, params: ModelPass[Any], settings: JobSettings) -> Known | None:
    """What an interrupted run learned, where all of it is there."""
    known = _read(kept, params)
    if known is None and kept.folder.exists():
        settings.on_note(f"learned/{kept.folder.name} is not whole: {name} learns again")
    return known


def _learn_one(
    plan: Plan,
    tokens: TokenSet | None,
    number: int,
    folder: Path,
    seal: str,
    settings: JobSettings,
) -> Known:
    """What a pass learns on these ranks, and what with.

    folder  of what it keeps meanwhile
    """
    params, ranks = plan.passes[number].step.params, settings.ranks
    assert isinstance(params, ModelPass)
    scratch = Records(folder, seal)
    if ranks.world > 1:
        scratch = SharedRecords(folder, seal, ranks)
    ranks.led(lambda: own_folder(folder))
    here = environment(settings.device)
    before = (scratch.get("environments.json") or {"all": []})["all"]
    environments = [*(e for e in before if e != here), here]
    scratch.put("environments.json", {"all": environments})
    model = SourceModel(
        plan.source,
        device=settings.device,
        dtype=plan.compute_dtype(settings.device),
        # What one rank found in the store and another ran would leave them apart.
        activations=settings.activations if ranks.world == 1 else None,
    )
    context = LearnContext(
        tokens=tokens if params.needs().tokens else None,
        seed=unit_seed(plan.recipe.seed, -1, number),
        batch=settings.batch,
        scratch=scratch,
        base=lambda index: plan.target.base_weights(plan.units[index].layout),
        progress=settings.on_step,
        stopping=settings.stopping,
        ranks=ranks,
    )
    try:
        return params.learn(model, context), tuple(environments)
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"the device ran out of memory while {plan.passes[number].step.name} learned",
            hint="fewer rows in its steps, shorter rows, or a larger device; the same command "
            "continues",
        ) from error


def _keep(kept: Records, known: Known, scratch: Path) -> None:
    """Put what was learned in place; what was kept meanwhile goes."""
    own_folder(kept.folder)
    _write(kept, *known)
    shutil.rmtree(scratch)


def _source_seal(
    records: Records, plan: Plan, content: SourceContent, settings: JobSettings
) -> str:
    """What all that is learned is sealed with: the run, and the whole source as it is now, which
    has to be what an interrupted run learned from."""
    now = content.look(range(len(plan.units)), settings)
    before = records.get("source.json")
    if before is not None:
        content.require(dict(enumerate(before["units"])))
    else:
        records.put("source.json", {"units": list(now.values())})
    return stated_hash([records.owner, content.whole])


def policy_of(
    plan: Plan, learned: Mapping[int, Outcome], settings: JobSettings
) -> dict[str, bytes]:
    """Files of the artefact that model passes ask for: the attention policy, which joins what the
    source carries with what was learned, what it is worth on held-out text, config.json with what
    its rules say there, and files of the passes' own.

    Raises InputError where two passes decide the same.
    """
    source, folder = plan.source, plan.source.checkpoint.folder
    policy = read_policy(folder)
    tensors = read_policy_tensors(folder)
    files: dict[str, bytes] = {}
    for found in learned.values():
        files |= found.result.files
        if found.policy is not None:
            policy = combine(policy, found.policy)
            own = found.result.value.tensors().items()
            tensors |= {f"{found.name}.{name}": tensor for name, tensor in own}
    if policy is None:
        return files
    check_policy(policy, source.layout)
    config = plan.target.config()
    rules = [rule for layer in policy.layers for rule in layer.rules]
    entries = {name: value for rule in rules for name, value in rule.config().items()}
    if not entries.keys() <= config.keys():
        files["config.json"] = json_bytes({**entries, **config})
    passes = [
        plan.passes[n].step.params for n, found in learned.items() if found.policy is not None
    ]
    recorded = any(isinstance(one, ModelPass) and one.records_quality for one in passes)
    if recorded and measurable(policy):
        device = settings.device
        model = SourceModel(source, device=device, dtype=plan.compute_dtype(device))
        length = min(HELD_OUT_LENGTH, plan.recipe.calibration.length)
        record = quality_record.record_quality(
            model, policy, rows=HELD_OUT_ROWS, length=length, progress=settings.on_step
        )
        files[quality_record.RECORD_NAME] = record.to_bytes()
    return files | policy_files(policy, tensors)


def learned_hash(learned: Mapping[int, Outcome]) -> str:
    """SHA-256 of what units and files are made from."""
    stated = []
    for number, found in sorted(learned.items()):
        result, value = found.result, found.result.value
        files = {name: _digest(data) for name, data in result.files.items()}
        tensors = [tensors_hash(value.tensors()), tensors_hash(result.extra)]
        stated.append([number, value.figures(), tensors, files])
    return stated_hash(stated)


def _write(
    records: Records, result: LearnResult[Any], environments: Sequence[Mapping[str, str]]
) -> None:
    """Put a result in place; its record comes last and names every file by its hash."""
    hashes: dict[str, dict[str, str]] = {}
    for part in PARTS:
        own_folder(records.folder / part)
        hashes[part] = {}
        for name, data in getattr(result, part).items():
            make_way(records.folder / part / name)
            write_atomically(records.folder / part / name, data)
            hashes[part][name] = _digest(data)
    records.put_tensors("values.safetensors", result.value.tensors())
    records.put_tensors("extra.safetensors", result.extra)
    about = {
        "figures": result.value.figures(),
        "rows": list(result.rows),
        "environments": list(environments),
    }
    records.put(RECORD_NAME, {**about, **hashes})


def _read(records: Records, params: ModelPass[Any]) -> Known | None:
    """A result of which every byte is there and what it was learned with, or None."""
    about = records.get(RECORD_NAME)
    if about is None or "figures" not in about:
        return None
    values = records.get_tensors("values.safetensors")
    extra = records.get_tensors("extra.safetensors")
    files = {part: _files(records.folder / part, about[part]) for part in PARTS}
    if values is None or extra is None or None in files.values():
        return None
    try:
        value = params.learned_type().restore(values, about["figures"])
    except InputError:
        return None
    result = LearnResult(
        value,
        extra=extra,
        rows=about["rows"],
        files=files["files"] or {},
        plots=files["plots"] or {},
    )
    return result, tuple(about["environments"])


def _files(folder: Path, hashes: Mapping[str, str]) -> dict[str, bytes] | None:
    """The files of a folder, or None where one is not what it was."""
    found = {}
    for name, digest in hashes.items():
        path = folder / name
        if not is_file(path) or hash_file(path).sha256 != digest:
            return None
        found[name] = path.read_bytes()
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

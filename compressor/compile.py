"""A recipe from its first check to a finished checkpoint: locate, plan, run, finish."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from compressor_calibration.tokens import TokenSet

from compressor.calibration_tokens import calibration_tokens, evaluation_tokens, passkey_text
from compressor.delta import locate_base, survey
from compressor.errors import InputError
from compressor.estimate import Estimates, batch_rows, estimate
from compressor.finish import finish, resume_finish
from compressor.heap import share_heap
from compressor.job import JobSettings, UnitDone, run_units
from compressor.kernel_checks import enable_interpreter
from compressor.learn import learn, policy_of
from compressor.locate import Located, locate, name_folder
from compressor.manifest import MANIFEST_NAME, read_manifest
from compressor.passes.base import Learned
from compressor.plan import Plan, make_plan
from compressor.process_memory import rss
from compressor.recipe import AFTERWARDS, Recipe
from compressor.runner import import_model, load_tokenizer
from compressor.shards import write_atomically
from compressor.warm_up import warm_up
from compressor.workspace import claim, owned, require_same

VERSIONED = ("compressor", "torch", "transformers", "tokenizers", "triton")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run of which everything that can be known beforehand is known and right.

    calibration, evaluation  token sets;  haystack  text that the passkey probe hides its key in
    batch                    rows of calibration tokens in one forward pass
    """

    recipe: Recipe
    located: Located
    plan: Plan
    estimates: Estimates
    calibration: TokenSet | None
    evaluation: TokenSet | None
    haystack: str
    device: torch.device
    batch: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A finished checkpoint. `units` and `learned` are empty where it was finished before.

    learned  what model passes found, by the index of the pass
    """

    output: Path
    units: tuple[UnitDone, ...]
    already: bool
    learned: Mapping[int, Learned] = field(default_factory=dict)


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU. Raises InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{name!r} is not a device", hint="cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{name!r} is not supported", hint="cpu, cuda or cuda:1")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("this machine has no usable GPU", hint="--device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"there is no {name}", hint=f"GPUs: {torch.cuda.device_count()}")
        return torch.device("cuda", device.index or 0)
    return device


def prepare(
    recipe: Recipe,
    *,
    device: torch.device,
    device_memory: int | None = None,
    resident: int | None = None,
) -> Prepared:
    """Locate the model (downloading it if need be), plan, and cut the token sets.

    resident  what the process held before it did anything, for the estimate; what it holds now, if
              None
    Raises InputError or Problems with all that is wrong, before any weight is read.
    """
    share_heap()
    resident = rss() if resident is None else resident
    if device.type == "cpu":
        # Now, since others import Triton, and it looks only once.
        enable_interpreter()
    located = locate(recipe.model, fetch=True, to_plan=True)
    plan = _plan(recipe, located)
    warm_up(plan, device)
    calibration = evaluation = None
    haystack = ""
    if plan.calibrated or recipe.evaluate is not None:
        checkpoint = located.source.checkpoint
        with ThreadPoolExecutor(1) as aside:
            # Tokenizers work outside Python's lock: their time hides the model's imports.
            cut = aside.submit(_token_sets, recipe, plan, load_tokenizer(checkpoint.folder))
            import_model(checkpoint.config)
            calibration, evaluation, haystack = cut.result()
    _check_vocabulary(plan, calibration, evaluation)
    return Prepared(
        recipe=recipe,
        located=located,
        plan=plan,
        estimates=estimate(plan, device=device, resident=resident, device_memory=device_memory),
        calibration=calibration,
        evaluation=evaluation,
        haystack=haystack,
        device=device,
        batch=batch_rows(plan, device=device, device_memory=device_memory),
    )


def _plan(recipe: Recipe, located: Located) -> Plan:
    """The plan; a base is read once, for its hashes and for what the fine-tune shares with it."""
    output = Path(recipe.output).expanduser()
    source, beside = located.source, located.beside
    named = [step.params.base_model() for step in recipe.passes]
    base = next((locate_base(name, fetch=True) for name in named if name is not None), None)
    plan = make_plan(recipe, source, output=output, base=base, beside=beside)
    if plan.delta is None:
        return plan
    found = survey(plan.delta.base, source.checkpoint)
    return make_plan(recipe, source, output=output, base=found, beside=beside)


def _token_sets(
    recipe: Recipe, plan: Plan, tokenizer: Any
) -> tuple[TokenSet | None, TokenSet | None, str]:
    """Calibration and evaluation rows, and the text of the passkey probe; those that are needed."""
    calibration = evaluation = None
    haystack = ""
    if plan.calibrated:
        calibration = calibration_tokens(tokenizer, recipe.calibration, seed=recipe.seed)
    if recipe.evaluate is not None:
        evaluation = evaluation_tokens(tokenizer, recipe.evaluate, calibration=calibration)
        haystack = passkey_text(tokenizer, recipe.evaluate)
    return calibration, evaluation, haystack


def _check_vocabulary(plan: Plan, *sets: TokenSet | None) -> None:
    size = int(plan.source.checkpoint.config.get("vocab_size", 0))
    largest = max((int(tokens.ids.max()) for tokens in sets if tokens is not None), default=-1)
    if 0 < size <= largest:
        raise InputError(
            f"the tokenizer gives token {largest}, the model knows {size}",
            hint="the tokenizer in the model's folder belongs to another model",
        )


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """All that decides the bytes of the artefact. No time, no path of this machine."""
    entries = prepared.located.source.checkpoint.entries
    shapes = [
        [name, str(e.spec.dtype), list(e.spec.shape), e.begin]
        for name, e in sorted(entries.items())
    ]
    config = prepared.located.source.checkpoint.config
    delta = prepared.plan.delta
    return {
        "recipe": {k: v for k, v in portable(prepared.recipe).items() if k not in AFTERWARDS},
        "source": {
            **prepared.located.identity,
            "config": _digest(config),
            "headers": _digest(shapes),
        },
        **({"base": delta.config()["base"]} if delta is not None else {}),
        "tokens": prepared.calibration.sha256 if prepared.calibration else None,
        "passes": {
            f"{i}.{p.step.name}": p.step.params.version for i, p in enumerate(prepared.plan.passes)
        },
        "compute": {
            "device": _device_name(prepared.device),
            "dtype": str(prepared.plan.compute_dtype(prepared.device)).removeprefix("torch."),
            "batch": prepared.batch,
        },
        "versions": versions(),
    }


def portable(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without where it writes; local files by their last name only."""
    data = recipe.resolved()
    data["model"] = _portable_model(data["model"])
    for section in (data["calibration"], data.get("evaluate") or {}):
        if "data" in section:
            section["data"] = _last_name(section["data"])
    for entry in data["passes"]:
        for params in entry.values():
            if "base" in params:
                params["base"] = _portable_model(params["base"])
    return data


def _portable_model(value: str) -> str:
    path = Path(value).expanduser()
    return "@".join(name_folder(path).values()) if path.is_dir() else _last_name(value)


def _last_name(value: str) -> str:
    path = Path(value).expanduser()
    return path.resolve().name if path.exists() else value


def versions() -> dict[str, str]:
    """Installed versions of what decides numbers."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def compile_checkpoint(
    prepared: Prepared,
    *,
    on_unit: Callable[[UnitDone], None] = lambda done: None,
    on_learning: Callable[[str, int, int], None] = lambda name, done, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Compiled:
    """Write the checkpoint into the recipe's output folder, continuing an interrupted run.

    A finished output of the same run is left as it is; one of another run is refused.
    """
    output = Path(prepared.recipe.output).expanduser()
    about = fingerprint(prepared)
    with owned(output, manifest=MANIFEST_NAME) as work:
        before = read_manifest(output)
        if before is not None:
            require_same(_comparable(before.about), _comparable(about), where=output)
            resume_finish(work, output)
            return Compiled(output=output, units=(), already=True)
        claim(work, about)
        if (work / MANIFEST_NAME).is_file():
            # Everything was written; the last renames were interrupted.
            resume_finish(work, output)
            return Compiled(output=output, units=(), already=True)
        settings = JobSettings(
            device=prepared.device, batch=prepared.batch, on_unit=on_unit, stopping=stopping
        )
        learned = learn(prepared.plan, prepared.calibration, work, settings, on_learning)
        # Passes that contradict each other are refused before any block is worked on.
        files = policy_of(prepared.located.source, learned)
        result = run_units(prepared.plan, prepared.calibration, work, settings, learned)
        finish(
            work,
            output,
            writer=result.writer,
            config=prepared.plan.config,
            extra_files=prepared.plan.files,
            files=files,
            beside=prepared.located.source.checkpoint.folder,
            recipe=yaml.safe_dump(portable(prepared.recipe), sort_keys=False).encode(),
            about={**about, "source": {**about["source"], "content": result.source_hash}},
        )
        for found in learned.values():
            for name, data in found.plots.items():
                (output / "plots").mkdir(exist_ok=True)
                write_atomically(output / "plots" / name, data)
    return Compiled(output=output, units=result.units, already=False, learned=learned)


def _comparable(about: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without what is only known after the run."""
    source = {k: v for k, v in about.get("source", {}).items() if k != "content"}
    return {**about, "source": source}

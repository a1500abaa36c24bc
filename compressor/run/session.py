"""A recipe from its first check to a finished checkpoint: locate, plan, run, finish."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from compressor_calibration.tokens import TokenSet

from compressor.arch.load import NO_MAP
from compressor.audit.findings import Audit
from compressor.checkpoint.delta.base import Base, locate_base, survey
from compressor.checkpoint.durable import make_folder, write_atomically
from compressor.checkpoint.find import Located, locate
from compressor.checkpoint.manifest import hash_file
from compressor.checkpoint.records import Records, stated_hash
from compressor.checkpoint.transaction import writing
from compressor.errors import InputError, Problems
from compressor.foreign.calls import foreign
from compressor.plan.estimate import Estimates, batch_rows, estimate
from compressor.plan.plan import Plan, make_plan
from compressor.plan.preflight import preflight
from compressor.plan.recipe import AFTERWARDS, Recipe
from compressor.plan.unit_plan import DTYPES
from compressor.ranks.ranks import ALONE, Ranks
from compressor.run.activation_store import open_activations
from compressor.run.alike import computing, require_alike
from compressor.run.audit import audit_first, audited_of
from compressor.run.environment import device_name, environment, versions
from compressor.run.model_passes import Outcome, learn, learned_hash, policy_of
from compressor.run.portable import portable
from compressor.run.selection import Selection, select_rows
from compressor.run.settings import FitProgress, JobSettings, Progress, UnitDone
from compressor.run.source_content import SourceContent
from compressor.run.tokens import calibration_tokens, evaluation_tokens, passkey_text
from compressor.run.units import run_units
from compressor.run.warm_up import compile_verdict, warm_up
from compressor.runner.activations import Activations
from compressor.runner.heap import share_heap
from compressor.runner.page_locking import lock_pages_in_threads
from compressor.runner.process_memory import rss
from compressor.verify.kernels.check import enable_interpreter

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run of which everything that can be known beforehand is known and right.

    base                     what a pass names as its base
    calibration, evaluation  token sets, of calibration the windows that there is a choice of;
                             haystack  text that the passkey probe hides its key in
    batch                    rows of calibration tokens in one forward pass
    activations              where hidden states are kept
    """

    recipe: Recipe
    located: Located
    plan: Plan
    base: Base | None
    estimates: Estimates
    calibration: TokenSet | None
    evaluation: TokenSet | None
    haystack: str
    device: torch.device
    batch: int
    activations: Activations | None = None


@dataclass(frozen=True, slots=True)
class Compiled:
    """A finished checkpoint. `units` and `learned` are empty where it was finished before.

    learned  what model passes found, by the index of the pass
    selected  what the report says of the windows that were taken, where there was a choice
    audit    what an audit of the model found, where the recipe asks for one
    """

    output: Path
    units: tuple[UnitDone, ...]
    already: bool
    learned: Mapping[int, Outcome] = field(default_factory=dict)
    selected: Mapping[str, Any] | None = None
    audit: Audit | None = None


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU; a GPU becomes this thread's current one. Raises
    InputError for a device that is not there."""
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
        lock_pages_in_threads()
        if device.index:
            # Triton starts kernels on the current device, wherever their tensors are.
            torch.cuda.set_device(device)
        return torch.device("cuda", device.index or 0)
    return device


def prepare(
    recipe: Recipe,
    *,
    device: torch.device,
    device_memory: int | None = None,
    resident: int | None = None,
    world: int = 1,
) -> Prepared:
    """Locate the model (downloading it if need be), plan, and cut the token sets.

    resident  what the process held before it did anything, for the estimate; what it holds now, if
              None
    world     how many ranks there are
    Raises InputError or Problems with all that is wrong, before any weight is read.
    """
    share_heap()
    resident = rss() if resident is None else resident
    if device.type == "cpu":
        # Now, since others import Triton, and it looks only once.
        enable_interpreter()
    located = locate(
        recipe.model,
        fetch=True,
        to_plan=True,
        dtype=DTYPES.get(recipe.dtype),
        chosen=recipe.map,
    )
    base = _base(recipe, located)
    plan = _plan(recipe, located, base)
    warm_up(plan, device)
    tokenizer, problems = preflight(plan)
    if problems:
        raise Problems(problems)
    calibration, evaluation, haystack = None, None, ""
    with foreign("cannot make rows of tokens"):
        if tokenizer is not None and plan.calibrated:
            calibration = calibration_tokens(
                tokenizer, recipe.calibration, seed=recipe.seed, candidates=True
            )
        if tokenizer is not None and recipe.evaluate is not None:
            evaluation = evaluation_tokens(tokenizer, recipe.evaluate, calibration=calibration)
            haystack = passkey_text(tokenizer, recipe.evaluate)
    _check_vocabulary(plan, calibration, evaluation)
    return Prepared(
        recipe=plan.recipe,
        located=located,
        plan=plan,
        base=base,
        estimates=estimate(
            plan, device=device, resident=resident, device_memory=device_memory, world=world
        ),
        calibration=calibration,
        evaluation=evaluation,
        haystack=haystack,
        device=device,
        batch=batch_rows(plan, device=device, device_memory=device_memory),
        activations=open_activations(recipe.activation_store, device),
    )


def _plan(recipe: Recipe, located: Located, base: Base | None) -> Plan:
    output = Path(recipe.output).expanduser()
    return make_plan(recipe, located.source, output=output, base=base, beside=located.beside)


def _base(recipe: Recipe, located: Located) -> Base | None:
    """The base that a pass names. It is read once, where nothing in the recipe is wrong, for its
    hashes and for what the fine-tune shares with it."""
    named = [step.params.needs().base for step in recipe.passes]
    base = next((locate_base(name, fetch=True) for name in named if name is not None), None)
    if base is None:
        return None
    _plan(recipe, located, base)
    return survey(base, located.source.checkpoint)


def _check_vocabulary(plan: Plan, *sets: TokenSet | None) -> None:
    size = plan.layout.sizes.vocabulary
    largest = max((int(tokens.ids.max()) for tokens in sets if tokens is not None), default=-1)
    if size <= largest:
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
    config, recipe = prepared.located.source.checkpoint.config, prepared.recipe
    named = None if recipe.map in (None, NO_MAP) else Path(str(recipe.map)).expanduser()
    here = environment(prepared.device) if prepared.recipe.reproducible else None
    return {
        "recipe": {k: v for k, v in portable(prepared.recipe).items() if k not in AFTERWARDS},
        "source": {
            **prepared.located.identity,
            "config": stated_hash(config),
            "headers": stated_hash(shapes),
            **({} if named is None else {"map": hash_file(named).sha256}),
            "tokenizer": stated_hash(_tokenizer(prepared.located.source.checkpoint.folder)),
        },
        **prepared.plan.target.about(),
        "tokens": prepared.calibration.sha256 if prepared.calibration else None,
        "passes": {
            f"{i}.{p.step.name}": p.step.params.version for i, p in enumerate(prepared.plan.passes)
        },
        "compute": {
            "device": device_name(prepared.device),
            "dtype": str(prepared.plan.compute_dtype(prepared.device)).removeprefix("torch."),
            "batch": prepared.batch,
            **({"environment": here} if here is not None else {}),
        },
        "versions": versions(),
    }


def _shared(prepared: Prepared) -> dict[str, Any]:
    """What ranks have in common beside that."""
    recipe = portable(prepared.recipe)
    return {
        **computing(prepared.device),
        "judged": {key: recipe[key] for key in AFTERWARDS if key in recipe},
        "evaluation": prepared.evaluation.sha256 if prepared.evaluation else None,
        "haystack": stated_hash(prepared.haystack),
        "experts spread": prepared.estimates.alone > 0,
        "experts in main memory": prepared.estimates.experts_apart,
    }


def _tokenizer(folder: Path) -> dict[str, str]:
    """Hashes of what turns text into tokens, which passes also do by themselves."""
    files = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    return {path.name: hash_file(path).sha256 for path in sorted(files) if path.is_file()}


def compile_checkpoint(
    prepared: Prepared,
    *,
    on_unit: Callable[[UnitDone], None] = lambda done: None,
    on_step: Progress = lambda name, done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_fit: FitProgress = lambda name, done, total, loss: None,
    stopping: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Compiled:
    """Write the checkpoint into the recipe's output folder, continuing an interrupted run.

    on_step  called after each step of learning, and of reading a source again
    on_note  told what an interrupted run left damaged, which is done again
    on_fit   told how far a unit is on which a method works long
    ranks    the processes that do it, each with the same recipe and the same source
    A finished output of the same run is left as it is; one of another run is refused.
    """
    recipe, plan = prepared.recipe, prepared.plan
    if prepared.activations is not None:
        prepared.activations.on_note = on_note
    output = Path(recipe.output).expanduser()
    about = fingerprint(prepared)
    require_alike(ranks, {**about, **_shared(prepared)}, plan.source)
    claiming = writing(
        plan.target, output, about=about, shards=plan.shards, judged_later=recipe.verify
    )
    with ranks.leading(claiming) as under_way:
        if under_way.finished:
            return Compiled(output=output, units=(), already=True)

        def unit_done(done: UnitDone) -> None:
            if done.index == 1 and ranks.leads and recipe.verify:
                compile_verdict(plan.target, prepared.device)
            on_unit(done)

        settings = JobSettings(
            device=prepared.device,
            batch=prepared.batch,
            offload=prepared.estimates.offload,
            experts_apart=prepared.estimates.experts_apart,
            activations=prepared.activations,
            on_unit=unit_done,
            on_step=on_step,
            on_note=on_note,
            on_fit=on_fit,
            stopping=stopping,
            spread=prepared.estimates.alone > 0,
            ahead=prepared.estimates.ahead,
            ranks=ranks,
        )
        owner, content = stated_hash(about), SourceContent(plan)

        def beforehand() -> tuple[Audit | None, TokenSet | None, Selection | None]:
            model = audited_of(prepared.located)
            audited = audit_first(model, recipe.audit, under_way.work, owner, settings)
            rows, selected = prepared.calibration, None
            if rows is not None:
                kept = Records(under_way.work / "selection", owner)
                selected = select_rows(plan, rows, kept, settings)
                rows = rows if selected is None else selected.tokens
            return audited, rows, selected

        audited, tokens, selected = ranks.led(beforehand)
        learned = learn(plan, tokens, under_way.work, settings, owner=owner, content=content)
        # Passes that contradict each other are refused before any block is worked on.
        files = ranks.led(lambda: policy_of(plan, learned, settings))
        result = run_units(
            plan,
            tokens,
            under_way.work,
            settings,
            owner=stated_hash([owner, learned_hash(learned)]),
            content=content,
            learned=learned,
        )
        if ranks.leads:
            for found in learned.values():
                for name, data in found.result.plots.items():
                    make_folder(output / "plots")
                    write_atomically(output / "plots" / name, data)
            used = [e for found in learned.values() for e in found.environments]
            used += result.environments
            under_way.finish(
                result.writer,
                beside=prepared.located.source.checkpoint.folder,
                recipe=yaml.safe_dump(
                    portable(recipe), sort_keys=False, allow_unicode=True
                ).encode(),
                files=files,
                about={
                    **about,
                    "source": {**about["source"], "content": result.source_hash},
                    **({} if selected is None else {"selected": selected.tokens.sha256}),
                    "environment": [e for i, e in enumerate(used) if e not in used[:i]],
                },
            )
        ranks.led(lambda: None)
    return Compiled(
        output=output,
        units=result.units,
        already=False,
        learned=learned,
        selected=None if selected is None else selected.row,
        audit=audited,
    )

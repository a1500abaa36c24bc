"""What is found out about a finished checkpoint by reopening its files: verify, evaluate, probe,
gate."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch

from compressor.audit.findings import Audit
from compressor.audit.pace import paced
from compressor.checkpoint.delta.source import open_model
from compressor.checkpoint.manifest import MANIFEST_NAME, hash_file
from compressor.checkpoint.source import Source
from compressor.errors import CompressError
from compressor.evaluate.gate import GateResult, Passes
from compressor.evaluate.measure import Measured, measure
from compressor.evaluate.passkey import PasskeyResult
from compressor.evaluate.perplexity import EvaluationResult, TaskScore, plain_json
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.ranks.ranks import ALONE, Ranks
from compressor.run.audit import Audited, audit, options_of
from compressor.run.portable import portable
from compressor.run.session import Compiled, Prepared
from compressor.runner.heap import give_back_page_locked
from compressor.runner.tokenizer import load_tokenizer
from compressor.verify.findings import VerifyReport
from compressor.verify.verify import verify


class Watch(Protocol):
    """Whoever is shown what goes on."""

    def stage(self, name: str, total: int) -> AbstractContextManager[None]:
        """A stage of `total` units begins, and ends with the context."""
        return nullcontext()

    def unit(self, name: str, done: int, total: int) -> None:
        """One more unit of the stage is finished."""
        return


class Unwatched(Watch):
    """A watch that shows nothing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The findings; None, or empty, for what the recipe does not ask for.

    audit    signs of a backdoor or of damage;  accepted  whether they let it pass
    tasks    accuracy of the harness's tasks
    seconds  wall time of each part
    """

    verified: VerifyReport | None = None
    evaluation: EvaluationResult | None = None
    passkey: PasskeyResult | None = None
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    gate: GateResult | None = None
    audit: Audit | None = None
    accepted: bool = True
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing that was checked failed."""
        return (
            (self.verified is None or self.verified.ok)
            and (self.gate is None or self.gate.passed)
            and self.accepted
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ok": self.ok,
            "verify": None if self.verified is None else self.verified.to_json(),
            "evaluate": None if self.evaluation is None else self.evaluation.to_json(),
            "passkey": None if self.passkey is None else self.passkey.to_json(),
            "tasks": self.tasks_json(),
            "gate": None if self.gate is None else self.gate.to_json(),
        }

    def tasks_json(self) -> dict[str, dict[str, float]]:
        """The tasks as plain data."""
        found: dict[str, dict[str, float]] = plain_json(
            {name: asdict(estimate) for name, estimate in self.tasks.items()}
        )
        return found


def judge(
    prepared: Prepared,
    compiled: Compiled,
    *,
    rows: Sequence[Mapping[str, Any]] = (),
    watch: Watch | None = None,
    ranks: Ranks = ALONE,
) -> Verdict:
    """Check and measure the written files as the recipe says, and hold them to its gate.

    rows   report rows of the passes, which say where the errors are; the leading rank's count
    ranks  that share the work, where all of them see the files; else the leading one does it
    Files that do not verify are not measured.
    """

    def run(ranks: Ranks) -> Verdict:
        return _Judge(prepared, compiled, watch or Unwatched(), ranks).run(rows)

    manifest = compiled.output / MANIFEST_NAME
    # Which checkpoint is in the folder, as far as each host sees it.
    seen = ranks.gather(hash_file(manifest).sha256 if manifest.is_file() else None)
    return run(ranks) if len(set(seen)) == 1 else ranks.led(lambda: run(ALONE))


@dataclass(slots=True)
class _Judge:
    prepared: Prepared
    compiled: Compiled
    watch: Watch
    ranks: Ranks
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, rows: Sequence[Mapping[str, Any]]) -> Verdict:
        recipe = self.prepared.recipe
        if self.prepared.device.type == "cuda" and (recipe.verify or recipe.evaluate):
            # What the run copied units through is not used again.
            give_back_page_locked()
        verified = self._verify() if recipe.verify else None
        if verified is not None and not verified.ok:
            return Verdict(verified=verified, seconds=self.seconds)
        audited = self._audit()
        fails = recipe.audit is not None and recipe.audit.fails
        measured = self._measure()
        evaluation = None if measured is None else measured.evaluation
        found = None if measured is None else measured.passkey
        tasks = {} if measured is None else measured.tasks
        gate = None
        if recipe.gate is not None and self.ranks.leads:
            gate = recipe.gate.check(
                evaluation,
                rows,
                passkey=found,
                tasks=tasks,
                passes=portable(recipe)["passes"],
                layout=self.prepared.plan.layout,
                plans=self._plans,
            )
        if self.prepared.device.type == "cuda":
            torch.cuda.empty_cache()
        return Verdict(
            verified=verified,
            evaluation=evaluation,
            passkey=found,
            tasks=tasks,
            gate=gate,
            audit=audited,
            accepted=not (fails and audited is not None and audited.suspect),
            seconds=self.seconds,
        )

    def _plans(self, passes: Passes) -> bool:
        """Whether the recipe with these passes in place of its own could be run."""
        mine = self.prepared.recipe
        recipe = {**mine.resolved(), "output": mine.output, "passes": passes}
        try:
            make_plan(
                make_recipe(recipe),
                self.prepared.located.source,
                base=self.prepared.base,
            )
        except CompressError:
            return False
        return True

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.watch.stage(name, 0):
            yield
        self.seconds[name] = time.perf_counter() - started

    def _rows(self, length: int) -> int:
        """Rows of this length in one forward pass: as many tokens as of the calibration."""
        return max(1, self.prepared.batch * self.prepared.recipe.calibration.length // length)

    @property
    def _base(self) -> Source | None:
        base = self.prepared.base
        return None if base is None else base.source

    def _written(self) -> Source:
        """The finished checkpoint, a delta together with its base."""
        return open_model(self.compiled.output, base=self._base)

    def _verify(self) -> VerifyReport:
        with self._stage("verify"):
            return verify(
                self.compiled.output,
                base=self._base,
                against=self.prepared.located.source,
                device=self.prepared.device,
                seed=self.prepared.recipe.seed,
                progress=self.watch.unit,
                ranks=self.ranks,
            )

    def _audit(self) -> Audit | None:
        wanted = self.prepared.recipe.audit
        if wanted is None or not wanted.looks_at("written"):
            return None
        source, sweep = self._written(), options_of(wanted)
        model = Audited(self.compiled.output.resolve().name, source.checkpoint, source)
        told, device = paced(self.watch.unit), self.prepared.device
        with self._stage("audit"):
            return self.ranks.led(lambda: audit(model, sweep=sweep, device=device, progress=told))

    def _measure(self) -> Measured | None:
        wanted, tokens = self.prepared.recipe.evaluate, self.prepared.evaluation
        if wanted is None or tokens is None:
            return None
        found = measure(
            self._written(),
            load_tokenizer(self.compiled.output),
            tokens.ids,
            wanted,
            haystack=self.prepared.haystack,
            device=self.prepared.device,
            dtype=self.prepared.plan.compute_dtype(self.prepared.device),
            batch=self._rows,
            stage=self._stage,
            against=self.prepared.located.source if wanted.against_original else None,
            # By one process alone.
            activations=self.prepared.activations if self.ranks.world == 1 else None,
            seed=self.prepared.recipe.seed,
            progress=self.watch.unit,
            ranks=self.ranks,
        )
        if any(step.effects.rotates_residual for step in self.prepared.plan.passes):
            # Hidden states in two bases: their difference says nothing.
            found = replace(found, evaluation=replace(found.evaluation, blocks=()))
        return found

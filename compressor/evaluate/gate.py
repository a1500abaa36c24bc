"""The gate: limits on what evaluation found, and where to spend bits when they are missed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.evaluate.passkey import PasskeyResult
from compressor.evaluate.perplexity import Estimate, EvaluationResult, plain_json
from compressor.ir.layout import ModelLayout

Passes = Sequence[Mapping[str, Any]]
"""A recipe's passes, [{name: parameters}]."""

MOST_SUGGESTED = 0.1
"""Share of all linears that a suggestion may ask to treat better."""


class Gate(BaseModel):
    """Limits that a finished checkpoint must keep."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ppl: float | None = Field(None, gt=0, description="highest perplexity")
    ppl_ratio: float | None = Field(None, gt=0, description="highest ratio to the original's")
    kl: float | None = Field(None, gt=0, description="highest mean KL divergence, in nats")
    top1: float | None = Field(None, ge=0, le=1, description="lowest top-1 agreement")
    passkey: float | None = Field(None, ge=0, le=1, description="lowest passkey accuracy")
    layer_error: float | None = Field(
        None, gt=0, description="highest relative squared error of any one linear"
    )
    tasks: dict[str, float] = Field(
        default_factory=dict, description="task of the harness: lowest accuracy"
    )

    @model_validator(mode="after")
    def _has_limits(self) -> Self:
        if not self.tasks and all(getattr(self, name) is None for name in LIMITS):
            raise ValueError(f"a gate needs at least one limit: {', '.join([*LIMITS, 'tasks'])}")
        return self

    def unmeasured(
        self,
        *,
        evaluated: bool = True,
        against_original: bool,
        passkey: bool,
        tasks: Sequence[str] = (),
    ) -> list[str]:
        """Limits that a run which measures no more than this could never judge."""
        missing = ["ppl"] if not evaluated and self.ppl is not None else []
        if not (evaluated and against_original):
            missing += [n for n in ("ppl_ratio", "kl", "top1") if getattr(self, n) is not None]
        if not passkey and self.passkey is not None:
            missing.append("passkey")
        return missing + [f"tasks.{name}" for name in self.tasks if name not in tasks]

    def check(
        self,
        evaluation: EvaluationResult | None,
        rows: Sequence[Mapping[str, Any]] = (),
        *,
        passkey: PasskeyResult | None = None,
        tasks: Mapping[str, Estimate] | None = None,
        passes: Sequence[Mapping[str, Any]] = (),
        layout: ModelLayout | None = None,
        plans: Callable[[Passes], bool] | None = None,
    ) -> GateResult:
        """Hold what was measured to the limits.

        rows    report rows of the passes: {"linear", "error", "pass", …}
        tasks   accuracy of the harness's tasks
        passes  the recipe's passes, [{name: parameters}], for a suggestion that can be pasted
        layout  lets a suggestion keep together what runtimes fuse
        plans   whether a recipe with these passes could be run
        What was not measured, or is not a number, fails.
        """
        ranked = rank_layers(rows)
        worst = Estimate(ranked[0].error, 0.0) if ranked else None
        found: dict[str, Estimate | None] = {
            "ppl": evaluation.perplexity if evaluation else None,
            "ppl_ratio": evaluation.perplexity_ratio if evaluation else None,
            "kl": evaluation.kl if evaluation else None,
            "top1": evaluation.top1 if evaluation else None,
            "passkey": passkey.accuracy if passkey else None,
            "layer_error": worst,
            **{f"tasks.{name}": value for name, value in (tasks or {}).items()},
        }
        limits: dict[str, float | None] = {name: getattr(self, name) for name in LIMITS}
        limits |= {f"tasks.{name}": limit for name, limit in self.tasks.items()}
        checks = tuple(
            _judge(name, found.get(name), limit)
            for name, limit in limits.items()
            if limit is not None
        )
        passed = all(check.passed for check in checks)
        return GateResult(
            passed=passed,
            checks=checks,
            layers=tuple(ranked),
            suggestion="" if passed else suggest(ranked, passes, layout=layout, plans=plans),
        )


WHAT = {
    "ppl": "perplexity",
    "ppl_ratio": "perplexity relative to the original",
    "kl": "KL divergence from the original",
    "top1": "top-1 agreement with the original",
    "passkey": "passkey accuracy",
    "layer_error": "largest error of a linear",
}
LIMITS = tuple(WHAT)
HIGHEST = ("ppl", "ppl_ratio", "kl", "layer_error")
"""Limits that a value may not pass; the others it has to reach."""


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One limit: `value` is None where nothing was measured or it is not a number."""

    name: str
    passed: bool
    value: float | None
    error: float
    limit: float
    message: str


@dataclass(frozen=True, slots=True)
class LayerError:
    """A linear's error, relative and squared, and its share of the sum over all linears."""

    linear: str
    error: float
    share: float
    pass_name: str


@dataclass(frozen=True, slots=True)
class GateResult:
    """The gate's verdict.

    layers      linears by error, the largest first
    suggestion  YAML that can replace `passes:` in the recipe; empty where the gate held
    """

    passed: bool
    checks: tuple[GateCheck, ...]
    layers: tuple[LayerError, ...] = ()
    suggestion: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data in which a number that is not finite is null."""
        found: dict[str, Any] = plain_json(asdict(self))
        return found


def rank_layers(rows: Sequence[Mapping[str, Any]]) -> list[LayerError]:
    """Linears by error, the largest first; rows without one are left out. An error that is not a
    number counts as infinite."""
    errors: dict[str, tuple[float, str]] = {}
    for row in rows:
        name, error = row.get("linear"), row.get("error")
        if isinstance(name, str) and isinstance(error, (int, float)):
            errors[name] = (float(error), str(row.get("pass", "")))
    total = sum(error for error, _ in errors.values() if math.isfinite(error))
    ranked = [
        LayerError(
            linear=name,
            error=error,
            share=error / total if total and math.isfinite(error) else 0.0,
            pass_name=by,
        )
        for name, (error, by) in errors.items()
    ]
    return sorted(ranked, key=lambda layer: -layer.error if math.isfinite(layer.error) else -1e300)


def suggest(
    ranked: Sequence[LayerError],
    passes: Sequence[Mapping[str, Any]],
    *,
    layout: ModelLayout | None = None,
    plans: Callable[[Passes], bool] | None = None,
) -> str:
    """`passes:` as YAML, with the linears that make half of the error (at most a tenth of all)
    in 8 bits, or left alone where they had 8 bits or more.

    Of a format that holds one number of bits they are left alone; where it cannot do that either,
    every linear has groups of half the size. Empty where no pass made errors, or nothing plans.
    """
    chosen: list[str] = []
    share = 0.0
    for layer in ranked[: max(1, int(len(ranked) * MOST_SUGGESTED))]:
        chosen.append(layer.linear)
        share += layer.share
        if share >= 0.5:
            break
    changed = [copy.deepcopy(dict(step)) for step in passes]
    made_by = {layer.linear: layer.pass_name for layer in ranked}
    added: list[dict[str, Any]] = []
    for step in changed:
        ((name, params),) = step.items()
        mine = [linear for linear in chosen if made_by[linear] == name]
        if not mine:
            continue
        mine = _with_siblings(mine, layout)
        step[name] = {**params, "ignore": [*params.get("ignore", ["lm_head"]), *mine]}
        if isinstance(params.get("bits"), int) and params["bits"] < 8:
            kept = {k: params[k] for k in ("group_size", "symmetric") if k in params}
            added.append({"rtn": {"targets": mine, "bits": 8, **kept}})
    before = [dict(step) for step in passes]
    for found in (changed + added, changed, _finer(before)):
        if found != before and (plans is None or plans(found)):
            return yaml.safe_dump({"passes": found}, sort_keys=False, allow_unicode=True, width=100)
    return ""


def _finer(passes: Passes) -> list[dict[str, Any]]:
    """The passes with groups of half the size."""
    found = copy.deepcopy([dict(step) for step in passes])
    for step in found:
        for params in step.values():
            if isinstance(params.get("group_size"), int) and params["group_size"] > 16:
                params["group_size"] //= 2
    return found


def _with_siblings(names: Sequence[str], layout: ModelLayout | None) -> list[str]:
    """The named linears and all that runtimes fuse with them, in the model's order."""
    if layout is None:
        return sorted(names)
    wanted = set(names)
    for unit in layout.units:
        fused = {x.fused for x in unit.linears if x.fused and x.name in wanted}
        wanted |= {x.name for x in unit.linears if x.fused in fused}
    return [linear.name for linear in layout.linears if linear.name in wanted]


def _judge(name: str, value: Estimate | None, limit: float) -> GateCheck:
    what = WHAT.get(name, f"accuracy in {name.removeprefix('tasks.')}")
    asked = f"the gate asks for {'at most' if name in HIGHEST else 'at least'} {limit:g}"
    if value is None or not math.isfinite(value.value):
        how = "was not measured" if value is None else "is not finite"
        return GateCheck(name, False, None, 0.0, limit, f"{what} {how}; {asked}")
    number = value.value
    passed = number <= limit if name in HIGHEST else number >= limit
    spread = f" ± {value.error:.2g}" if value.error > 0 else ""
    message = f"{what} is {number:.4g}{spread}; {asked}"
    return GateCheck(name, passed, number, value.error, limit, message)

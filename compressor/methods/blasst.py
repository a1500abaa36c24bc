"""BLASST (arXiv 2512.12087), skip softmax in TensorRT-LLM: tiles of keys whose softmax weights are
negligible are skipped, by a threshold for a wanted share of them.

The threshold of a text of L keys is a · exp(b · share) / L, with a and b for prompts and for steps
of decoding, fitted as NVIDIA's ModelOpt does: one dense pass says how many tiles each of twenty
thresholds would skip at several lengths. A row's beginning is a text of its own, as attention is
causal, so that all lengths come from one pass. Rows that are held out say what the fit achieves.
Written as ModelOpt's `sparse_attention_config` into config.json; no weight changes.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal, Self

import torch
from compressor_kernels.attention.skip_softmax import tile_gaps_ref, visited_tiles
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.policy import AttentionPolicy, rule_policy
from compressor.attention.quality import watch_attention
from compressor.attention.rules.blasst import Blasst as Skipping
from compressor.attention.rules.blasst import SkipPhase
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout, UnitLayout
from compressor.methods.base import Cost, ModelPass, Needs
from compressor.methods.common.context import LearnContext, LearnResult, PlanContext
from compressor.methods.common.head_plots import curves
from compressor.methods.common.learned import Learned
from compressor.numerics.attention_thresholds import (
    SKIP_TRIALS,
    SkipScale,
    anchored,
    fit_skip_scale,
)
from compressor.runner.attention_call import AttentionCall
from compressor.runner.source_model import SourceModel

STEPS = 10
"""Steps of decoding at the end of each length."""
DEPLOYED = (128, 32)
"""Queries and keys of a tile of ModelOpt's own forward kernel."""


class Fits(Learned):
    """What was fitted for prompts and for steps, None for what was not asked for.

    targets  names of the model's attention classes
    """

    prefill: dict[str, Any] | None = None
    decode: dict[str, Any] | None = None
    targets: tuple[str, ...] = ()


class Blasst(ModelPass[Fits]):
    """Skip tiles of keys whose softmax weights are negligible; changes no weight."""

    prefill: float | None = Field(
        0.5, ge=0.1, le=0.9, description="share of tiles to skip in prompts; null: none"
    )
    decode: float | None = Field(
        0.5, ge=0.1, le=0.9, description="share of tiles to skip in steps; null: none"
    )
    lengths: tuple[int, ...] = Field(
        (),
        description="lengths that are fitted; by default a row's, and half, a quarter, an eighth",
    )
    rows: int = Field(128, ge=1, description="queries of a tile")
    keys: int = Field(128, ge=1, description="keys of a tile, as the kernel that will run has it")
    fit: Literal["log", "linear"] = Field(
        "log", description="least squares of the threshold's logarithm, or of itself (ModelOpt's)"
    )

    anchored: bool = Field(
        True,
        description="move the fit so that the wanted share itself is met on the calibration text; "
        "false: ModelOpt's coefficients as they are",
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.prefill is None and self.decode is None:
            raise ValueError("prefill and decode are both null: nothing would be skipped")
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError("lengths ascend")
        return self

    def needs(self) -> Needs:
        return Needs(tokens=True)

    def _lengths(self, length: int) -> tuple[int, ...]:
        most = [n for n in (length // 8, length // 4, length // 2, length) if n >= 4 * self.keys]
        return self.lengths or tuple(most) or (length,)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        lengths = self._lengths(context.length)
        if lengths[-1] > context.length:
            yield InputError(
                f"lengths: {lengths[-1]} tokens are asked for, rows of calibration have "
                f"{context.length}",
                hint=f"calibration: {{length: {lengths[-1]}}}",
            )
        if lengths[0] < 4 * self.keys:
            yield InputError(
                f"{lengths[0]} tokens are {lengths[0] // self.keys} tiles of {self.keys} keys: too "
                "few to fit a share of skipped ones",
                hint=f"longer rows of calibration, at least {4 * self.keys}, or smaller tiles",
            )
        if context.rows < 2:
            yield InputError(
                "one row of calibration tokens cannot be fitted and held out",
                hint="calibration: {samples: 8}",
            )

    def longest_text(self, length: int) -> int | None:
        return self._lengths(length)[-1]

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        scores = 2.0 * context.rows * context.length**2
        return Cost(scores=scores, notes=(f"thresholds fitted at {self._lengths(context.length)}",))

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Fits]:
        ids, layers = context.ids, len(model.layout.blocks)
        held = max(1, len(ids) // 4)
        phases = {"prefill": self.prefill, "decode": self.decode}
        wanted = {phase: share for phase, share in phases.items() if share is not None}
        trials = torch.tensor(SKIP_TRIALS, dtype=torch.float64)
        counts: dict[str, dict[tuple[int, int], Tensor]] = {phase: {} for phase in wanted}

        def count(unit: UnitLayout, call: AttentionCall) -> None:
            for phase, row, query, key in self._calls(call, counts, ids.shape[1]):
                share = self._skipped(query, key, trials, call.scaling)
                place = (key.shape[2], row)
                counts[phase][place] = counts[phase].get(place, 0.0) + share / layers

        watch_attention(model, ids[:-held], count, batch=context.batch, progress=context.progress)
        fits = {phase: self._fitted(phase, found, wanted[phase]) for phase, found in counts.items()}
        achieved: dict[tuple[str, str], list[float]] = {}

        def achieve(unit: UnitLayout, call: AttentionCall) -> None:
            for phase, _, query, key in self._calls(call, counts, ids.shape[1]):
                limit = fits[phase].scale(wanted[phase]) / key.shape[2]
                at = torch.tensor([min(limit, 0.999)], dtype=torch.float64)
                for name, sizes in (("measured", (self.rows, self.keys)), ("deployed", DEPLOYED)):
                    share = self._skipped(query, key, at, call.scaling, sizes)
                    achieved.setdefault((phase, name), []).append(float(share))

        watch_attention(model, ids[-held:], achieve, batch=context.batch)
        rows = [
            {
                "name": phase,
                "wanted": wanted[phase],
                "skipped on held-out text": fmean(achieved[phase, "measured"]),
                "tile": f"{self.rows} x {self.keys}",
                "skipped by ModelOpt's tiles": fmean(achieved[phase, "deployed"]),
                "ModelOpt's tile": f"{DEPLOYED[0]} x {DEPLOYED[1]}",
                **asdict(fit),
                "extrapolated": not fit.observed[0] <= wanted[phase] <= fit.observed[1],
            }
            for phase, fit in fits.items()
        ]
        return LearnResult(
            Fits(**{p: asdict(fit) for p, fit in fits.items()}, targets=attention_classes(model)),
            rows=rows,
            plots=_plot(counts, self._lengths(ids.shape[1])),
        )

    def _calls(
        self, call: AttentionCall, phases: Collection[str], length: int
    ) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """Texts that begin with a call's rows: phase, row, queries and keys [1, heads, n, dim]."""
        for number, (query, key) in enumerate(zip(call.query, call.key, strict=True)):
            for end in self._lengths(length):
                q, k = query[None, :, :end], key[None, :, :end]
                if "prefill" in phases:
                    yield "prefill", call.first_row + number, q, k
                for back in range(STEPS if "decode" in phases else 0):
                    stop = end - back
                    step = q[:, :, stop - 1 : stop]
                    yield "decode", call.first_row + number, step, k[:, :, :stop]

    def _skipped(
        self, q: Tensor, k: Tensor, trials: Tensor, scale: float,
        sizes: tuple[int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Share of tiles that each threshold would skip, fp64, over all heads; a single query's
        heads are read together, by KV head."""
        rows, keys = sizes or (self.rows, self.keys)
        packed = q.shape[2] == 1
        rows = 1 if packed else rows
        gaps = tile_gaps_ref(q, k, rows=rows, keys=keys, packed=packed, scale=scale)
        visited = visited_tiles(q.shape[2], k.shape[2], rows=rows, keys=keys).to(gaps.device)
        gaps = gaps[:, :, visited].double().flatten()
        return (gaps < trials.log().to(gaps.device)[:, None]).double().mean(1).cpu()

    def _fitted(
        self, phase: str, counts: Mapping[tuple[int, int], Tensor], wanted: float
    ) -> SkipScale:
        lengths = torch.tensor([length for length, _ in counts])
        shares = torch.stack(list(counts.values()))
        fit = fit_skip_scale(lengths, shares, in_logs=self.fit == "log")
        if fit is None:
            raise InputError(
                f"blasst: no threshold skips between 10 % and 90 % of the {phase} tiles of "
                f"{self.keys} keys on this text",
                hint="longer rows of calibration, or smaller tiles",
            )
        return anchored(fit, lengths, shares, wanted=wanted) if self.anchored else fit

    def policy(self, layout: ModelLayout, learned: Fits | None) -> AttentionPolicy | None:
        found = learned or Fits(**{p: _UNKNOWN for p in ("prefill", "decode") if getattr(self, p)})
        phases = {
            phase: _phase(fit, getattr(self, phase))
            for phase in ("prefill", "decode")
            if (fit := getattr(found, phase)) is not None
        }
        rule = Skipping(**phases, rows=self.rows, keys=self.keys, targets=tuple(found.targets))
        made_by = {"blasst": {"parameters": self.parameters, **found.figures()}}
        return rule_policy(layout, rule, made_by=made_by)


_UNKNOWN = {"a": 1.0, "b": 1.0, "lengths": (1, 1)}
"""What stands for a fit before there is one."""


def _phase(fit: Mapping[str, Any], wanted: float) -> SkipPhase:
    """A fit as a rule has it. What was asked for counts as calibrated, marked as extrapolated in
    the report where the text did not show it."""
    least, most = fit.get("observed", (wanted, wanted))
    return SkipPhase(
        a=fit["a"],
        b=fit["b"],
        sparsity=wanted,
        lengths=tuple(fit["lengths"]),
        shares=(min(least, wanted), max(most, wanted)),
    )


def _plot(
    counts: Mapping[str, Mapping[tuple[int, int], Tensor]], lengths: Collection[int]
) -> dict[str, bytes]:
    """Shares of skipped tiles by threshold, a line for each phase and length."""
    lines = {}
    for phase, found in counts.items():
        for length in lengths:
            texts = [share for (of, _), share in found.items() if of == length]
            mean = torch.stack(texts).mean(0).tolist()
            lines[f"{phase}, {length} tokens"] = list(zip(SKIP_TRIALS, mean, strict=True))
    plot = curves(lines, title="Skipped tiles", x="threshold", y="share of tiles", log=True)
    return {} if plot is None else {"blasst.png": plot}


def attention_classes(model: SourceModel) -> tuple[str, ...]:
    """Names of a model's attention classes, as runtimes match modules by them: `LlamaAttention` of
    `LlamaForCausalLM`."""
    names = model.config.get("architectures") or []
    return tuple(sorted({f"{name.partition('For')[0]}Attention" for name in names}))

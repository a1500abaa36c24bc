"""Second-order codes on searched grids, then refined block by block with gradients.

The start is that of `gptq` at its best: scales searched by what each input weighs, GPTQ towards
targets corrected by a second stream of the original model's activations, coordinate descent. Then
the scales of a whole block, and with `reach` its codes, move together, so that what leaves it comes
closer to what leaves the original one (BRECQ, arXiv 2102.05426; AutoRound, arXiv 2309.05516). Rows
that no step has seen judge it: what is not better on them is not taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from compressor_calibration.stats import StatNeeds
from pydantic import Field
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, decode_elements
from compressor.ir.unit import Unit
from compressor.methods.base import BlockNeeds, Needs
from compressor.methods.common.block_fit import Division, Kept, draws, loss_of, scale_steps, steps
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.on_grid import OnGrid
from compressor.methods.common.rounding import with_input_scales
from compressor.methods.common.second_order import GptqOptions, round_unit
from compressor.numerics.learned_floats import e2m1_step, floats_qtensor, moved_elements
from compressor.numerics.learned_grid import (
    as_qtensor,
    grouped,
    moved_codes,
    scale_gradient,
    stretched,
)
from compressor.runner.pieces import UNREPEATABLE

COPIES = 4
"""Codes, what they stand for and what lies between, for each weight."""
MOVING_COPIES = 6
"""Where codes move: offsets, their gradients, Adam's two moments and the best ones."""
CHECKS = 4
"""Times that the rows held back are looked at, at the end the last time."""
EDGE = 0.45
"""How far from its code a weight may begin. GPTQ's codes need not be nearest, and a weight that
began beyond its neighbour would turn back at once."""


class Preset(NamedTuple):
    """How much is done: sweeps of coordinate descent, and steps with gradients."""

    descent: int
    steps: int


PRESETS = {"fast": Preset(0, 40), "good": Preset(2, 100), "best": Preset(2, 400)}


class Reconstruct(OnGrid):
    """Round with GPTQ on searched grids, then refine the scales of each block together."""

    version: ClassVar[int] = 6

    preset: Literal["fast", "good", "best"] = Field(
        "good", description="how much is done: 40, 100 or 400 steps; descent before all but fast"
    )
    batch: int = Field(8, ge=1, description="calibration rows in each step")
    held_back: int = Field(
        8, ge=1, description="calibration rows that no step sees, which judge the refinement"
    )
    scale_rate: float = Field(
        0.005, gt=0, le=1, description="how far the first step moves the logarithm of a scale"
    )
    reach: float | None = Field(
        None,
        ge=0,
        le=2,
        description="how far all steps together move a weight between codes; 0: scales alone move; "
        "null: 0, and 0.3 on mxfp4, whose powers of two do not move",
    )
    damping: float = Field(
        0.3,
        gt=0,
        le=1,
        description="share of the Gram matrix's mean diagonal added to it: less follows the "
        "calibration text more closely",
    )
    correction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of what earlier rounding did to a linear's inputs that its weights make "
        "good at the start; nothing with propagate: original",
    )
    min_tokens: int = Field(
        64, ge=1, description="what fewer tokens went through keeps the nearest codes"
    )

    @property
    def moves(self) -> float:
        """How far weights move between codes."""
        return (0.3 if self.grid == "mxfp4" else 0.0) if self.reach is None else self.reach

    def needs(self) -> Needs:
        count = PRESETS[self.preset].steps
        copies = COPIES + (MOVING_COPIES if self.moves else 0)
        cross = self.correction > 0
        return Needs(
            stats=StatNeeds(gram=True, absmax=self.reads_absmax, cross=cross),
            block=BlockNeeds(steps=count, rows=self.batch, copies=copies),
        )

    def check(self, context: PlanContext) -> Iterator[InputError]:
        yield from super().check(context)
        if self.grid == "mxfp4" and not self.moves:
            yield InputError(
                "powers of two do not move, and with reach: 0 codes do not either",
                hint="leave reach out, or use gptq",
            )
        if context.rows < self.batch + self.held_back:
            yield InputError(
                f"each step reads {self.batch} rows and {self.held_back} are held back, but "
                f"calibration has {context.rows}",
                hint="raise calibration.samples (128 or more), or lower batch or held_back",
            )

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        options = GptqOptions(
            damping=self.damping,
            min_tokens=self.min_tokens,
            descent=PRESETS[self.preset].descent,
            correction=self.correction,
        )
        unit = with_input_scales(unit, context.coded, context)
        started, rows = round_unit(unit, context, options, search=True)
        # What too few tokens went to would learn those by heart: it keeps the nearest codes.
        seen = {row["linear"] for row in rows if row["error_of"] == "output"}
        learned = [x for x in context.coded if x.name in seen]
        if context.tune is None or not learned:
            return PassResult(started, rows)
        ranks = context.ranks
        division = Division.of(learned, ranks) if self.moves else Division.none(ranks)
        roundings = {
            x.name: refined_rounding(
                unit.weight(x), started.quantized[x.name], moving=self.moves > 0
            )
            for x in learned
            if division.mine(x)
        }
        refined = self._refine(roundings, started, context, division)
        if kept := len(context.coded) - len(learned):
            refined[0]["linears_kept_nearest"] = kept
        made = division.every({name: found.quantized() for name, found in roundings.items()})
        for linear in learned:
            started = started.with_quantized(linear, made[linear.name])
        return PassResult(started, [*refined, *rows])

    def _refine(
        self,
        roundings: dict[str, RefinedRounding],
        unit: Unit,
        context: PassContext,
        division: Division,
    ) -> list[dict[str, Any]]:
        """Refine a block, and say what came of it in rows of the report.

        roundings  of the linears that this rank learns
        """
        assert context.tune is not None
        block = context.tune(unit)
        order = torch.randperm(
            block.rows, generator=torch.Generator().manual_seed(context.seed)
        ).tolist()
        judges, seen = order[: self.held_back], order[self.held_back :]
        count = PRESETS[self.preset].steps
        start = least = loss_of(block, roundings, judges, division)
        kept, best_step = Kept(roundings), 0
        logs = [r.logs for r in roundings.values() if r.logs.requires_grad]
        groups: list[dict[str, Any]] = [{"params": logs, "lr": self.scale_rate}]
        if self.moves:
            # Rates fall linearly to zero, so that all steps together go half as far.
            moving = [r.offsets for r in roundings.values()]
            groups.append({"params": moving, "lr": 2 * self.moves / count})
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=count)

        def update(number: int) -> None:
            adam.step()
            falling.step()

        batches = draws(seen, self.batch, torch.Generator().manual_seed(context.seed + 1))
        how: dict[str, Any] = {"count": count, "batches": batches, "progress": context.progress}
        numbers = scale_steps(block, roundings, update, **how)
        if self.moves:
            of_all = steps(block, roundings, update, division=division, **how)
            numbers = (step.number for step in of_all)
        for number in numbers:
            if number and number % (count // CHECKS) == 0:
                least, best_step = self._judged(
                    loss_of(block, roundings, judges, division), number, least, best_step, kept
                )
        least, best_step = self._judged(
            loss_of(block, roundings, judges, division), count, least, best_step, kept
        )
        # Where all ranks learned the same, they go on with what one of them has.
        kept.restore(None if self.moves else context.ranks.share(kept.copies))
        of_block = {"block": unit.layout.name}
        rows = [{**of_block, "loss_of_start": start, "loss": least, "best_step": best_step}]
        if not best_step:
            rows[0]["note"] = "refining made rows that were held back no better: its start is kept"
        if not block.repeatable:
            rows.append({**of_block, "note": UNREPEATABLE})
        return rows

    @staticmethod
    def _judged(
        loss: float, number: int, least: float, best_step: int, kept: Kept
    ) -> tuple[float, int]:
        if not loss < least:
            return least, best_step
        kept.keep()
        return loss, number


class RefinedRounding:
    """One weight [out, in] that begins at given codes and scales; zero points stay, and codes too
    unless they are moving."""

    def __init__(self, weight: Tensor, q: QTensor, *, moving: bool) -> None:
        self.spec = q.spec
        self.scales = q.scales.float()
        codes = grouped(q.codes.float(), q.spec)
        self.moving = moving
        self.zeros = None if q.zeros is None else q.zeros.float()
        self.zero = 2.0 ** (q.spec.bits - 1) if self.zeros is None else self.zeros[..., None]
        if moving:
            exact = grouped(weight.float(), q.spec) / self.scales[..., None] + self.zero
            self._begin(codes, exact - codes)
        else:
            self._stay(codes - self.zero)
        self.logs = torch.zeros_like(self.scales).requires_grad_()

    def _begin(self, codes: Tensor, offsets: Tensor) -> None:
        """Codes that move, each from its weight's own place."""
        self.codes = codes
        self.offsets = offsets.clamp_(-EDGE, EDGE).nan_to_num_(nan=0.0).requires_grad_()

    def _stay(self, steps: Tensor) -> None:
        """Codes that do not, less their zero points: 8 bits of significand hold them."""
        self.steps = steps.to(torch.bfloat16)

    def parameters(self) -> list[Tensor]:
        moving = [self.offsets] if self.moving else []
        return [self.logs, *moving] if self.logs.requires_grad else moving

    def weight(self) -> Tensor:
        steps, scales = self._rounded()
        return (steps * scales[..., None]).flatten(1)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scales.shape[0], self.steps[0].numel()

    @property
    def folded(self) -> tuple[int, ...]:
        return tuple(self.scales.shape)

    def scales_made(self) -> Tensor:
        return stretched(self.scales, self.logs, self.spec.scale_dtype)

    def write(self, out: Tensor) -> None:
        self._write(self.scales_made(), out)

    def _write(self, scales: Tensor, out: Tensor) -> None:
        torch.mul(self.steps, scales[..., None], out=out.view(self.steps.shape))

    def fold(self, gradient: Tensor) -> Tensor:
        return scale_gradient(gradient, self.steps)

    @torch.no_grad()
    def quantized(self) -> QTensor:
        return as_qtensor(*self._rounded(), self.zeros, self.spec)

    def _rounded(self) -> tuple[Tensor, Tensor]:
        scales = self.scales_made()
        if not self.moving:
            return self.steps, scales
        return moved_codes(self.codes + self.offsets, self.spec) - self.zero, scales


class RefinedFloats(RefinedRounding):
    """The same on NVFP4, whose scales move from one E4M3 number to another, and on MXFP4, whose
    scales stay. The global scale stays."""

    def __init__(self, weight: Tensor, q: QTensor, *, moving: bool) -> None:
        self.spec, self.second = q.spec, q.second
        self.scales = q.scales.float()
        elements = decode_elements(q.codes, q.spec, torch.float32)
        elements = elements.view(*self.scales.shape, -1)
        self.moving = moving
        if moving:
            unit = self.scales if q.second is None else self.scales * q.second
            safe = torch.where(unit > 0, unit, 1.0)[..., None]
            exact = weight.float().view(elements.shape) / safe
            self._begin(elements, (exact - elements) / e2m1_step(elements))
        else:
            self._stay(elements)
        self.logs = torch.zeros_like(self.scales).requires_grad_(not q.spec.microscaled)

    def weight(self) -> Tensor:
        made = super().weight()
        return made if self.second is None else made * self.second

    def write(self, out: Tensor) -> None:
        scales = self.scales_made()
        self._write(scales if self.second is None else scales * self.second, out)

    def fold(self, gradient: Tensor) -> Tensor:
        made = super().fold(gradient)
        return made if self.second is None else made * self.second

    @torch.no_grad()
    def quantized(self) -> QTensor:
        return floats_qtensor(*self._rounded(), self.second, self.spec)

    def _rounded(self) -> tuple[Tensor, Tensor]:
        elements = moved_elements(self.codes, self.offsets) if self.moving else self.steps
        if self.spec.microscaled:
            return elements, self.scales
        return elements, stretched(self.scales, self.logs, self.spec.scale_dtype)


def refined_rounding(weight: Tensor, q: QTensor, *, moving: bool) -> RefinedRounding:
    """What is refined of a weight [out, in], given codes and scales on its grid."""
    kind = RefinedRounding if q.spec.element == "int" else RefinedFloats
    return kind(weight, q, moving=moving)

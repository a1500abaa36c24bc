"""BitDelta: a fine-tune as signs and one scale for each matrix, on top of its base.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit" (arXiv 2402.10193). The mean
magnitude of the difference is the scale that leaves the smallest squared error of the weights;
distillation then moves the scales to where the model's outputs are closest to the fine-tune's.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from compressor_calibration.stats import StatNeeds
from pydantic import Field, model_validator
from torch import Tensor

from compressor.ir.layout import Linear
from compressor.ir.unit import Unit
from compressor.methods.base import Cost, Effects, ModelPass, Needs
from compressor.methods.bitdelta.distillation import Settings, distill
from compressor.methods.common.context import (
    LearnContext,
    LearnResult,
    PassContext,
    PassResult,
    PlanContext,
)
from compressor.methods.common.learned import Learned
from compressor.numerics.bitdelta import SCALES, SIGNS, SignDelta, fit_scales, sign_delta
from compressor.numerics.gram import output_error
from compressor.runner.source_model import SourceModel


class Distilled(Learned):
    """What was trained on the fine-tune's logits; nothing where nothing was.

    scales  module path → [bits];  norms  name of a tensor → the trained one
    """

    scales: dict[str, Tensor] = Field(default_factory=dict)
    norms: dict[str, Tensor] = Field(default_factory=dict)


class Bitdelta(ModelPass[Distilled]):
    """Store a fine-tune as its difference to a base: signs, and one trained scale for each matrix.

    The model of the recipe is the fine-tune. What is no target, and every bias, is stored in full.
    """

    version: ClassVar[int] = 2

    base: str = Field(description="what was fine-tuned: folder, Hub id (id@revision) or GGUF file")
    bits: int = Field(1, ge=1, le=4, description="signs of one weight, each with its own scale")
    distill: Literal["none", "logits", "layer"] = Field(
        "logits",
        description="how scales are fitted: to the fine-tune's logits through the whole model, to "
        "each layer's own outputs with one unit in memory, or not at all",
    )
    steps: int = Field(200, ge=1, description="steps of AdamW over the logits")
    batch: int = Field(4, ge=1, description="rows of calibration tokens in one step")
    lr: float | None = Field(
        None,
        gt=0,
        description="learning rate, annealed to 0 by a cosine; null for 3 % of the median initial "
        "scale (1e-4 is the published one, for differences of 7B models)",
    )

    norms: bool = Field(
        False, description="also train the blocks' norms on the logits; they are stored in full"
    )

    @model_validator(mode="after")
    def _norms_need_logits(self) -> Self:
        if self.norms and self.distill != "logits":
            raise ValueError("norms are trained on logits: distill: logits")
        return self

    def effects(self) -> Effects:
        return Effects(only_format="bitdelta", delta_bits=self.bits, retrains_norms=self.norms)

    def needs(self) -> Needs:
        logits = self.distill == "logits"
        stats = StatNeeds(gram=self.distill == "layer")
        return Needs(stats=stats, tokens=logits, whole_model=logits, base=self.base)

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        # Logits of both models, their difference and its gradient, in float32.
        tokens = self.batch * context.length
        return Cost(memory=4 * 4 * tokens * context.layout.sizes.vocabulary)

    def divides(self, *, one_host: bool) -> bool:
        return self.distill == "logits"

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Distilled]:
        """Scales by module path, trained on the logits."""
        if self.distill != "logits":
            return super().learn(model, context)
        settings = Settings(steps=self.steps, batch=self.batch, lr=self.lr, norms=self.norms)
        trained = distill(model, context, context.ids, bits=self.bits, settings=settings)
        row = {"linear": "all", "loss_before": trained.before, "loss_after": trained.after}
        value = Distilled(scales=dict(trained.scales), norms=dict(trained.norms))
        return LearnResult(value, rows=[row])

    def apply(self, unit: Unit, context: PassContext, learned: Distilled) -> PassResult:
        rows: list[Mapping[str, Any]] = []
        made: dict[str, Tensor] = {}
        for linear in context.selected:
            base = context.base.get(linear.weight_name)
            if base is None:  # the base has this very weight
                continue
            weight = unit.weight(linear)
            base = base.to(weight.device, torch.float32)
            delta = self._delta(linear, weight - base, context, learned)
            made[f"{linear.name}.{SIGNS}"] = delta.signs
            made[f"{linear.name}.{SCALES}"] = delta.scales
            rows.append(_row(linear, weight, base, delta, context))
        own = learned.norms.items()
        norms = {n: t.to(unit.tensors[n].device) for n, t in own if n in unit.tensors}
        return PassResult(unit.with_tensors(norms).with_extra(made), rows)

    def _delta(
        self, linear: Linear, difference: Tensor, context: PassContext, learned: Distilled
    ) -> SignDelta:
        delta = sign_delta(difference, bits=self.bits)
        trained = learned.scales.get(linear.name)
        if trained is not None:
            return SignDelta(delta.signs, trained.to(delta.scales.device), delta.in_features)
        stats = context.stats.get(linear.site) if self.distill == "layer" else None
        if stats is None or not stats.tokens:
            return delta
        return fit_scales(delta, difference, stats.gram)


def _row(
    linear: Linear, weight: Tensor, base: Tensor, delta: SignDelta, context: PassContext
) -> Mapping[str, Any]:
    """A report row: error of the output or weight, and the share of the difference that is left."""
    stats = context.stats.get(linear.site)
    known = stats is not None and stats.needs.gram and stats.tokens > 0
    gram = stats.gram if stats is not None and known else None
    merged = delta.merged(base, torch.float32)
    whole = (weight - base).square().sum()
    return {
        "linear": linear.name,
        "bits": delta.signs.shape[0],
        "scale": float(delta.scales[0]),
        "left": float((weight - merged).square().sum() / whole.clamp(min=1e-30)),
        "error": output_error(weight, merged, gram),
        "error_of": "output" if known else "weight",
    }

"""What watches a unit of the job while its calibration inputs run through it."""

from collections.abc import Mapping

from compressor_calibration.stats import SiteStats, StatNeeds
from torch import Tensor

from compressor.checkpoint.source import Finite
from compressor.ir.unit import Unit
from compressor.plan.unit_plan import Observable
from compressor.run.apply import Observe, ObserveSite
from compressor.run.original import in_dtype
from compressor.runner.block_runner import Block
from compressor.runner.observe import Observation, observe
from compressor.runner.stream import Stream
from compressor.runner.sweep import Step
from compressor.runner.two_streams import observe_beside


def observer(step: Step, block: Block, *, all_experts: bool) -> Observe:
    """Observes a block that is loaded with its weights before any pass."""
    stream, execution = step.stream, step.execution

    def look(current: Unit, changed: bool, wanted: Observable) -> Observation:
        if changed:
            block.tensors = current.dequantized()
            block.load(block.tensors)
        return execution.halving(
            lambda batch: observe(
                block,
                stream,
                needs=wanted.sites,
                batch=batch,
                kv=wanted.kv,
                all_experts=all_experts,
                ranks=execution.ranks,
            )
        )

    return look


def when_finite(look: Observe, finite: Finite) -> Observe:
    """The same, which then raises InputError where the unit's weights are not finite."""

    def then(current: Unit, changed: bool, wanted: Observable) -> Observation:
        seen = look(current, changed, wanted)
        finite.require()
        return seen

    return then


def observer_beside(step: Step, block: Block, originals: Stream) -> ObserveSite:
    """Observes single sites of it, and of the original model beside it."""
    stream, execution = step.stream, step.execution

    def look(exact: Unit, current: Unit, site: str, needs: StatNeeds) -> SiteStats:
        dtype = block.runner.dtype
        weights = [in_dtype(x.dequantized(dtype), dtype) for x in (exact, current)]
        sides = list(zip(weights, (originals, stream), strict=True))
        return execution.halving(
            lambda batch: observe_beside(
                block, sides, site=site, needs=needs, batch=batch, ranks=execution.ranks
            )
        )

    return look


def observer_of_head(step: Step, tensors: Mapping[str, Tensor]) -> Observe:
    """Observes what enters lm_head."""
    stream, execution, runner = step.stream, step.execution, step.model.runner

    def look(current: Unit, changed: bool, wanted: Observable) -> Observation:
        (site,) = wanted.sites
        known = current.dequantized() if changed else tensors
        needs, ranks = wanted.sites[site], execution.ranks
        stats = runner.head_stats(
            known, stream.hidden, needs=needs, batch=execution.batch, ranks=ranks
        )
        return Observation(
            stats={site: stats}, module_loss=_no_module_loss, left_out=stats.bad_tokens
        )

    return look


def _no_module_loss(site: str, weights: Mapping[str, Tensor]) -> float:
    raise AssertionError(f"{site} was not observed")

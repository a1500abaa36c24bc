"""One block of a tiny model and inputs for it, to try passes on."""

from functools import partial

import torch
from compressor_calibration.stats import StatNeeds

from compressor.checkpoint.source import open_source
from compressor.ir.scheme import Scheme
from compressor.methods.common.context import PassContext
from compressor.runner.block_runner import BlockRunner
from compressor.runner.observe import observe
from compressor.runner.simulate import StoredInput, quantized_inputs
from compressor.runner.stream import Stream
from compressor.runner.sweep import Execution
from compressor.runner.tunable_block import TunableBlock

GRAM = StatNeeds(gram=True)


class BlockBench:
    """The second block of a tiny model; tests may change its `unit`.

    wanted  statistics that runs gather beside what their pass needs: errors are reported with them
    """

    def __init__(self, folder, *, rows=8, length=40, wanted=GRAM):
        source = open_source(folder)
        self.runner = BlockRunner(
            source.checkpoint.config,
            source.arch.runtime,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        first, _, self.layout, _ = source.layout.units
        ids = torch.randint(2, 256, (rows, length), generator=torch.Generator().manual_seed(5))
        self.hidden = self.runner.embed(source.read_unit(first).dequantized(), ids)
        self.unit = source.read_unit(self.layout)
        self.type, self.wanted = source.layout.model_type, wanted

    def observe(self, unit, step):
        """Statistics of every site of a unit, as the step would see them."""
        with self.runner.loaded(self.layout, unit.dequantized()) as block:
            return dict(self._observed(block, step).stats.items())

    def _observed(self, block, step):
        needs = dict.fromkeys(self.layout.sites, step.needs().stats | self.wanted)
        batch = max(len(self.hidden) // 2, 1)
        return observe(block, Stream(self.hidden), needs=needs, batch=batch)

    def run(self, step, *, unit=None, then=None, spec=None, patch=None):
        """The step's result on this block.

        unit   what it is run on, in place of the bench's own
        then   the quantizer that comes later, for a step that makes no codes itself
        spec   of all that the step selects, in place of the quantizer's
        patch  changes the statistics before the step sees them
        """
        unit = self.unit if unit is None else unit
        quantizer = then if then is not None and step.effects().scheme is None else step
        scheme = (quantizer.effects().scheme if spec is None else Scheme(weight=spec)) or Scheme()
        picked = step.selection.pick(self.layout.linears)
        schemes = dict.fromkeys((x.name for x in picked), scheme)
        with self.runner.loaded(self.layout, unit.dequantized()) as block:
            seen = self._observed(block, step)
            stats = dict(seen.stats.items())
            if patch is not None:
                patch(stats)
            context = PassContext(
                stats=stats,
                schemes=schemes,
                selected=picked,
                module_loss=seen.module_loss,
                seed=0,
                rounding={x.name: quantizer.effects().rounding for x in picked},
                fitted=frozenset(schemes) if quantizer.effects().fits_ranges else frozenset(),
                model_type=self.type,
                tune=partial(self._tuned, block, {x.name: scheme for x in picked})
                if step.needs().block
                else None,
            )
            return step.apply(unit, context)

    def _tuned(self, block, schemes, unit):
        targets = Stream(self.output(self.unit))
        block.load(block.tensors)
        return TunableBlock(
            block,
            unit,
            inputs=Stream(self.hidden),
            targets=targets,
            execution=Execution(4),
            schemes=schemes,
        )

    def output(self, unit, scheme=None):
        """The block's output, with quantized inputs where a scheme says so."""
        inputs = {}
        if scheme is not None and scheme.input is not None:
            inputs = {
                name: StoredInput(scheme.input, unit.input_scales.get(name))
                for name in unit.quantized
            }
        with (
            self.runner.loaded(self.layout, unit.dequantized()) as block,
            quantized_inputs(block, inputs),
        ):
            return block.forward(self.hidden)

    def error(self, result, scheme=None):
        """Mean squared error of the block's output, as a share of the output's variance."""
        want = self.output(self.unit)
        return float((self.output(result.unit, scheme) - want).square().mean() / want.var())

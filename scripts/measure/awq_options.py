"""Measure rtn, awq and its options on a checkpoint: perplexity, divergence and time.

    python scripts/measure/awq_options.py CHECKPOINT --group-size 64
    python scripts/measure/awq_options.py CHECKPOINT "awq: {bits: 4, duo: true}" "rtn: {bits: 4}"

A setting is a pass with its parameters, written as in a recipe; without any, rtn and awq are
compared at 4 and 3 bits, symmetric and asymmetric. Nothing is written: each block is calibrated,
changed by the pass, rounded to the checkpoint's dtype, and run over the held-out tokens, as a run
and an evaluation of its files would. Texts are the bundled ones, cut from their beginning.

The ratio is that of the perplexity to the unquantized model's, with its standard error over tokens.
KL is the mean divergence of the next token's distribution from the unquantized model's, in nats; on
as little text as this it tells settings apart far better than perplexity. Time is that of the
calibration and the pass, without reading the checkpoint and without the evaluation.
"""

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import windows
from torch import Tensor

from compressor.checkpoint.source import open_source
from compressor.errors import CompressError
from compressor.formats.base import get_format
from compressor.ir.scheme import Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Pass, get_pass
from compressor.methods.common.context import PassContext, PlanContext
from compressor.runner.observe import observe
from compressor.runner.source_model import SourceModel
from compressor.runner.stream import Stream
from compressor.runner.sweep import Execution, Step, sweep
from compressor.runner.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    setting: str
    perplexity: float
    ratio: float
    ratio_error: float
    kl: float
    seconds: float


class Measure:
    """A checkpoint that runs block by block, and both token sets."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        source = open_source(options.checkpoint)
        device = torch.device(options.device)
        dtype = torch.float32 if device.type == "cpu" else source.checkpoint.dtype
        self.model = SourceModel(source, device=device, dtype=dtype)
        self.execution = Execution(options.batch)
        tokenizer = load_tokenizer(options.checkpoint)

        def cut(data: str, part: str, rows: int, length: int) -> Tensor:
            documents = read_documents(data, part=part)
            return windows(tokenizer, documents, windows=rows, length=length).ids

        self.calibration = cut(options.calibration, "calibration", options.samples, options.length)
        self.targets = cut(options.evaluation, "held_out", options.windows, options.window)
        for step in sweep(self.model, self.targets, execution=self.execution):
            if step.layout.index == 0:
                self.entering = step.stream.copy()
            step.run()
        self.original = step.stream

    def apply(self, method: Pass, step: Step) -> dict[str, Tensor]:
        """A block's tensors after the pass, as they would be read back from the files."""
        layout, read = step.layout, step.source.dequantized()
        unit = Unit(layout, {k: v.to(self.model.device, torch.float32) for k, v in read.items()})
        scheme = method.effects().scheme
        assert scheme is not None and scheme.weight is not None
        dtype = self.model.source.checkpoint.dtype
        stored = get_format("compressed-tensors").scale_dtype(scheme.weight, dtype)
        scheme = Scheme(weight=replace(scheme.weight, scale_dtype=stored))
        selected = method.selection.pick(layout.linears)
        with step.loaded(unit.tensors) as block:
            needs = {linear.site: method.needs().stats for linear in selected}
            seen = observe(block, step.stream, needs=needs, batch=self.options.batch)
            context = PassContext(
                stats=seen.stats,
                schemes={linear.name: scheme for linear in selected},
                selected=selected,
                module_loss=seen.module_loss,
                seed=0,
            )
            changed = method.apply(unit, context).unit
        rounded = {k: v.to(dtype).float() for k, v in changed.tensors.items()}
        return replace(changed, tensors=rounded).dequantized()

    def planned(self, step: Pass) -> PlanContext:
        """What a pass is told while a run is planned."""
        checkpoint = self.source.checkpoint
        return PlanContext(
            layout=self.source.layout,
            config=checkpoint.config,
            dtype=checkpoint.dtype,
            parameters=checkpoint.nbytes // checkpoint.dtype.itemsize,
            untied=False,
            selected=step.selection.pick([x for unit in self.blocks for x in unit.linears]),
            rows=self.options.samples,
            length=self.options.length,
        )

    def run(self, setting: str) -> Result:
        """Quantize all blocks as the setting says, one at a time, and evaluate."""
        (name, params), *more = yaml.safe_load(setting).items()
        if more:
            raise CompressError(f"{setting!r} is not one pass", hint='"awq: {bits: 4}"')
        method = get_pass(name).model_validate(params or {})
        if not isinstance(method, Pass):
            raise CompressError(f"{name} does not work unit by unit")
        for error in method.check(self.planned(method)):
            raise error
        held_out, seconds = self.entering.copy(), 0.0
        for step in sweep(self.model, self.calibration, execution=self.execution):
            start = time.perf_counter()
            tensors = self.apply(method, step)
            seconds += time.perf_counter() - start
            with step.loaded(tensors):
                step.run(held_out)
                if self.options.propagate == "quantized":
                    step.run()
        perplexity, ratio, error, kl = self.evaluate(held_out)
        return Result(setting, perplexity, ratio, error, kl, seconds)

    @torch.no_grad()
    def evaluate(self, states: Stream) -> tuple[float, float, float, float]:
        """Perplexity, its ratio to the original's with a standard error, and the KL divergence
        from the original, of what the blocks made of the held-out tokens."""
        losses, differences, divergence = [], [], 0.0
        with self.model.logits() as logits:
            for row, target in enumerate(self.targets):
                ours = torch.log_softmax(logits(states.hidden[row])[:-1], -1)
                base = torch.log_softmax(logits(self.original.hidden[row])[:-1], -1)
                at = target[1:, None].to(ours.device)
                losses.append(-ours.gather(1, at))
                differences.append((base - ours).gather(1, at))
                divergence += float((base.exp() * (base - ours)).sum(-1).mean())
        loss, difference = torch.cat(losses).double(), torch.cat(differences).double()
        ratio = math.exp(float(difference.mean()))
        error = ratio * float(difference.std()) / math.sqrt(difference.numel())
        return math.exp(float(loss.mean())), ratio, error, divergence / len(self.targets)


def default_settings(group_size: int) -> list[str]:
    """rtn and awq at 4 and 3 bits, symmetric and not."""
    return [
        f"{name}: {{bits: {bits}, group_size: {group_size}, symmetric: {str(symmetric).lower()}}}"
        for bits, symmetric, name in itertools.product((4, 3), (False, True), ("rtn", "awq"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("settings", nargs="*", help='passes, such as "awq: {bits: 4}"')
    parser.add_argument("--group-size", type=int, default=64, help="of the default settings")
    parser.add_argument(
        "--calibration", default="bundled/prose", help="as in a recipe, or a file of text"
    )
    parser.add_argument(
        "--evaluation", default="bundled/fiction", help="as in a recipe, or a file of text"
    )
    parser.add_argument("--samples", type=int, default=16, help="rows of calibration tokens")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--windows", type=int, default=8, help="rows of held-out tokens")
    parser.add_argument("--window", type=int, default=512, help="tokens of each")
    parser.add_argument("--propagate", choices=("quantized", "original"), default="quantized")
    parser.add_argument("--batch", type=int, default=8, help="rows run at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    measure = Measure(options)
    perplexity, *_ = measure.evaluate(measure.original)
    print(f"{'perplexity':>10} {'ratio':>17} {'KL':>8} {'seconds':>8}  setting")
    print(f"{perplexity:>10.3f} {'':>17} {0:>8.4f} {'':>8}  unquantized", flush=True)
    rows = []
    for setting in options.settings or default_settings(options.group_size):
        row = measure.run(setting)
        rows.append(asdict(row))
        ratio = f"{row.ratio:.4f} ± {row.ratio_error:.4f}"
        figures = f"{row.perplexity:>10.3f} {ratio:>17} {row.kl:>8.4f} {row.seconds:>8.1f}"
        print(f"{figures}  {setting}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"unquantized": perplexity, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

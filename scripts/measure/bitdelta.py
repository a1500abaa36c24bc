"""Measure deltas of a fine-tune on held-out text of its style: perplexity, KL, bytes and time.

    python scripts/measure/bitdelta.py BASE FINE --held-out moby.txt --range 400000:460000

Base and fine-tune, then deltas: initial scales, scales distilled on the logits and layer by layer,
more bits, and a low-rank delta (the truncated SVD of each difference, factors in 16 bits) that
takes no more bytes than one sign for each weight. Everything but the linears of the blocks is the
fine-tune's own in all of them. KL is from the fine-tune's next-token distribution, in nats. The
tokens of distillation are the bundled calibration text unless --calibration names another.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.checkpoint.delta.base import base_weights
from compressor.checkpoint.delta.source import open_model
from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.source import Source, as_source, open_source
from compressor.evaluate.perplexity import evaluate
from compressor.evaluate.settings import Evaluation
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.run.tokens import evaluation_tokens
from compressor.runner.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Replaced(Checkpoint):
    """A checkpoint of which some tensors are others, in memory."""

    tensors: dict[str, Tensor]
    rest: Checkpoint

    def read(
        self, names: Iterable[str], *, pin: bool = False, threads: int = 4
    ) -> dict[str, Tensor]:
        wanted = list(names)
        found = self.rest.read([n for n in wanted if n not in self.tensors], threads=threads)
        return {name: self.tensors.get(name, found.get(name)) for name in wanted}


def low_rank(base: Source, fine: Source, *, device: torch.device) -> tuple[Source, int]:
    """The fine-tune with each linear's difference cut to as many ranks as one bit pays for, and
    the bytes of all factors."""
    tensors, size = {}, 0
    for unit in fine.layout.blocks:
        linears = [linear for linear in unit.linears if linear.role != "router"]
        names = [linear.name for linear in linears]
        before, after = base_weights(base, names), base_weights(fine, names)
        for linear in linears:
            name = linear.weight_name
            old, new = before[name].to(device).float(), after[name].to(device).float()
            rows, columns = linear.shape
            rank = max(1, rows * columns // (16 * (rows + columns)))
            u, s, v = torch.linalg.svd(new - old, full_matrices=False)
            left = (u[:, :rank] * s[:rank].sqrt()).to(torch.bfloat16).float()
            right = (v[:rank] * s[:rank].sqrt()[:, None]).to(torch.bfloat16).float()
            tensors[name] = (old + left @ right).to(after[name].dtype).cpu()
            size += 2 * rank * (rows + columns)
    checkpoint = fine.checkpoint
    replaced = Replaced(
        checkpoint.folder, checkpoint.config, checkpoint.entries, tensors, checkpoint
    )
    return as_source(replaced), size


class Measure:
    """Both checkpoints, the held-out tokens and the table."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.device = choose_device(options.device)
        self.base, self.fine = open_source(options.base), open_source(options.fine)
        start, _, stop = options.range.partition(":")
        text = options.held_out.read_text("utf-8")
        held_out = folder / "held_out.txt"
        held_out.write_text(text[int(start or 0) : int(stop) if stop else None], "utf-8")
        wanted = Evaluation(data=str(held_out), windows=options.windows, length=options.window)
        self.tokens = evaluation_tokens(load_tokenizer(options.fine), wanted, calibration=None).ids
        self.rows: list[dict[str, object]] = []

    def row(self, name: str, source: Source, *, size: int, seconds: float = 0.0) -> None:
        """Evaluate a model and print its row; `size` counts the delta's own bytes."""
        dtype = self.fine.checkpoint.dtype if self.device.type == "cuda" else torch.float32
        # The fine-tune differs from the base in its vocabulary at times: then there is no KL.
        known = source.checkpoint.config.get("vocab_size")
        same = known == self.fine.checkpoint.config.get("vocab_size")
        found = evaluate(
            source,
            self.tokens,
            device=self.device,
            dtype=dtype,
            against=self.fine if same else None,
        )
        kl = found.kl.value if found.kl else float("nan")
        row = {
            "delta": name,
            "perplexity": found.perplexity.value,
            "kl": kl,
            "bytes": size,
            "seconds": seconds,
        }
        self.rows.append(row)
        if self.options.json:
            self.options.json.write_text(json.dumps(self.rows, indent=1))
        print(
            f"{found.perplexity.value:>10.3f} {kl:>8.4f} {size / 1e6:>9.2f} {seconds:>8.1f} "
            f" {name}",
            flush=True,
        )

    def delta(self, name: str, **params: object) -> None:
        """Make a delta with the pass and evaluate it together with the base."""
        options = self.options
        recipe = make_recipe(
            {
                "model": str(options.fine),
                "output": str(self.folder / name.replace(" ", "-")),
                "calibration": {
                    "data": options.calibration,
                    "samples": options.samples,
                    "length": options.length,
                },
                "passes": [{"bitdelta": {"base": str(options.base), **params}}],
                "propagate": options.propagate,
            }
        )
        started = time.perf_counter()
        output = compile_checkpoint(prepare(recipe, device=self.device)).output
        seconds = time.perf_counter() - started
        source = open_model(output, base=str(options.base))
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        self.row(name, source, size=size, seconds=seconds)

    def run(self) -> None:
        print(f"{'perplexity':>10} {'KL':>8} {'MB':>9} {'seconds':>8}", flush=True)
        options = self.options
        self.row("base", self.base, size=0)
        self.row("fine-tune", self.fine, size=self.fine.checkpoint.nbytes)
        started = time.perf_counter()
        source, size = low_rank(self.base, self.fine, device=self.device)
        inside = {x.weight_name for u in self.fine.layout.blocks for x in u.linears}
        entries = self.fine.checkpoint.entries
        rest = sum(entry.spec.nbytes for name, entry in entries.items() if name not in inside)
        seconds = time.perf_counter() - started
        self.row("low rank, as large as 1 bit", source, size=size + rest, seconds=seconds)
        self.delta("1 bit, initial scales", distill="none")
        self.delta("1 bit, fitted layer by layer", distill="layer")
        self.delta("2 bits, initial scales", distill="none", bits=2)
        self.delta("4 bits, initial scales", distill="none", bits=4)
        # What takes longest comes last: a measurement that is cut short has all the others.
        trained = {"distill": "logits", "steps": options.steps, "lr": options.lr}
        self.delta("1 bit, distilled on logits", **trained)
        if options.more:
            self.delta("2 bits, distilled on logits", bits=2, **trained)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("fine", type=Path)
    parser.add_argument(
        "--held-out", type=Path, required=True, help="text in the fine-tune's style"
    )
    parser.add_argument("--range", default="", help="characters of it, such as 400000:460000")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024, help="tokens of one")
    parser.add_argument("--calibration", default="bundled/prose", help="a recipe's data")
    parser.add_argument("--samples", type=int, default=800, help="rows of tokens to fit scales on")
    parser.add_argument("--length", type=int, default=128, help="tokens of one")
    parser.add_argument("--steps", type=int, default=200, help="of distillation, 4 rows each")
    parser.add_argument("--lr", type=float, help="if not 3 %% of the median initial scale")
    parser.add_argument("--propagate", choices=("quantized", "original"), default="quantized")
    parser.add_argument("--more", action="store_true", help="also distil two bits")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Measure(options, Path(folder)).run()


if __name__ == "__main__":
    main()

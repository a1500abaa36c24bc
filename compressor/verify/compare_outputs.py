"""What the written blocks compute, held against the original's on held-out text, block by block.

Each block gets the original's own hidden states, so that errors do not add up and a block answers
for itself. Everything that decides its output takes part: weights, norms, biases, rotary embedding,
quantized inputs and keys with the scales that are stored. What rounding may do is measured on the
same text with the original rounded to nearest, its inputs and keys with scales of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from compressor_calibration.bundled import bundled_text
from torch import Tensor, nn

from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout
from compressor.ir.scheme import KVSpec
from compressor.ir.unit import Unit
from compressor.numerics.activations import (
    fake_quantize_activation,
    fake_quantize_kv,
    static_kv_scale,
    stored_scale,
)
from compressor.ranks.ranks import Ranks
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.block_runner import Block
from compressor.runner.expert_groups import experts_at_once
from compressor.runner.simulate import StoredInput, quantized_inputs, quantized_kv, stored_inputs
from compressor.runner.source_model import SourceModel
from compressor.runner.stream import Stream
from compressor.runner.sweep import Execution, Step
from compressor.runner.tokenizer import load_tokenizer
from compressor.verify.alignment import Matrix
from compressor.verify.relay import Relay

ROWS, LENGTH = 4, 64
"""Rows of held-out text, and tokens of each."""

ERROR = 2.5
"""Error of a block's output in units of what rounding to nearest gives. On text of another kind
than they were calibrated on AWQ is below 1.5, GPTQ reached 2.2 in the attention of one block."""

LOST = 0.95
"""Error of an output that says next to nothing of the original's, unless half of that is what
rounding does: GPTQ's 3 bits without searched scales came to 1.26 where rounding gave 0.63."""

WIDER = 4.0
"""Ranges of many calibration tokens beside those of the few here: 2.5 where the kinds of text
differ and a few channels are large."""

MIXED = {"attn.o": "attention", "linear.out": "linear attention"}
"""What the last linear of a mixer puts out; a block may have none, one, or two of them."""

WHOLE = "the block"
"""What all that a block adds to the stream is called."""

FLOOR = 2e-5
"""Error that float32 arithmetic in another order leaves."""


@dataclass(frozen=True, slots=True)
class OutputError:
    """One block, by the median over tokens of ‖written − original‖ / ‖original‖.

    what      output of a mixer, or the whole of what the block adds to the stream
    expected  the same for the original rounded to nearest
    """

    block: str
    what: str
    error: float
    expected: float

    @property
    def problem(self) -> str | None:
        """What rounding does not explain."""
        allowed = min(max(ERROR * self.expected, FLOOR), max(LOST, 2.1 * self.expected))
        if self.error <= allowed:
            return None
        return (
            f"{self.block}: {self.what} is {self.error:.3g} of its own size from the original's on "
            f"held-out text, where rounding gives {self.expected:.3g}"
        )


class Outputs:
    """The original's hidden states on their way through its blocks, and what is put beside them."""

    def __init__(
        self, written: Source, original: Source, rows: tuple[Tensor, str], *, device: torch.device
    ) -> None:
        self.written, self.original = written, original
        self.ids, self.text = rows
        self.models = [
            SourceModel(source, device=device, dtype=torch.float32, experts=experts_at_once)
            for source in (original, written)
        ]
        self.relay: Relay | None = None

    def embed(
        self, original: Mapping[str, Tensor], written: Mapping[str, Tensor], ranks: Ranks
    ) -> None:
        """Run the embeddings; float tensors by their full names. Blocks are shared by `ranks`.
        Raises InputError where a config is none that a model can be made from."""
        runner = self.models[0].runner
        entering = Stream(runner.embed(original, self.ids), handed=runner.handed)
        self.relay = Relay(ranks, len(self.original.layout.blocks), entering)
        self.models[1].runner.embed(written, self.ids)  # for the rotary tables of its own config

    def step(self, number: int, layout: UnitLayout) -> Step:
        """A block of the original (0) or of what was written (1)."""
        execution = Execution(len(self.ids), offload=False)
        return Step(self.models[number], number, layout.index + 1, None, [], execution)

    @torch.no_grad()
    def block(
        self,
        unit: Unit,
        *,
        written: Mapping[str, Tensor],
        original: Mapping[str, Tensor],
        layout: UnitLayout,
        rotation: Matrix | None,
    ) -> BlockOutputs:
        """Run one block of both: float tensors by their full names.

        unit  the written block, whose stored scales are used;  layout  the original's block
        """
        assert self.relay is not None
        entering = self.relay.enter(layout.index + 1).copy()
        with (
            self.step(0, layout).loaded(original) as block,
            quantized_inputs(block, stored_inputs(self.original, layout)),
        ):
            after, made = _run(block, entering)
            left = Stream(after, handed=block.handed)
        self.relay.leave(layout.index + 1, left)
        if rotation is not None:
            entering.hidden = rotation.right(entering.hidden)
            made = {what: rotation.right(part) for what, part in made.items()}
        found = BlockOutputs(self, unit, entering, made)
        kv = self.written.schemes.kv
        hook = None if kv is None else quantized_kv(kv, unit, None)
        found.errors = found.run(written, stored_inputs(self.written, unit.layout), hook)
        return found


class BlockOutputs:
    """What one written block made of the original's hidden states."""

    def __init__(
        self, outputs: Outputs, unit: Unit, entering: Stream, wanted: Mapping[str, Tensor]
    ) -> None:
        self.outputs, self.unit = outputs, unit
        self.entering, self.wanted = entering, wanted
        self.errors: dict[str, float] = {}

    @torch.no_grad()
    def run(
        self,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
        hook: AttentionHook | None,
    ) -> dict[str, float]:
        """Errors of the block with these tensors, inputs and cache."""
        step = self.outputs.step(1, self.unit.layout)
        with (
            step.loaded(tensors) as block,
            quantized_inputs(block, inputs),
            block.runner.attention(hook),
        ):
            _, made = _run(block, self.entering)
        return {what: _error(made[what], self.wanted[what]) for what in self.wanted}

    def judge(self, rounded: Mapping[str, Tensor]) -> list[OutputError]:
        """The errors, beside those of the original's tensors rounded to nearest."""
        source = self.outputs.written
        inputs: dict[str, Any] = {
            name: _own_scale(stored)
            for name, stored in stored_inputs(source, self.unit.layout).items()
        }
        kv = source.schemes.kv
        expected = self.run(rounded, inputs, None if kv is None else _own_cache(kv))
        name = self.unit.layout.name
        return [OutputError(name, what, self.errors[what], expected[what]) for what in self.wanted]


def _run(block: Block, rows: Stream) -> tuple[Tensor, dict[str, Tensor]]:
    """A block's output, and what its mixers and the whole of it add to the stream, for all rows."""
    made: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for linear in block.unit.linears:
            if linear.role in MIXED:
                keep = partial(_keep, made, MIXED[linear.role])
                stack.callback(block.module(linear).register_forward_hook(keep).remove)
        after = block.forward(rows.hidden, rows.handed)
    return after, {**made, WHOLE: after - rows.hidden}


def _keep(
    made: dict[str, Tensor], what: str, module: nn.Module, args: tuple[Any, ...], out: Tensor
) -> None:
    made[what] = out


def _own_scale(stored: StoredInput) -> Callable[[Tensor], Tensor]:
    """A linear's input quantized with a scale that it calls for itself, or a stored one that is as
    much wider as a calibrated range may be."""

    def enter(x: Tensor) -> Tensor:
        if stored.spec.mode not in ("static", "local"):
            return fake_quantize_activation(x, stored.spec)
        if not bool(x.any()):
            return x
        scale = stored_scale(x.abs().amax(), stored.spec)
        if stored.scale is not None:
            scale = stored.scale.to(scale).reshape(1).clamp(scale, WIDER * scale)
        return fake_quantize_activation(x, stored.spec, scale)

    return enter


def _own_cache(spec: KVSpec) -> AttentionHook:
    """Attention over keys and values rounded with scales that they call for themselves."""

    def rounded(x: Tensor) -> Tensor:
        fixed = spec.per != "token_head"
        scale = static_kv_scale(x.abs().amax((0, 2)), spec) if fixed else None
        return fake_quantize_kv(x, spec, scale)

    def hook(call: AttentionCall) -> Tensor:
        near = replace(call, key=rounded(call.key), value=rounded(call.value))
        return near.plain(near.query, near.key, near.value)

    return hook


def _error(new: Tensor, old: Tensor) -> float:
    """Median over tokens, since a few tokens carry outliers that drown all else."""
    off = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-12)
    return float(off.median()) if bool(off.isfinite().all()) else float("inf")


def held_out_rows(source: Source) -> tuple[Tensor, str]:
    """Token ids [rows, length] of the bundled novel, and what they are.

    A checkpoint without a tokenizer that loads gets ids from all over its vocabulary.
    """
    vocabulary = source.layout.sizes.vocabulary
    length = min(LENGTH, source.layout.sizes.positions or LENGTH)
    count = ROWS * length
    try:
        tokenizer = load_tokenizer(source.checkpoint.folder)
        text = bundled_text("held_out", "fiction")[: 16 * count]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except InputError:
        ids = []
    if len(ids) < count or max(ids) >= vocabulary:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, vocabulary, (ROWS, length), generator=generator)
        return rows, f"{ROWS} x {length} tokens drawn from the vocabulary"
    return torch.tensor(ids[:count]).view(ROWS, length), f"{ROWS} x {length} held-out tokens"

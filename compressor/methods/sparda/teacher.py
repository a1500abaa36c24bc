"""A block's attention as the teacher of forecasts: its loss for some rows, and what it chooses."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compressor_kernels.attention.block_windows import WindowRule, compress_keys_ref
from torch import Tensor

from compressor.attention.key_blocks import KeyBlocks
from compressor.attention.masked import in_pieces
from compressor.attention.rules.forecast import forecast_of
from compressor.ir.layout import UnitLayout
from compressor.numerics.forecast_loss import (
    Pooling,
    aligned_shares,
    bucketed_kl,
    chosen_by,
    student_shares,
    teacher_shares,
)
from compressor.runner.attention_call import AttentionCall
from compressor.runner.block_runner import Block, BlockRunner
from compressor.runner.observe import Seen


@dataclass(frozen=True, slots=True)
class Teacher:
    """What a forecast is held against.

    selection  how blocks are chosen when the model runs
    fine       the compression of keys that the teacher's attention sees
    pooling    how its shares come onto the grid of the deployed compression
    """

    selection: KeyBlocks
    fine: WindowRule
    pooling: Pooling = "max"

    def gradient(
        self, weight: Tensor, hidden: Tensor, call: AttentionCall, rotary: Any, *, rows: int
    ) -> tuple[Tensor, list[Tensor]]:
        """These rows' part of the loss, and of its gradient for `weight`.

        weight  [kv_heads * head_dim, hidden], float32;  hidden  what it reads, [n, length, hidden]
        call    the attention whose blocks are to be told, of the same n rows
        rotary  tables that turn a forecast, or None
        rows    how many rows the loss is the mean over
        """
        rule, windows = self.selection.blocks, self.selection.windows
        length, groups = call.key.shape[2], call.key.shape[1]
        forecast = forecast_of(hidden, weight, kv_heads=groups, rotary=rotary)
        leaf = forecast.detach().requires_grad_()
        keys = compress_keys_ref(call.key, windows)
        total = torch.zeros((), device=leaf.device)
        for part, behind in self.parts(call):
            at = slice(length - behind - part.shape[2], length - behind)
            where = {"tokens": length, "behind": behind}
            with torch.no_grad():
                shares, blocks = self._shares(call, part, behind)
            student = student_shares(leaf[:, :, at], keys, windows, **where)
            loss = bucketed_kl(shares, student, blocks, rule, windows, **where).sum()
            loss = loss / (rows * groups * length)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total, list(torch.autograd.grad(forecast, [weight], [leaf.grad]))

    @torch.no_grad()
    def blocks(self, call: AttentionCall) -> Tensor:
        """Blocks that the teacher chooses, int32 [rows, kv_heads, length, K]."""
        return in_pieces(partial(self.part_blocks, call), call.query, self._row_elements(call))

    @torch.no_grad()
    def part_blocks(self, call: AttentionCall, part: Tensor, behind: int) -> Tensor:
        """`blocks` of a part of the queries."""
        return self._shares(call, part, behind)[1]

    def _shares(self, call: AttentionCall, part: Tensor, behind: int) -> tuple[Tensor, Tensor]:
        rule, windows = self.selection.blocks, self.selection.windows
        where = {"tokens": call.key.shape[2], "behind": behind}
        fine_keys = compress_keys_ref(call.key, self.fine)
        shares = teacher_shares(part, fine_keys, self.fine, **where, scale=call.scaling)
        aligned = aligned_shares(
            shares, self.fine, windows, tokens=call.key.shape[2], pooling=self.pooling
        )
        return aligned, chosen_by(aligned, rule, windows, **where)

    def _row_elements(self, call: AttentionCall) -> int:
        return call.query.shape[1] * max(1, self.fine.windows(call.key.shape[2]))

    def parts(self, call: AttentionCall) -> list[tuple[Tensor, int]]:
        """The call's queries in parts that memory holds, with how many tokens follow each."""
        found: list[tuple[Tensor, int]] = []

        def note(part: Tensor, behind: int) -> Tensor:
            found.append((part, behind))
            return part

        in_pieces(note, call.query, self._row_elements(call))
        return found


@torch.no_grad()
def attention_call(block: Block, hidden: Tensor) -> tuple[AttentionCall, Tensor]:
    """The call of a block's attention for hidden states [rows, length, hidden], and what enters it;
    what comes after it in the block is not computed."""
    found: list[tuple[AttentionCall, Tensor]] = []

    def hook(call: AttentionCall) -> Tensor:
        if call.hidden is not None:
            found.append((call, call.hidden))
        raise Seen

    with block.runner.attention(hook):
        try:
            block.forward(hidden)
        except Seen:
            if found:
                return found[0]
    raise RuntimeError(f"{block.unit.name} did not attend")


@contextmanager
def attention_inputs(
    runner: BlockRunner, unit: UnitLayout, tensors: dict[str, Tensor]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from hidden states that enter a block to what enters its attention.

    tensors  of the block, those of its linears may be missing: what comes before the attention is
             a norm
    """
    layer = runner.layers[unit.index]
    state = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.removeprefix(f"{unit.name}.").rpartition(".")
        state[f"{runner.names.module_path(path)}.{leaf}"] = tensor.to(runner.device, runner.dtype)
    layer.load_state_dict(state, strict=False, assign=True)
    found: list[Tensor] = []

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise Seen

    @torch.no_grad()
    def inputs(hidden: Tensor) -> Tensor:
        try:
            layer(
                hidden.to(runner.device, runner.dtype),
                **runner.arguments(unit.index, hidden.shape[1]),
            )
        except Seen:
            return found.pop()
        raise RuntimeError(f"{unit.name} did not attend")

    attention = [m for m in layer.modules() if hasattr(m, "layer_idx") and m is not layer]
    with ExitStack() as stack:
        stack.callback(layer.to, "meta")
        for module in attention:
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
        yield inputs


def norms(unit: UnitLayout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a block that belong to no linear."""
    linears = {linear.name for linear in unit.linears}
    return {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in linears}

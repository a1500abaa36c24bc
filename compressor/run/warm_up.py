"""What takes seconds the first time on a GPU, done aside while the recipe is being prepared.

The device's context, the libraries of matrix products, page-locked memory and the kernels of the
passes are all needed by the first block, and none of them needs a weight or a token.
"""

import contextlib
import threading
from itertools import accumulate

import torch

from compressor.checkpoint.target import ModelTarget
from compressor.methods.base import Pass
from compressor.plan.plan import Plan
from compressor.verify.apart import Apart
from compressor.verify.kernels.ahead import CompiledAhead, Wanted

UNITS_AHEAD = 3
"""Units whose weights get page-locked memory beforehand: the embedding, a block that is worked on,
and one that is read meanwhile. Later ones find what these gave back."""

LOCKED_AHEAD = 2**31
"""Bytes of it at most: of large blocks it takes seconds, and the first of them is read before it is
there, so that both would hold what one needs."""


def warm_up(plan: Plan, device: torch.device) -> None:
    """Start in the background; the first use of anything waits only for what is left of it."""
    if device.type != "cuda":
        return
    # Imported by this thread, since two threads in the middle of the same imports may block.
    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401
    torch.zeros(1, device=device)
    threading.Thread(target=_warm_up, args=(plan, device), daemon=True).start()


def compile_verdict(target: ModelTarget, device: torch.device, apart: Apart | None = None) -> None:
    """Have the kernels compiled, in the background, by which verification will multiply.

    apart  a process that does it, if not this one
    """
    wanted = Wanted.of(
        target.source.layout.linears,
        target.schemes,
        format=target.format,
        dtype=target.dtype,
        device=device,
    )
    if apart is None:
        CompiledAhead(wanted)
    else:
        apart.compile(wanted)


def _warm_up(plan: Plan, device: torch.device) -> None:
    # What fails here fails again where it is needed, and is reported there.
    with contextlib.suppress(Exception), torch.cuda.device(device):
        if plan.calibrated:
            for kind in (plan.compute_dtype(device), torch.float32):
                square = torch.zeros(64, 64, dtype=kind, device=device)
                torch.mm(square, square)
        _lock_pages(plan)
        for passing in plan.passes:
            specs = {
                (spec, linear.in_features)
                for linear in plan.layout.linears
                if linear.name in passing.names
                and (spec := plan.schemes.linears[linear.name].weight) is not None
            }
            if isinstance(passing.step.params, Pass):
                passing.step.params.compile_kernels(specs, device)


def _lock_pages(plan: Plan) -> None:
    """Have blocks of page-locked memory ready: PyTorch keeps those that are given back."""
    source, units = plan.source, plan.units[:UNITS_AHEAD]
    sizes = [x for unit in units for x in source.checkpoint.pieces(source.names(unit.layout))]
    before = accumulate(sizes, initial=0)
    held = [
        torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for size, done in zip(sizes, before, strict=False)
        if done + size <= LOCKED_AHEAD
    ]
    del held

"""How much what leaves each block counts for the model's predictions.

With a next token drawn from the model's own prediction at every position, the gradient g of its
negative log-likelihood at a hidden state makes ½·E[(g·δ)²] the KL divergence that a small change δ
of that state costs, in second order (the Fisher information). One draw for each position stands for
the expectation: what is summed over many positions varies little.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.runner.source_model import SourceModel


def end_gradients(
    model: SourceModel,
    ids: Tensor,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """Gradient of each block's output, [rows, length, hidden] in the model's dtype in main memory.

    ids   tokens [rows, length], a row at a time
    seed  of the tokens that are drawn
    The whole model is in memory meanwhile.
    """
    whole = model.whole()
    layers = list(whole.get_submodule(model.source.arch.runtime.layers).children())
    shape = (*ids.shape, 0)
    found: list[Tensor] = [torch.empty(shape)] * len(layers)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for row in range(ids.shape[0]):
        left: dict[int, Tensor] = {}
        with torch.enable_grad():
            with ExitStack() as hooks:
                for number, layer in enumerate(layers):
                    hooks.enter_context(layer.register_forward_hook(partial(_keep, left, number)))
                logits = whole(ids[row : row + 1].to(model.device), use_cache=False).logits[0]
            shares = logits.detach().float().softmax(-1).cpu()
            drawn = torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)
            loss = nn.functional.cross_entropy(logits.float(), drawn, reduction="sum")
            gradients = torch.autograd.grad(loss, [left[i] for i in range(len(layers))])
        for number, gradient in enumerate(gradients):
            if row == 0:
                full = (ids.shape[0], *gradient.shape[1:])
                found[number] = torch.empty(full, dtype=gradient.dtype)
            found[number][row] = gradient[0].cpu()
        progress(row + 1, ids.shape[0])
    return found


def _keep(left: dict[int, Tensor], number: int, module: nn.Module, args: Any, out: Any) -> Any:
    """Remember what leaves a layer; from the first one on gradients are wanted."""
    hidden = out[0] if isinstance(out, tuple) else out
    if not hidden.requires_grad:
        hidden.requires_grad_()
    left[number] = hidden
    return out

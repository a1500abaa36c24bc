"""Buffers that no checkpoint holds: rotary tables, scales of embeddings, multipliers. A model on
the meta device has lost them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def rebuild_buffers(text: Any, config: Any, device: torch.device) -> None:
    """Give a text model on the meta device its buffers back.

    config  of modules that have none of their own
    """
    for path, module in list(text.named_modules()):
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            with torch.device("cpu"):
                fresh = type(module)(getattr(module, "config", config)).to(device)
            parent, _, leaf = path.rpartition(".")
            setattr(text.get_submodule(parent), leaf, fresh)
    lost = [found for found in _own_buffers(text) if found[2].is_meta]
    for module, name, buffer in lost:
        module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
    # The model itself knows their values; on the meta device, weights get none.
    for module in text.modules() if lost else ():
        text._init_weights(module)


def unload(module: nn.Module) -> None:
    """Take a module's weights away, and leave it what no checkpoint holds."""
    own = list(_own_buffers(module))
    module.to("meta")
    for holder, name, buffer in own:
        holder.register_buffer(name, buffer, persistent=False)


def _own_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield module, name, buffer

"""Opens the activation store of a recipe or a command, for what this machine computes with."""

from collections.abc import Callable
from pathlib import Path

import torch

from compressor.plan.recipe import ActivationStore
from compressor.run.environment import device_name, environment, versions
from compressor.runner.activations import Activations


def open_activations(
    settings: ActivationStore | None,
    device: torch.device,
    on_note: Callable[[str], None] = lambda text: None,
) -> Activations | None:
    """The store, or None where none is wanted. Raises InputError where its folder will not do."""
    if settings is None:
        return None
    here = {
        **versions(),
        **environment(device),
        "device": device_name(device),
        "float32 products": torch.get_float32_matmul_precision(),
    }
    store = Activations.open(Path(settings.dir).expanduser(), settings.max_size, here)
    store.on_note = on_note
    return store

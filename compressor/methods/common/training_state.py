"""What a training by Adam keeps, so that a killed run goes on to the same parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.checkpoint.records import Records

STATE = "training.safetensors"
KEPT = ("step", "exp_avg", "exp_avg_sq")


def keep_state(
    scratch: Records,
    optimizer: torch.optim.Optimizer,
    trained: Mapping[str, Tensor],
    done: int,
    **beside: Tensor,
) -> None:
    """Put the state after `done` steps in place, with what else is to be known then, whole or not
    at all."""
    tensors = {"done": torch.tensor([done]), **beside}
    for name, parameter in trained.items():
        tensors[name] = parameter.detach()
        # An expert that no token went to has no moments.
        if parameter in optimizer.state:
            tensors |= {f"{name}.{key}": optimizer.state[parameter][key] for key in KEPT}
    scratch.put_tensors(STATE, tensors)


def resume_state(
    scratch: Records, optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]
) -> tuple[int, Mapping[str, Tensor]]:
    """Steps that are done, and all that was kept then; parameters and optimizer as then."""
    tensors = scratch.get_tensors(STATE)
    if tensors is None:
        return 0, {}
    for name, parameter in trained.items():
        with torch.no_grad():
            parameter.copy_(tensors[name])
        if f"{name}.step" in tensors:
            step, *moments = (tensors[f"{name}.{key}"] for key in KEPT)
            moved = (moment.to(parameter.device) for moment in moments)
            optimizer.state[parameter] = dict(zip(KEPT, (step, *moved), strict=True))
    return int(tensors["done"]), tensors

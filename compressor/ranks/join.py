"""This process's place among the ranks that torchrun, or `compress run --gpus`, started."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch

from compressor.errors import InputError, MachineError
from compressor.ranks.place import Place, place_of
from compressor.ranks.ranks import ALONE, Ranks

FOREVER = timedelta(days=30)
"""No collective waits this long: whoever hangs is found by its heartbeat."""
MEETING = timedelta(minutes=5)
"""How long ranks wait for each other to start."""


@contextmanager
def joined(device: torch.device, environ: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The ranks of this run for the length of a `with`, this process among them.

    device  on which it computes
    Raises MachineError where ranks do not find each other.
    """
    place = place_of(environ)
    if place is None:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from compressor.ranks.group import Group
    from compressor.ranks.watch import watching

    if not dist.is_available():
        raise InputError("this PyTorch cannot run several ranks", hint="run one process")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store = TCPStore(
            place.host, place.port, place.world, place.serves, MEETING, wait_for_workers=False
        )
        with watching(place):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore(f"group/{place.attempt}", store),
                rank=place.rank,
                world_size=place.world,
                timeout=FOREVER,
            )
            ranks = Group(rank=place.rank, world=place.world, device=device)
            yield ranks
            ranks.barrier()
    except (dist.DistError, dist.DistNetworkError) as error:
        raise MachineError(
            f"rank {place.rank} does not reach the others at {place.host}:{place.port}: {error}",
            hint="are MASTER_ADDR and MASTER_PORT right, and open between the hosts?",
        ) from error


def local_device(name: str, place: Place | None) -> str:
    """The device of a rank: of several, each takes a GPU of its host by its number there."""
    if place is None or name not in ("auto", "cuda"):
        return name
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{place.local}"

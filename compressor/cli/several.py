"""Commands that several ranks do together: `--gpus N` starts them, and so does torchrun."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from compressor.cli.echo import echo
from compressor.ranks.place import place_of

if TYPE_CHECKING:
    import torch

    from compressor.ranks.ranks import Ranks


gpus_option = click.option(
    "--gpus",
    metavar="N",
    help="Work on N GPUs of this machine, a process each; auto takes all. With --device cpu, "
    "N processes on the CPU.",
)


def ranks_to_start(gpus: str | None) -> int:
    """How many of this command are to be started; 1 where this process is a rank, or alone.

    Raises InputError for what is no number of GPUs.
    """
    if gpus is None or place_of() is not None:
        return 1
    from compressor.ranks.launch import gpus_here

    return gpus_here(gpus)


def start_ranks(gpus: str | None) -> None:
    """Run this command once for each of several GPUs, and end with the exit code of all of them;
    return where there is but one."""
    if (world := ranks_to_start(gpus)) > 1:
        from compressor.cli.main import logs_json
        from compressor.ranks.launch import launch

        def note(text: str) -> None:
            if not logs_json():
                echo(text, err=True)

        click.get_current_context().exit(launch(world, sys.argv[1:], note))


@contextmanager
def joined_ranks(device: str) -> Iterator[tuple[torch.device, Ranks]]:
    """This process's device, and the ranks that it is one of, for the length of a `with`."""
    from compressor.ranks.join import joined, local_device
    from compressor.run.session import choose_device

    chosen = choose_device(local_device(device, place_of()))
    with joined(chosen) as ranks:
        yield chosen, ranks

"""What the environment says of a process among several; nothing is imported for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from compressor.errors import InputError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Names the file in which a rank says why it failed."""


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's number, also on its host, how many there are, and where they meet.

    attempt  how often torchrun has started them again
    serves   whether the place where they meet is in this process
    """

    rank: int
    local: int
    world: int
    host: str
    port: int
    attempt: str = "0"
    serves: bool = False


def place_of(environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place as torchrun states it; None where it is alone.

    Raises InputError where something is missing or no number.
    """
    if environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in environ:
        return None
    try:
        place = Place(
            rank=int(environ["RANK"]),
            local=int(environ.get("LOCAL_RANK", "0")),
            world=int(environ["WORLD_SIZE"]),
            host=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
            attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            serves=int(environ["RANK"]) == 0 and "TORCHELASTIC_USE_AGENT_STORE" not in environ,
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"the environment of a rank is not whole: {error}",
            hint="start ranks with torchrun or compress run --gpus; alone, unset WORLD_SIZE",
        ) from error
    if not 0 <= place.rank < place.world:
        raise InputError(f"rank {place.rank} is none of {place.world}")
    return place

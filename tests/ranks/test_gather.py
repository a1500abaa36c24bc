"""What ranks tell all others, and the room that it takes."""

import json
import os
import socket
import subprocess
import sys

import pytest

RANK = """
import json, os, torch
from unittest.mock import patch
from compressor.ranks.join import joined

EMPTY = torch.empty

def value(rank, count):
    return {"rank": rank, "rows": torch.arange(count) * (rank + 1), "few": torch.ones(3, rank)}

with joined(torch.device("cpu")) as ranks:
    told = []
    for counts in json.loads(os.environ["COUNTS"]):
        taken = []

        def counted(*args, **named):
            made = EMPTY(*args, **named)
            taken.append(made.nbytes)
            return made

        with patch.object(torch, "empty", counted):
            every = ranks.gather(value(ranks.rank, counts[ranks.rank]))
        for rank, (found, count) in enumerate(zip(every, counts, strict=True)):
            want = value(rank, count)
            assert found["rank"] == rank
            assert torch.equal(found["rows"], want["rows"])
            assert torch.equal(found["few"], want["few"])
        told.append(max(taken))
    print(json.dumps({"rank": ranks.rank, "largest": told}))
"""

MANY = 1 << 17
SENT = 8 * MANY


@pytest.mark.parametrize("world", [2, 3])
def test_room_is_taken_for_what_is_sent(world):
    """Of one rank's megabyte nobody holds as many as there are ranks."""
    cases = [
        [MANY] * world,
        [MANY, *[1] * (world - 1)],
        [*[0] * (world - 1), MANY],
        [0] * world,
        [MANY // (rank + 1) for rank in range(world)],
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, **meeting, "RANK": str(rank), "COUNTS": json.dumps(cases)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    told = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    for one in told:
        together, first, last, none, _ = one["largest"]
        assert together >= world * SENT and none < SENT
        # The one who sends it has it already.
        assert (first < SENT) == (one["rank"] == 0)
        assert (last < SENT) == (one["rank"] == world - 1)
        assert max(first, last) < 1.1 * SENT

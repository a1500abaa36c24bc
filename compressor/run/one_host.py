"""Whether ranks may work in one folder beside each other."""

import platform
import secrets
from pathlib import Path

from compressor.checkpoint.durable import write_atomically
from compressor.ranks.ranks import Ranks

MARK = "ranks"
"""A file of the work folder, by which ranks find out whether they see the same one."""


def on_one_host(work: Path, ranks: Ranks) -> bool:
    """Whether all ranks see one folder and run on one host: a network's file system may lose bytes
    that two hosts write beside each other, and show old ones."""
    if ranks.world == 1:
        return True
    mark, word = work / MARK, ranks.share(secrets.token_hex())
    ranks.led(lambda: write_atomically(mark, word.encode()))
    seen = mark.is_file() and mark.read_text("utf-8") == word
    hosts = ranks.gather(platform.node() if seen else None)
    ranks.led(mark.unlink)
    return None not in hosts and len(set(hosts)) == 1

"""Importing thousands of modules, as PyTorch and transformers are, in a tenth less time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile, nor among what was made: what modules make stays, and would be
    looked through again and again as more joins it, and once more afterwards."""
    wanted = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if wanted:
            gc.freeze()
            gc.enable()

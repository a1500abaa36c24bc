"""How the C library's heap is to treat large blocks, so that memory does not grow with depth.

glibc learns to take ever larger blocks (up to 32 MB) from a heap that it can only give back from
its end. Units read, worked on and written by several threads leave such heaps in pieces: on a model
of 16 equal layers the resident size grew by 17 MB with each, with nothing alive. A fixed threshold
has every large block mapped by itself and given back as soon as it is free.
"""

from __future__ import annotations

import contextlib
import ctypes

M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
LARGE = 1 << 18
ARENAS = 2


def give_back_large_blocks() -> None:
    """Set it for the rest of the process; nothing happens where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_ARENA_MAX, ARENAS)

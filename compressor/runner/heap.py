"""When garbage is looked for, and when memory that is free goes back to the system.

Resident size is not to grow with depth. glibc learns to take ever larger blocks (up to 32 MB) from
heaps that shrink only at their end. Units read, worked on and written by several threads leave such
heaps in pieces: on a model of 16 equal layers the resident size grew by 17 MB with each, with
nothing alive. Trimming after each unit gives the pieces back; forbidding such heaps would too, but
then every product pays for new pages.
"""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

import torch

M_ARENA_MAX = -8
"""glibc's number for the most heaps of a process."""


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Look for no garbage among what is there by now, for the length of a `with`: of a million
    objects that modules made that takes most of a second, in the middle of a block, and other ranks
    wait for it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def share_heap() -> None:
    """Let all threads take their blocks from one heap: each thread's own keeps what others would
    use, about 5 MB with each layer of a delta. Tensors are few and large, so no thread waits."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back_page_locked() -> None:
    """Return page-locked memory that no tensor holds, which PyTorch keeps for later copies."""
    # The second name is that of releases before the first was public.
    for home, name in ((torch.accelerator, "empty_host_cache"), (torch._C, "_host_emptyCache")):
        if empty := getattr(home, name, None):
            empty()
            return


def give_back() -> None:
    """Return the free pages of all heaps; nothing happens where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

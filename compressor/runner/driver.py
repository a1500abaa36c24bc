"""CUDA's driver, started by a thread from a process's first moment on.

Imports nothing that takes time: the driver needs no PyTorch, which finds the device's context made
once it is imported.
"""

import ctypes
import os
import re
import threading

from compressor.ranks.place import place_of

LIBRARY = "libcuda.so.1"


def has_gpu(device: str) -> bool:
    """Whether a command with this `--device` is likely to work on a GPU of NVIDIA's."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return device != "cpu" and not hidden and os.path.exists("/dev/nvidiactl")


def start_driver(device: str) -> None:
    """Have the context of a command's `--device` made, in the background, where it is a GPU: a
    rank's own."""
    if has_gpu(device):
        found, place = re.fullmatch(r"cuda:([0-9]+)", device), place_of()
        number = int(found[1]) if found else place.local if place else 0
        threading.Thread(target=_start, args=(number,), daemon=True).start()


def _start(number: int) -> None:
    # As PyTorch does before it starts the driver.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    try:
        driver = ctypes.CDLL(LIBRARY)
        gpu, context = ctypes.c_int(), ctypes.c_void_p()
        # Whatever fails here fails again, and is reported, where it is needed.
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(gpu), number) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)
    except (OSError, AttributeError):
        return

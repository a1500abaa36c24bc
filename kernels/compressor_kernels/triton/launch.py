"""What launches of kernels share: powers of two, dense rows, how many programs fill a device, and
whether one may start before another ends."""

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def pow2(n: int) -> int:
    """Smallest power of two that is at least n (1 for n < 1)."""
    return 1 << max(0, n - 1).bit_length()


def dense(x: Tensor) -> Tensor:
    """x with its last dimension in one run."""
    return x if x.stride(-1) == 1 else x.contiguous()


def copyable(x: Tensor) -> Tensor:
    """x itself if the bulk copy engine can read it: dense rows, other strides in 16-byte steps."""
    steps = all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    return x if x.stride(-1) == 1 and steps and x.data_ptr() % 16 == 0 else x.contiguous()


def score_scale(scale: float | None, dim: int) -> float:
    """What scores q · k are multiplied by: 1/sqrt(dim) if not given. Raises ValueError unless it is
    positive: kernels take the largest score before they scale it."""
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    return dim**-0.5 if scale is None else scale


def overlaps(like: Tensor) -> bool:
    """Whether kernels on the device of `like` may start while those before them end: programmatic
    dependent launch, from compute capability 9.0 on."""
    return like.is_cuda and torch.cuda.get_device_capability(like.device) >= (9, 0)


def launch_early(early: bool) -> dict[str, bool]:
    """The launch option for a kernel that waits by itself; not every backend knows its name."""
    return {"launch_pdl": True} if early else {}


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def ranges(like: Tensor, *, lanes: int, most: int, programs_per_sm: int) -> int:
    """Ranges that each of `lanes` pieces of work on the device of `like` is cut into: enough
    programs to fill it, but no more than `most`, or 128."""
    if lanes == 0:
        return 1
    return max(1, min(processors(like.device) * programs_per_sm // lanes, most, 128))

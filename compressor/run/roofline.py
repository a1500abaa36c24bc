"""How long a GPU takes at least for the linears of a model: to read their weights, or to multiply
them with its 16-bit units, whichever is longer. Attention, norms and launches come on top."""

from typing import NamedTuple

from compressor.errors import InputError
from compressor.run.allocate import Sensitivity


class Gpu(NamedTuple):
    """Bytes read and dense 16-bit operations done in a second, as the vendor has them."""

    bandwidth: float
    operations: float


GPUS = {
    "t4": Gpu(0.32e12, 65e12),
    "a10": Gpu(0.6e12, 125e12),
    "a100": Gpu(2.04e12, 312e12),
    "l4": Gpu(0.3e12, 121e12),
    "l40s": Gpu(0.864e12, 362e12),
    "rtx4090": Gpu(1.008e12, 165e12),
    "h100": Gpu(3.35e12, 989e12),
    "h200": Gpu(4.8e12, 989e12),
    "b200": Gpu(8e12, 2250e12),
}


def gpu_of(name: str) -> Gpu:
    """A GPU by name. Raises InputError for an unknown one."""
    if name not in GPUS:
        raise InputError(f"no figures for a GPU {name!r}", hint=f"one of: {', '.join(GPUS)}")
    return GPUS[name]


def seconds(bits_per_weight: float, weights: int, gpu: Gpu, tokens: int) -> float:
    """A step of so many tokens through weights that are stored in so many bits."""
    return max(bits_per_weight * weights / 8 / gpu.bandwidth, 2 * tokens * weights / gpu.operations)


def timed(sensitivity: Sensitivity, gpu: Gpu, tokens: int) -> Sensitivity:
    """The same where an option is as large as it is slow: fewer bits than take as long to read as
    to multiply save no time. Options keep their places."""
    least = 16 * tokens * gpu.bandwidth / gpu.operations
    groups = []
    for group in sensitivity.groups:
        sizes = [max(option.bits_per_weight, least) for option in group.options]
        options = [
            option.model_copy(update={"bits_per_weight": size})
            for option, size in zip(group.options, sizes, strict=True)
        ]
        groups.append(group.model_copy(update={"options": tuple(options)}))
    return sensitivity.model_copy(update={"groups": tuple(groups)})

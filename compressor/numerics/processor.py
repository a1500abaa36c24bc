"""What the processor has instructions for, as PyTorch tells."""

from contextlib import AbstractContextManager
from functools import cache

import torch


@cache
def instructions(*names: str) -> bool:
    """Whether it has any of these; where PyTorch does not tell, none."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in names)


def multiplies_bfloat16() -> bool:
    """Whether it multiplies bfloat16 faster than float32."""
    return instructions("amx_bf16", "avx512_bf16")


def products_of_bfloat16(*, quick: bool = True) -> AbstractContextManager[None]:
    """Lets a CPU multiply float32 in bfloat16 for the length of a `with`, if `quick`."""
    # Its cache would keep the weights of every block.
    return torch.autocast("cpu", torch.bfloat16, enabled=quick, cache_enabled=False)

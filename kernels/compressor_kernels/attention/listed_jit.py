"""Tokens of listed blocks of keys, in kernels that read a whole text or some of its blocks."""

import triton
import triton.language as tl


@triton.jit
def listed_tokens(list_ptr, length, K: tl.constexpr, K_POW2: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens to go through: those of the listed blocks (list_ptr: K of them, -1 after the last), or
    `length` where there is no list."""
    total = length
    if list_ptr is not None:
        slot = tl.arange(0, K_POW2)
        ids = tl.load(list_ptr + slot, mask=slot < K, other=-1)
        total = tl.sum((ids >= 0).to(tl.int32), 0) * BLOCK
    return total


@triton.jit
def token_at(list_ptr, base, token, end, BLOCK: tl.constexpr):
    """Places in the text of the tokens base + token of those before `end`; a list's blocks hold
    whole tiles of them. What lies past the end is not in the text."""
    place = base + token
    if list_ptr is not None:
        inside = base < end
        place = (
            tl.load(list_ptr + base // BLOCK, mask=inside, other=0) * BLOCK + base % BLOCK + token
        )
    return place

"""How many tokens of a text a program sees, in kernels whose batch rows may differ in length."""

import triton
import triton.language as tl


@triton.jit
def text_length(len_ptr, b, longest):
    """Tokens of batch row b: its entry of len_ptr [B], or `longest` where there are no lengths."""
    length = longest
    if len_ptr is not None:
        length = tl.load(len_ptr + b).to(tl.int32)
    return length

"""Reading one 32-bit register as several narrower values, without moving it.

Triton has no cast that changes a tensor's shape. Repeating each word along a new last axis and
telling the compiler that those repeats share a register gives one, at no instruction: the layout
that a tensor-core operand wants reaches back to the words, which are loaded in it.
"""

import triton
import triton.language as tl


@triton.jit
def bytes_of(words, ROWS: tl.constexpr, COLS: tl.constexpr, ASM: tl.constexpr):
    """int32 [ROWS, COLS] -> int8 [ROWS, 4*COLS]; byte j of word c becomes element 4c + j.

    ASM=False says the same in plain operations, for the interpreter.
    """
    wide = tl.reshape(tl.broadcast_to(words[:, :, None], (ROWS, COLS, 4)), (ROWS, 4 * COLS))
    if ASM:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [wide], dtype=tl.int8, is_pure=True, pack=4
        )
    shift = (tl.arange(0, 4 * COLS) % 4) * 8
    return (wide >> shift[None, :]).to(tl.int8)

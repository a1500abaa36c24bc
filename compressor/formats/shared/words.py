"""Codes in 32-bit words, lowest bit first.

`crossing` (the rule today): one bit stream per row, in which an element of 3, 5, 6 or 7 bits may
cross a word's end. Without it each word holds 32 // bits whole elements, as compressed-tensors
wrote before 0.18. For other widths the two are the same. Bits left over are zero.
"""

import math
import sys

import torch
from torch import Tensor

WORD = 32
IN_BYTES = (1, 2, 4, 8)
"""Widths of which whole codes fill a byte: few operations on bytes pack them."""
LITTLE = sys.byteorder == "little"


def word_count(count: int, bits: int, *, crossing: bool = True) -> int:
    """Words that `count` codes of `bits` bits fill."""
    return -(-count * bits // WORD) if crossing else -(-count // (WORD // bits))


def pack_words(codes: Tensor, bits: int, *, crossing: bool = True) -> Tensor:
    """Pack uint8 codes [..., count] into int32 [..., word_count]; codes are below 2^bits."""
    count = codes.shape[-1]
    period, per_group = _pattern(bits, crossing=crossing)
    padding = -count % period
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    if bits in IN_BYTES and LITTLE:
        width = bits
        while width < 8:  # neighbours into one, until they are bytes
            codes, width = codes[..., ::2] | codes[..., 1::2] << width, 2 * width
        # Flat, since dimensions of one element may have any stride.
        return codes.reshape(-1).view(torch.int32).view(*codes.shape[:-1], codes.shape[-1] // 4)
    groups = codes.reshape(*codes.shape[:-1], -1, period)
    words = torch.zeros((*groups.shape[:-1], per_group), dtype=torch.int32, device=codes.device)
    for i in range(period):
        word, offset = divmod(i * bits, WORD)
        code = groups[..., i].to(torch.int32)
        words[..., word] |= code << offset
        if offset + bits > WORD:
            words[..., word + 1] |= code >> (WORD - offset)
    return words.flatten(-2)[..., : word_count(count, bits, crossing=crossing)].contiguous()


def unpack_words(words: Tensor, bits: int, count: int, *, crossing: bool = True) -> Tensor:
    """The first `count` codes of int32 words [..., word_count], uint8 [..., count]."""
    period, per_group = _pattern(bits, crossing=crossing)
    padding = -words.shape[-1] % per_group
    if padding:
        words = torch.nn.functional.pad(words, (0, padding))
    if bits in IN_BYTES and LITTLE:
        codes, width = words.reshape(-1).view(torch.uint8), 8
        codes = codes.view(*words.shape[:-1], words.shape[-1] * 4)
        while width > bits:
            width //= 2
            both = (codes & ((1 << width) - 1), codes >> width)
            codes = torch.stack(both, dim=-1).flatten(-2)
        return codes[..., :count].contiguous()
    groups = words.reshape(*words.shape[:-1], -1, per_group)
    codes = torch.empty((*groups.shape[:-1], period), dtype=torch.uint8, device=words.device)
    for i in range(period):
        word, offset = divmod(i * bits, WORD)
        low = min(bits, WORD - offset)
        code = (groups[..., word] >> offset) & ((1 << low) - 1)
        if low < bits:
            code |= (groups[..., word + 1] & ((1 << (bits - low)) - 1)) << low
        codes[..., i] = code.to(torch.uint8)
    return codes.flatten(-2)[..., :count].contiguous()


def _pattern(bits: int, *, crossing: bool) -> tuple[int, int]:
    """Codes and words after which the placing of bits repeats."""
    if not crossing:
        return WORD // bits, 1
    common = math.gcd(bits, WORD)
    return WORD // common, bits // common

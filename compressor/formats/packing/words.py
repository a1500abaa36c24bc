"""Codes in 32-bit words: one bit stream per row, lowest bit first.

An element may cross a word's end (3, 5, 6 and 7 bits); bits left over in the last word are zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32


def word_count(count: int, bits: int) -> int:
    """Words that `count` codes of `bits` bits fill."""
    return -(-count * bits // WORD)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., count] into int32 [..., word_count]; codes are below 2^bits."""
    count = codes.shape[-1]
    period = WORD // math.gcd(bits, WORD)  # codes after which the pattern starts a new word
    padding = -count % period
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    groups = codes.reshape(*codes.shape[:-1], -1, period)
    words = torch.zeros(
        (*groups.shape[:-1], period * bits // WORD), dtype=torch.int32, device=codes.device
    )
    for i in range(period):
        word, offset = divmod(i * bits, WORD)
        code = groups[..., i].to(torch.int32)
        words[..., word] |= code << offset
        if offset + bits > WORD:
            words[..., word + 1] |= code >> (WORD - offset)
    return words.flatten(-2)[..., : word_count(count, bits)].contiguous()


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of int32 words [..., word_count], uint8 [..., count]."""
    period = WORD // math.gcd(bits, WORD)
    per_group = period * bits // WORD
    padding = -words.shape[-1] % per_group
    if padding:
        words = torch.nn.functional.pad(words, (0, padding))
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

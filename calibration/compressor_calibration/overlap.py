"""Rows that two token sets have in common."""

from typing import Any

import numpy as np
from torch import Tensor

from compressor_calibration.tokens import TokenSet

SHINGLE = 32


def overlap(a: TokenSet, b: TokenSet) -> int:
    """How many rows of `b` share a run of 32 tokens with a row of `a` (shorter rows: a whole row).

    Runs are compared by a 64-bit hash.
    """
    size = min(SHINGLE, a.ids.shape[1], b.ids.shape[1])
    known = np.unique(_shingles(a.ids, size))
    return int(np.isin(_shingles(b.ids, size), known).any(axis=1).sum())


def _shingles(ids: Tensor, size: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Hash of every run of `size` tokens, [rows, length - size + 1]."""
    x = ids.cpu().numpy().astype(np.uint64)
    # Spread each id over 64 bits (the finalizer of SplitMix64), so that the polynomial below,
    # which wraps around, mixes all of them.
    x += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    count = x.shape[1] - size + 1
    hashes = np.zeros((x.shape[0], count), dtype=np.uint64)
    for offset in range(size):
        hashes = hashes * np.uint64(0xD6E8FEB86659FD93) + x[:, offset : offset + count]
    return hashes

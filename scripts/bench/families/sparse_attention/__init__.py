"""Sparse attention at 32/8 heads of 128: XAttention, BLASST, LServe, MoBA and SparseSpec.

Prompts of 64k tokens, batch 1, beside PyTorch's own attention; steps at batch 8 beside our full
decode. Density is of causal tiles, and a tile counts as skipped only where all query heads of its
KV head skip it: choices here are alike in the heads of a KV head.
"""

from collections.abc import Iterator

from case import Case, Setup
from families.sparse_attention.drafts import drafts
from families.sparse_attention.pages import pages, quantized_pages
from families.sparse_attention.prompts import prompts
from families.sparse_attention.skipping import skipping_steps


def cases(setup: Setup) -> Iterator[Case]:
    yield from prompts(setup)
    yield from skipping_steps(setup)
    yield from pages(setup)
    yield from quantized_pages(setup)
    yield from drafts(setup)

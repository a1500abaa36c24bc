"""LServe's pages (arXiv 2502.14866): physical pages of keys by the bounds of the logical pages in
them, one choice for several steps."""

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from compressor_kernels.attention.block_pages import (
    page_bounds,
    page_bounds_ref,
    page_scores,
    page_scores_ref,
)
from compressor_kernels.attention.block_selection import top_blocks, top_blocks_ref
from compressor_kernels.triton.launch import pow2
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.key_blocks import KeyBlocks, by_kernel
from compressor.attention.masked import in_pieces
from compressor.attention.policy import AttentionPolicy
from compressor.attention.rule import Phase, RuleCall
from compressor.attention.rules.streaming import streaming_files
from compressor.errors import InputError

PAGES = "lserve.pages"


class LServePages(KeyBlocks):
    """Decoding reads `top_k` pages of what came before, and the page that is being written.

    block_size  keys of a physical page;  logical  keys of a logical one
    reuse       steps from one choice to the next: at every position that it divides
    weigh       what a page is worth by its logical pages' bounds: `max` of them, as released, or
                the logarithm of the `sum` of their exponentials, drawn in before (`drawn_in`)
    The last page of what came before is always read. The released kernel takes the last page of a
    list for the one being written, also where the list is older; here that one is read beside it.
    """

    title: ClassVar[str] = "LServe's bounds"
    phases: ClassVar[frozenset[Phase]] = frozenset(("decode",))

    logical: int = Field(16, ge=1)
    reuse: int = Field(4, ge=1)
    weigh: Literal["max", "sum"] = "max"

    @model_validator(mode="after")
    def _pages_divide(self) -> Self:
        inside = self.block_size // self.logical
        if inside * self.logical != self.block_size or inside != pow2(inside):
            raise ValueError(
                f"a page of {self.block_size} is no power of two of logical pages of {self.logical}"
            )
        if self.reuse > self.block_size:
            raise ValueError(f"a choice for {self.reuse} steps outlives a page")
        return self

    def choose(self, call: RuleCall) -> Tensor:
        tokens, q_len = call.key.shape[2], call.query.shape[2]
        own = torch.arange(tokens - q_len, tokens, device=call.key.device)
        memory = call.memory if q_len == 1 else None
        if memory is not None and PAGES in memory and (tokens - 1) % self.reuse:
            pages = memory[PAGES]
        else:
            # The first query of a call stands for those whose own choice lies before it.
            chooser = (own - own % self.reuse - own[0]).clamp(min=0)
            pages = self._of_history(call)[:, :, chooser]
        if memory is not None:
            memory[PAGES] = pages
        return with_own(pages, own // self.block_size)

    def _of_history(self, call: RuleCall) -> Tensor:
        """Pages that each query would choose of what came before it."""
        query, key, tokens = call.query, call.key, call.key.shape[2]
        group_max, size = self.per == "kv_head", self.block_size // self.logical
        fast = by_kernel(key)
        score = page_scores if fast and query.shape[2] == 1 else page_scores_ref
        top = top_blocks if fast else top_blocks_ref
        bounds = (page_bounds if fast else page_bounds_ref)(key, page_size=self.logical)
        soft = None
        if self.weigh == "sum":
            soft, bounds = call.scaling, drawn_in(*bounds)

        def choose(part: Tensor, behind: int) -> Tensor:
            scores = score(part, *bounds, group_max=group_max, per_page=size, soft=soft)
            # A query's own token is not yet there when it chooses.
            before = scores[..., : self.blocks.blocks(tokens - 1)]
            return top(before, self.blocks, tokens=tokens - 1, behind=behind)

        return in_pieces(choose, query, query.shape[1] * -(-tokens // self.logical))

    @classmethod
    def describe(cls, rules: Sequence[Self], policy: AttentionPolicy) -> list[str]:
        lines = super().describe(rules, policy)
        return [
            f"{line} of {rule.logical} keys{' together' if rule.weigh == 'sum' else ''}"
            f"{', the first always' if rule.init_blocks else ''}, "
            f"anew every {rule.reuse} steps"
            for line, rule in zip(lines, dict.fromkeys(rules), strict=True)
        ]


def drawn_in(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of keys a quarter nearer to their middle. No key reaches them in all components, so
    that sums over bounds as they are overstate pages whose keys differ."""
    quarter = (high.float() - low.float()) / 8
    return (low + quarter).to(low.dtype), (high - quarter).to(high.dtype)


def with_own(pages: Tensor, own: Tensor) -> Tensor:
    """Pages [rows, sets, Tq, K], ascending and then -1, with each query's own one [Tq]."""
    mine = own.to(pages.dtype)[:, None].expand(*pages.shape[:3], 1)
    there = (pages == mine).any(-1, keepdim=True)
    last = torch.iinfo(pages.dtype).max
    pages = torch.cat([pages, torch.where(there, -1, mine)], -1)
    pages = pages.masked_fill(pages < 0, last).sort(-1).values
    return pages.masked_fill(pages == last, -1)


def lserve_files(
    policy: AttentionPolicy, tensors: Mapping[str, Tensor], *, model: str
) -> dict[str, bytes]:
    """OmniServe's folder: DuoAttention's files for the heads that stream, and in `lserve.json` the
    options of its server for the others' pages, which it weighs by `max` whatever the rule says,
    and of which it reads no first one but for its score.
    Raises InputError where layers differ in these, or pages are not chosen by query head."""
    rules = {r for layer in policy.layers for r in layer.rules if isinstance(r, LServePages)}
    if len(rules) != 1 or next(iter(rules)).per != "query_head":
        raise InputError(
            "LServe's form has one choice of pages for all layers, by query head",
            hint="lserve: {per: query_head, dense_layers: []}",
        )
    (rule,) = rules
    options = {
        "dec_token_budget": rule.top_k * rule.block_size,
        "page_size": rule.block_size,
        "sub_chunk_per_block": rule.block_size // rule.logical,
        "selector_update_interval": rule.reuse,
    }
    files = streaming_files(policy, tensors, model=model)
    return {**files, "lserve.json": (json.dumps(options, indent=2) + "\n").encode()}


FORMS = {"lserve": lserve_files}

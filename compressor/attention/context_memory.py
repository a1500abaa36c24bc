"""InfLLM's context memory (arXiv 2402.04617): a text past the trained length, in a local window, a
few first tokens, and blocks of older ones that are looked up when they matter.

Keys and queries are not rotated yet. Inside the window distances are true; everything older stands
`local - 1` before each query, the farthest that the window knows. A prompt is worked off in pieces
of `piece` queries: each chooses blocks by the product of its mean query with the blocks'
representatives, and one softmax runs over window and memory. A block is represented by the mean
of the keys that each head attended to most while they were in the window. What leaves the window
becomes first tokens, then blocks; what does not fill a block yet is seen whole.
"""

from dataclasses import dataclass, field

import torch
from compressor_kernels.attention.block_memory import represent_blocks
from torch import Tensor

from compressor.attention.rope import Rotary, rotated


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """init, local       first tokens, and tokens of the window
    block, top_k      tokens of a block, blocks that a piece looks up
    representatives   keys of a block that stand for it
    piece             queries that look up together;  ahead  pieces that look up at once, in the
                      memory as it is before the first of them
    by_head           whether each query head looks up for itself
    cached, decay     blocks that a device would hold; None: the least recently used goes (LRU),
                      else that with the least attention, of which a step forgets all but this
                      (LRU-S)
    twice             whether early queries of a piece count old keys twice that they still see in
                      their windows, as the released code does
    """

    init: int = 128
    local: int = 4096
    block: int = 128
    top_k: int = 16
    representatives: int = 4
    piece: int = 512
    ahead: int = 1
    by_head: bool = False
    cached: int = 32
    decay: float | None = None
    twice: bool = False


@dataclass(slots=True)
class BlockCache:
    """Which blocks of one lookup a device would hold, in the order in which they came, with their
    values; and how many were loaded."""

    held: dict[int, float] = field(default_factory=dict)
    loaded: int = 0
    steps: int = 0

    def use(self, chosen: list[int], mass: list[float], sizes: MemorySizes) -> None:
        """A piece reads blocks; mass: the attention that each of them got."""
        self.steps += 1
        new = [block for block in chosen if block not in self.held]
        room = sizes.cached - len(new)
        idle = sorted((b for b in self.held if b not in chosen), key=lambda b: self.held[b])
        for block in idle[: max(0, len(self.held) - room)]:
            del self.held[block]
        self.loaded += len(new)
        if sizes.decay is None:
            self.held.update(dict.fromkeys(chosen, float(self.steps)))
            return
        for block in self.held:
            self.held[block] *= sizes.decay
        self.held.update(zip(chosen, mass, strict=True))


@dataclass(slots=True)
class ContextMemory:
    """The memory of one text.

    scores  what each token got from its windows, [heads, tokens]
    representatives  of blocks, [blocks, lookups, channels];  caches  one for each lookup
    """

    sizes: MemorySizes
    scores: Tensor | None = None
    representatives: Tensor | None = None
    caches: list[BlockCache] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    """Blocks of the last call's pieces, [lookups, n]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary, scaling: float) -> Tensor:
        """The last queries [heads, Tq, head_dim] of a text of which k and v [kv_heads, T, head_dim]
        hold all; rotary: tables of at least local + piece positions."""
        sizes, (heads, q_len, _), tokens = self.sizes, q.shape, k.shape[1]
        known = 0 if self.scores is None else self.scores.shape[1]
        grown = q.new_zeros((heads, tokens), dtype=torch.float32)
        if self.scores is not None:
            grown[:, :known] = self.scores
        self.scores = grown
        k, v = (x.repeat_interleave(heads // k.shape[0], dim=0) for x in (k, v))
        self.chosen = []
        planned: list[Tensor] = []
        out = []
        for number, part in enumerate(torch.split(q, sizes.piece, dim=1)):
            start = tokens - q_len + number * sizes.piece
            self._absorb(k, start)
            if number % sizes.ahead == 0:
                planned = [
                    self._look_up(later, rotary)
                    for later in torch.split(q[:, number * sizes.piece :], sizes.piece, dim=1)
                ][: sizes.ahead]
            blocks = planned[number % sizes.ahead]
            self.chosen.append(blocks)
            out.append(self._piece(part, k, v, start, blocks, rotary, scaling))
        return torch.cat(out, dim=1)

    def _blocks(self) -> int:
        return 0 if self.representatives is None else self.representatives.shape[0]

    def _absorb(self, k: Tensor, start: int) -> None:
        """Turn what has left the window before token `start` into blocks."""
        sizes, known = self.sizes, self._blocks()
        ready = max(0, start - sizes.local - sizes.init) // sizes.block
        if ready <= known:
            return
        span = slice(sizes.init + known * sizes.block, sizes.init + ready * sizes.block)
        assert self.scores is not None
        keys = _in_blocks(k[:, span], sizes.block).float()
        scores = _in_blocks(self.scores[:, span], sizes.block)
        new: Tensor = represent_blocks(keys, scores, tokens=sizes.representatives)
        new = new.view(len(new), k.shape[0] if sizes.by_head else 1, -1)
        held = self.representatives
        self.representatives = new if held is None else torch.cat([held, new])

    def _look_up(self, part: Tensor, rotary: Rotary) -> Tensor:
        """Blocks of a piece, int64 [lookups, n], ascending."""
        lookups = part.shape[0] if self.sizes.by_head else 1
        if self.representatives is None:
            return torch.zeros((lookups, 0), dtype=torch.int64, device=part.device)
        asks = _far(part, rotary, self.sizes).mean(1).view(lookups, -1).float()
        worth = torch.einsum("uc,buc->ub", asks, self.representatives)
        order = worth.argsort(dim=-1, descending=True, stable=True)
        return order[:, : self.sizes.top_k].sort(-1).values

    def _piece(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, blocks: Tensor, rotary: Rotary,
        scaling: float,
    ) -> Tensor:  # fmt: skip
        """Attention of the queries from token `start` on."""
        sizes, (heads, q_len, _) = self.sizes, q.shape
        end, device = start + q_len, q.device
        base = max(0, start - sizes.local + 1)
        place = torch.arange(start, end, device=device)[:, None]
        near = torch.arange(base, end, device=device)
        cos, sin = (table[: end - base] for table in rotary)
        local_q = rotated(q, (cos[start - base :], sin[start - base :]))
        local_k = rotated(k[:, base:end], (cos, sin))
        seen = (near <= place) & (place - near < sizes.local)
        # Old tokens: the first, blocks, and what is no block yet.
        left = max(0, start - sizes.local)
        init = torch.arange(min(sizes.init, left), device=device)
        first = len(init) + self._blocks() * sizes.block
        rest = torch.arange(first, max(first, end - sizes.local), device=device)
        inside = torch.arange(sizes.block, device=device)
        of_blocks = (sizes.init + blocks[..., None] * sizes.block + inside).flatten(1)
        old = torch.cat([x.expand(len(blocks), -1) for x in (init, of_blocks, rest)], -1).expand(
            heads, -1
        )
        scores = (local_q @ local_k.transpose(-1, -2)).float().masked_fill(~seen, -torch.inf)
        values = v[:, base:end]
        if old.shape[1]:
            take = old[..., None].expand(-1, -1, k.shape[-1])
            far_k = rotated(k.gather(1, take), _at(rotary, 0))
            far = (_far(q, rotary, sizes) @ far_k.transpose(-1, -2)).float()
            if not sizes.twice:
                in_window = place[None] - old[:, None] < sizes.local
                far = far.masked_fill(in_window, -torch.inf)
            scores = torch.cat([scores, far], -1)
            values = torch.cat([values, v.gather(1, take)], 1)
        share = (scores * scaling).softmax(-1)
        assert self.scores is not None
        self.scores[:, base:end] += share[..., : len(near)].sum(1)
        self._note(blocks, share[..., len(near) + len(init) :])
        return share.to(v.dtype) @ values

    def _note(self, blocks: Tensor, share: Tensor) -> None:
        """Count what a device would load; share begins with the blocks' tokens."""
        sizes = self.sizes
        count = blocks.shape[1]
        of_blocks = share[..., : count * sizes.block].sum(1)
        mass = of_blocks.view(len(share), count, sizes.block).sum(-1)
        if not sizes.by_head:
            mass = mass.sum(0, keepdim=True)
        self.caches = self.caches or [BlockCache() for _ in blocks]
        for cache, chosen, got in zip(self.caches, blocks.tolist(), mass.tolist(), strict=True):
            cache.use(chosen, got, sizes)


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """[heads, tokens, …] as [blocks, heads, size, …]."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).transpose(0, 1)


def _far(q: Tensor, rotary: Rotary, sizes: MemorySizes) -> Tensor:
    """Queries as old keys meet them."""
    return rotated(q, _at(rotary, sizes.local - 1))


def _at(rotary: Rotary, position: int) -> Rotary:
    cos, sin = rotary
    return cos[position : position + 1], sin[position : position + 1]

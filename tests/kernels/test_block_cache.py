"""The device's cache of key blocks: kernels against references, and attention that reads it."""

import pytest
import torch
from compressor_kernels.attention.block_attention import block_attention
from compressor_kernels.attention.block_cache import (
    fetch_blocks,
    fetch_blocks_ref,
    place_blocks,
    place_blocks_ref,
)
from compressor_kernels.attention.block_selection import BlockRule, top_blocks_ref

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wanted_blocks(lanes: int, k: int, *, blocks: int) -> torch.Tensor:
    rows = []
    for lane in range(lanes):
        count = k - lane % 3
        row = torch.randperm(blocks)[:count].sort().values
        rows.append(torch.cat([row, torch.full((k - count,), -1)]))
    return torch.stack(rows).to(DEVICE, torch.int32)


@pytest.mark.parametrize(("k", "slots"), [(5, 5), (5, 9), (7, 8)])
def test_every_wanted_block_has_a_slot_and_only_missing_ones_move(k, slots):
    torch.manual_seed(0)
    lanes = 3
    held = torch.full((lanes, slots), -1, dtype=torch.int32, device=DEVICE)
    held_ref = held.clone()
    for _ in range(4):
        wanted = wanted_blocks(lanes, k, blocks=12)
        lists = [torch.full((lanes * k, 3), -9, dtype=torch.int32, device=DEVICE) for _ in range(2)]
        counts = [torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in range(2)]
        before = held.clone()
        found = place_blocks(wanted, held, lists[0], counts[0])
        want = place_blocks_ref(wanted, held_ref, lists[1], counts[1])
        assert torch.equal(found, want)
        assert torch.equal(held, held_ref)
        moved = [sorted(x[: int(n)].tolist()) for x, n in zip(lists, counts, strict=True)]
        assert moved[0] == moved[1]
        for lane in range(lanes):
            needed = [b for b in wanted[lane].tolist() if b >= 0]
            assert held[lane][found[lane, : len(needed)].long()].tolist() == needed
            assert len([x for x in moved[0] if x[0] == lane]) == len(
                set(needed) - set(before[lane].tolist())
            )


def test_attention_over_the_cache_is_attention_over_the_text():
    torch.manual_seed(1)
    batch, groups, tokens, dim, size = 2, 2, 121, 32, 8
    rule = BlockRule(block_size=size, init_blocks=1, local_blocks=1, top_k=5)
    host = [torch.randn(batch * groups, tokens, dim).half() for _ in range(2)]
    host = [x.pin_memory() if DEVICE == "cuda" else x for x in host]
    k, v = (x.to(DEVICE).view(batch, groups, tokens, dim) for x in host)
    cache = [torch.zeros(batch * groups, 6 * size, dim, device=DEVICE).half() for _ in range(2)]
    plain = [x.clone() for x in cache]
    held = torch.full((batch * groups, 6), -1, dtype=torch.int32, device=DEVICE)
    for _ in range(3):
        scores = torch.randn(batch, groups, 1, rule.blocks(tokens), device=DEVICE)
        blocks = top_blocks_ref(scores, rule, tokens=tokens)
        missing = torch.empty(batch * groups * 5, 3, dtype=torch.int32, device=DEVICE)
        count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        slots = place_blocks(blocks.flatten(0, 2), held, missing, count)
        fetch_blocks(host, cache, missing, count, block_size=size, programs=3)
        fetch_blocks_ref(host, plain, missing, count, block_size=size)
        assert all(torch.equal(a, b) for a, b in zip(cache, plain, strict=True))
        q = torch.randn(batch, 4, 1, dim, device=DEVICE).half()
        held_k, held_v = (x.view(batch, groups, -1, dim) for x in cache)
        options = {"block_size": size, "tokens": tokens}
        out = block_attention(q, held_k, held_v, blocks, slots=slots.view_as(blocks), **options)
        assert torch.equal(out, block_attention(q, k, v, blocks, **options))


def test_a_cache_that_is_too_small_is_refused():
    held = torch.zeros(2, 3, dtype=torch.int32)
    wanted = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="cannot hold"):
        place_blocks(wanted, held, torch.zeros(8, 3, dtype=torch.int32), torch.zeros(1))
    with pytest.raises(ValueError, match="room"):
        place_blocks(wanted[:, :3], held, torch.zeros(2, 3, dtype=torch.int32), torch.zeros(1))

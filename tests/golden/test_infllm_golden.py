"""InfLLM's context memory against streams through the released code."""

import json

import pytest
import torch

from compressor.attention.context_memory import ContextMemory, MemorySizes
from tests.support.golden_files import vectors_and_notes

STREAMS = ["lru", "lru_s", "chunk_topk", "perhead"]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("twice", [True, False])
def test_a_stream(name: str, twice: bool) -> None:
    golden, notes = vectors_and_notes(f"systems/infllm_stream_{name}")
    told = {key: json.loads(value) for key, value in notes.items() if value[:1] not in "RD"}
    sizes = MemorySizes(
        init=told["n_init"],
        local=told["n_local"],
        block=told["block_size"],
        top_k=told["topk"],
        representatives=told["repr_topk"],
        piece=told["exc_block_size"],
        ahead=2 if name == "chunk_topk" else 1,
        by_head=told["perhead"],
        cached=told["max_cached_block"],
        decay=told["score_decay"],
        twice=twice,
    )
    want = golden["out"] if twice else golden.get("out_clean_complement_mask")
    if want is None:
        return
    dim = told["head_dim"]
    place = torch.arange(sizes.local + sizes.piece).float()
    angle = place[:, None] / told["rope_base"] ** (torch.arange(0, dim, 2) / dim)
    rotary = (torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin())
    q, k, v = (golden[x][0].float() for x in "qkv")
    memory, at, piece, alike = ContextMemory(sizes), 0, 0, 0
    for chunk in told["chunks"]:
        stop = at + chunk
        out = memory.attend(
            q[:, at:stop], k[:, :stop], v[:, :stop], rotary=rotary, scaling=dim**-0.5
        )
        for part, mine, chosen in zip(
            out.split(sizes.piece, 1),
            want[0, :, at:stop].split(sizes.piece, 1),
            memory.chosen,
            strict=True,
        ):
            theirs = [
                [x for x in row if x >= 0] for row in golden["exec_topk_blocks"][piece].tolist()
            ]
            # The vectors without the double count keep the blocks that were chosen with it.
            same = chosen.tolist() == theirs
            assert same or not twice
            if same:
                torch.testing.assert_close(part, mine, atol=2e-5, rtol=1e-4)
            alike += same
            piece += 1
        at = stop
        if twice:
            last = piece - 1
            for number, cache in enumerate(memory.caches):
                held = dict(sorted(cache.held.items()))
                blocks = [x for x in golden["exec_cached_blocks"][last, number].tolist() if x >= 0]
                assert list(held) == blocks
                values = golden["exec_cached_value"][last, number][: len(blocks)].tolist()
                assert list(held.values()) == pytest.approx(values, rel=1e-3)
    assert alike > 0.6 * piece
    if twice:
        # The reference also absorbs what the last chunk pushed out.
        memory._absorb(k.repeat_interleave(q.shape[0] // k.shape[0], 0), at)
        found = memory.representatives.flatten(1)
        theirs = golden["block_representative"].transpose(0, 1).flatten(1)
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-4)

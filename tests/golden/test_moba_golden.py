"""MoBA's routing, attention and key convolution against its published code."""

from itertools import pairwise

import pytest
import torch
from compressor_kernels.attention.block_attention import block_attention_ref, block_mask
from compressor_kernels.attention.block_routing import (
    convolved_keys,
    gated_blocks_ref,
    gates_ref,
    mean_keys_ref,
    route_ref,
)
from compressor_kernels.attention.block_selection import BlockRule
from torch import Tensor

from tests.support.golden_files import vectors, vectors_and_notes


def texts(golden: dict[str, Tensor], *names: str) -> list[list[Tensor]]:
    """[S, H, D] of all texts as [1, H, T, D] of each."""
    edges = golden["cu_seqlens"].tolist()
    spans = [slice(a, b) for a, b in pairwise(edges)]
    return [[golden[n][at].float().transpose(0, 1)[None] for n in names] for at in spans]


@pytest.mark.parametrize("name", ["single", "varlen", "topk_ge_blocks"])
def test_the_naive_reference(name: str) -> None:
    golden, notes = vectors_and_notes(f"attention/moba_{name}")
    size, top_k = int(notes["moba_chunk_size"]), int(notes["moba_topk"])
    rule = BlockRule(block_size=size, init_blocks=0, local_blocks=0, top_k=top_k)
    done = []
    for number, (q, k, v) in enumerate(texts(golden, "q", "k", "v")):
        means = mean_keys_ref(k, block_size=size)
        want = golden[f"block_mean_{number}"].transpose(0, 1)
        torch.testing.assert_close(means[0], want, atol=1e-6, rtol=1e-5)
        gate = golden[f"gate_{number}"]
        past = torch.isfinite(gate)
        torch.testing.assert_close(gates_ref(q, means)[0][past], gate[past], atol=1e-5, rtol=1e-4)
        blocks = gated_blocks_ref(q, means, rule, tokens=k.shape[2])
        chosen = torch.zeros(*gate.shape[:2], gate.shape[2] + 1, dtype=torch.bool)
        chosen.scatter_(-1, torch.where(blocks[0] < 0, gate.shape[2], blocks[0]).long(), True)
        # Theirs also names blocks to come, which the causal mask drops.
        attended = golden[f"need_attend_{number}"].bool() & (gate > -torch.inf)
        assert torch.equal(chosen[..., :-1], attended)
        done.append(block_attention_ref(q, k, v, blocks, block_size=size)[0].transpose(0, 1))
    torch.testing.assert_close(torch.cat(done), golden["out"], atol=1e-5, rtol=1e-4)


def test_queries_by_block() -> None:
    golden, notes = vectors_and_notes("systems/moba_flash_csr")
    size, top_k = int(notes["chunk"]), int(notes["topk"])
    rule = BlockRule(block_size=size, init_blocks=0, local_blocks=0, top_k=top_k)
    for text, (q, k, v) in enumerate(texts(golden, "q", "k", "v")):
        blocks = gated_blocks_ref(q, mean_keys_ref(k, block_size=size), rule, tokens=k.shape[2])
        count = -(-k.shape[2] // size)
        routed = route_ref(blocks, count)
        assert torch.equal(routed.counts[0], golden["col_nnz"][text, :, :count].int())
        for head in range(2):
            for block in range(count):
                start, many = (int(x[0, head, block]) for x in (routed.offsets, routed.counts))
                at = int(golden["col_offsets"][text, head, block])
                rows = routed.entries[0, head, start : start + many] // blocks.shape[3]
                assert torch.equal(rows, golden["row_indices"][at : at + many].int())
        edges = golden["cu_seqlens"].tolist()
        out = block_attention_ref(q, k, v, blocks, block_size=size)[0].transpose(0, 1)
        torch.testing.assert_close(
            out, golden["out"][edges[text] : edges[text + 1]], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("width", [3, 5])
def test_key_convolution(width: int) -> None:
    golden = vectors("systems/moba_key_conv")
    q, k, v = (golden[x].float().transpose(0, 1)[None] for x in "qkv")
    key = convolved_keys(k, golden[f"w{width}.weight"].float())
    want = golden[f"w{width}.key_conv"].transpose(0, 1)
    torch.testing.assert_close(key[0], want, atol=1e-5, rtol=1e-4)
    rule = BlockRule(block_size=16, init_blocks=0, local_blocks=0, top_k=3)
    blocks = gated_blocks_ref(q, mean_keys_ref(key, block_size=16), rule, tokens=96)
    out = block_attention_ref(q, key, v, blocks, block_size=16)
    want = golden[f"w{width}.out"].transpose(0, 1)
    torch.testing.assert_close(out[0], want, atol=1e-5, rtol=1e-4)
    assert block_mask(blocks, 96, block_size=16).any()

"""Attention over chosen blocks: the kernel against its reference, the reference against loops."""

import pytest
import torch
from compressor_kernels.attention.block_attention import (
    BlockTiles,
    block_attention,
    block_attention_ref,
    block_mask,
    tile_blocks,
)
from compressor_kernels.attention.block_selection import BlockRule, top_blocks_ref

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = BlockTiles(block_n=64)


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def choose(sets: int, q_len: int, rule: BlockRule, *, tokens: int, lengths=None, batch: int = 2):
    scores = torch.randn(batch, sets, q_len, rule.blocks(tokens), device=DEVICE)
    return top_blocks_ref(scores, rule, tokens=tokens, lengths=lengths)


@pytest.mark.parametrize(
    ("tokens", "q_len", "block_size", "lengths"),
    [
        (301, 1, 16, None),
        (301, 1, 16, [301, 37]),
        (290, 1, 64, [290, 3]),
        (130, 1, 24, None),  # blocks that are no power of two
        (7, 3, 16, [7, 5]),
        (150, 4, 24, [150, 88]),  # a prompt token by token
        (301, 37, 16, [301, 77]),  # and in tiles of tokens
        (70, 70, 64, None),
        (290, 9, 128, None),
    ],
)
@pytest.mark.parametrize("per_head", [False, True], ids=["per KV head", "per head"])
def test_kernel(tokens, q_len, block_size, lengths, per_head):
    torch.manual_seed(0)
    groups, heads, dim = 2, 6, 48
    rule = BlockRule(block_size=block_size, init_blocks=1, local_blocks=1, top_k=5)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    q = randn(2, q_len, heads, dim).transpose(1, 2)
    k, v = randn(2, groups, tokens, dim), randn(2, groups, tokens, dim)
    where = {"tokens": tokens, "lengths": lengths}
    blocks = choose(heads if per_head else groups, q_len, rule, **where)
    out = block_attention(q, k, v, blocks, block_size=block_size, **where, tiles=TILES)
    want = block_attention_ref(q, k, v, blocks, block_size=block_size, **where)
    torch.testing.assert_close(out, want, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(("tile", "q_len"), [(64, 150), (16, 33), (1, 3)])
def test_what_the_tokens_of_a_tile_chose(tile, q_len):
    torch.manual_seed(4)
    rule = BlockRule(block_size=8, init_blocks=1, local_blocks=1, top_k=4)
    blocks = choose(3, q_len, rule, tokens=q_len + 5)
    listed, bits, counts = tile_blocks(blocks, tile=tile, count=rule.blocks(q_len + 5))
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        for number, part in enumerate(blocks[tuple(place)].split(tile)):
            at, want = (*place, number), {}
            for token, row in enumerate(part.tolist()):
                for block in row:
                    if block >= 0:
                        want[block] = want.get(block, 0) | 1 << token
            count = int(counts[at])
            assert listed[at][:count].tolist() == sorted(want)
            assert [x % 2**64 for x in bits[at][:count].tolist()] == [want[b] for b in sorted(want)]


def test_reference_by_the_definition():
    torch.manual_seed(1)
    tokens, dim, rule = 50, 8, BlockRule(block_size=8, init_blocks=1, local_blocks=0, top_k=3)
    q, k, v = (torch.randn(1, n, tokens, dim).double() for n in (2, 1, 1))
    blocks = choose(1, tokens, rule, tokens=tokens, batch=1).cpu()
    out = block_attention_ref(q, k, v, blocks, block_size=8, scale=0.5)
    for i in range(tokens):
        keys = [j for j in range(i + 1) if j // 8 in blocks[0, 0, i].tolist()]
        for h in range(2):
            share = torch.softmax(0.5 * k[0, 0, keys] @ q[0, h, i], 0)
            torch.testing.assert_close(out[0, h, i], share @ v[0, 0, keys])


def test_all_blocks_chosen_is_full_attention():
    torch.manual_seed(2)
    tokens, rule = 12, BlockRule(block_size=4, init_blocks=1, local_blocks=1, top_k=9)
    q, k, v = (randn(1, n, tokens, 32) for n in (4, 2, 2))
    blocks = choose(2, tokens, rule, tokens=tokens, batch=1)
    out = block_attention(q, k, v, blocks, block_size=4, tiles=TILES)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out.float(), want, atol=4e-3, rtol=4e-3)


def test_mask_of_a_piece_is_a_piece_of_the_mask():
    torch.manual_seed(5)
    rule = BlockRule(block_size=8, init_blocks=1, local_blocks=1, top_k=4)
    blocks = choose(2, 60, rule, tokens=60)
    whole = block_mask(blocks, 60, block_size=8)
    part = block_mask(blocks[:, :, 20:40], 60, block_size=8, behind=20)
    assert torch.equal(part, whole[:, :, 20:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (2, 3, 1, 4)}, "do not fit"),
        ({"blocks": (2, 2, 5, 4)}, "do not fit"),
        ({"k": (2, 2, 64, 8)}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (2, 4, 1, 16), "k": (2, 2, 64, 16), "blocks": (2, 2, 1, 4), **change}
    blocks = torch.zeros(shapes["blocks"], dtype=torch.int32)
    q, k, v = randn(*shapes["q"]), randn(*shapes["k"]), randn(2, 2, 64, 16)
    with pytest.raises(ValueError, match=message):
        block_attention(q, k, v, blocks, block_size=16)


def test_a_scale_that_is_not_positive_is_refused():
    q, k, blocks = randn(1, 2, 1, 16), randn(1, 2, 64, 16), torch.zeros(1, 2, 1, 4).int()
    with pytest.raises(ValueError, match="scale"):
        block_attention(q, k, k, blocks, block_size=16, scale=-1.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "dtype"), [(64, torch.bfloat16), (16, torch.float16)])
def test_published_shapes_on_a_device(block_size, dtype):
    torch.manual_seed(6)
    rule = BlockRule(block_size=block_size, init_blocks=1, local_blocks=32, top_k=96)
    tokens = 20011
    k, v = randn(2, 8, tokens, 128, dtype=dtype), randn(2, 8, tokens, 128, dtype=dtype)
    for q_len, sets in ((1, 8), (1, 32), (77, 8)):
        q = randn(2, 32, q_len, 128, dtype=dtype)
        lengths = torch.tensor([tokens, tokens - 5003], dtype=torch.int32, device=DEVICE)
        where = {"tokens": tokens, "lengths": lengths}
        blocks = choose(sets, q_len, rule, **where)
        out = block_attention(q, k, v, blocks, block_size=block_size, **where)
        assert torch.equal(out, block_attention(q, k, v, blocks, block_size=block_size, **where))
        for row in range(0, q_len, 25):  # the reference takes much memory: some queries at a time
            part = slice(row, row + 1)
            want = block_attention_ref(
                q[:, :, part],
                k,
                v,
                blocks[:, :, part],
                block_size=block_size,
                tokens=tokens,
                lengths=lengths - (q_len - 1 - row),
            )
            torch.testing.assert_close(out[:, :, part], want, atol=2e-2, rtol=2e-2)

"""Attention with full and streaming heads: kernels against their references, references in fp64."""

import pytest
import torch
from compressor_kernels.attention.head_attention import (
    DecodeTiles,
    PrefillTiles,
    full_decode,
    full_decode_ref,
    head_decode,
    head_decode_ref,
    head_order,
    head_prefill,
    head_prefill_ref,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fp16 inputs, fp32 accumulation: weights and output are rounded to 11 bits.
LIMIT = 1e-3


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_near(out: torch.Tensor, want: torch.Tensor, limit: float = LIMIT) -> None:
    assert out.shape == want.shape
    error = (out.double() - want.double()).norm() / want.double().norm()
    assert error <= limit, f"relative error {error:.2e}"  # NaN fails too


def visible_by_definition(i: int, j: int, streaming: bool, sink: int, window: int) -> bool:
    return j <= i and (not streaming or j < sink or i - j < window)


def test_reference_follows_the_definition_token_by_token():
    torch.manual_seed(0)
    heads, groups, q_len, k_len, dim, sink, window = 4, 2, 7, 11, 8, 2, 3
    q = torch.randn(1, heads, q_len, dim, dtype=torch.float64)
    k, v = (torch.randn(1, groups, k_len, dim, dtype=torch.float64) for _ in range(2))
    streaming = torch.tensor([True, False])
    out = head_prefill_ref(q, k, v, streaming=streaming, sink=sink, window=window)
    for h in range(heads):
        g = h // 2
        for row in range(q_len):
            i = row + k_len - q_len
            keys = [
                j
                for j in range(k_len)
                if visible_by_definition(i, j, bool(streaming[g]), sink, window)
            ]
            weights = torch.softmax(k[0, g, keys] @ q[0, h, row] / dim**0.5, 0)
            torch.testing.assert_close(out[0, h, row], weights @ v[0, g, keys])


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "q_len", "k_len", "dim", "sink", "window"),
    [
        (2, 4, 2, 150, 150, 64, 8, 40),  # two batch rows, grouped heads
        (1, 4, 4, 70, 200, 32, 5, 60),  # a later chunk of a prompt
        (1, 2, 1, 130, 300, 96, 0, 33),  # no sinks, a head size that is no power of two
        (1, 6, 2, 129, 129, 128, 200, 16),  # more sinks than tokens
        (1, 2, 2, 100, 100, 64, 64, 1),  # a window of the query alone
        (1, 2, 2, 1, 77, 64, 4, 500),  # one query, a window longer than the text
        (1, 2, 2, 1, 1, 64, 1, 1),
    ],
)
def test_prefill(batch, heads, groups, q_len, k_len, dim, sink, window, overlap):
    torch.manual_seed(1)
    q = randn(batch, heads, q_len, dim)
    k, v = randn(batch, groups, k_len, dim), randn(batch, groups, k_len, dim)
    streaming = torch.arange(groups, device=DEVICE) % 2 == 0
    options = {"streaming": streaming, "sink": sink, "window": window}
    tiles = PrefillTiles(64, 32, 4, 2, overlap)
    out = head_prefill(q, k, v, **options, tiles=tiles)
    assert_near(out, head_prefill_ref(q, k, v, **options))


def test_prefill_reads_strided_inputs_and_takes_a_scale():
    torch.manual_seed(2)
    q = randn(1, 90, 4, 64).transpose(1, 2)
    k, v = (randn(1, 90, 2, 64).transpose(1, 2) for _ in range(2))
    options = {"streaming": torch.tensor([False, True]), "sink": 3, "window": 20, "scale": 0.3}
    out = head_prefill(q, k, v, **options, tiles=PrefillTiles(64, 64, 4, 2, True))
    assert_near(out, head_prefill_ref(q, k, v, **options))


def test_prefill_of_full_heads_is_causal_attention():
    torch.manual_seed(3)
    q, k, v = randn(1, 2, 80, 64), randn(1, 2, 80, 64), randn(1, 2, 80, 64)
    none = torch.zeros(2, dtype=torch.bool, device=DEVICE)
    out = head_prefill(q, k, v, streaming=none, sink=0, window=1)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True
    )
    assert_near(out, want)


@pytest.mark.parametrize(
    ("batch", "heads", "full", "stream", "tokens", "kept", "dim"),
    [
        (2, 8, 2, 2, 700, 40, 64),
        (1, 6, 1, 2, 513, 17, 96),
        (2, 4, 1, 1, 30, 30, 128),  # one split: no combine
        (1, 4, 0, 2, 0, 77, 32),  # every head streams
    ],
)
def test_decode_over_a_split_cache(batch, heads, full, stream, tokens, kept, dim):
    torch.manual_seed(4)
    q = randn(batch, heads, 1, dim)
    caches = [randn(batch, full, tokens, dim) for _ in range(2)]
    caches += [randn(batch, stream, kept, dim) for _ in range(2)]
    streaming = torch.arange(full + stream, device=DEVICE) < stream
    lengths = {"stream_len": torch.tensor([kept, 1][:batch], dtype=torch.int32, device=DEVICE)}
    for b, row in enumerate(lengths["stream_len"].tolist()):
        caches[2][b, :, row:] = caches[3][b, :, row:] = torch.nan  # unused slots are never read
    if full:
        lengths["full_len"] = torch.tensor([tokens, 3][:batch], dtype=torch.int32, device=DEVICE)
    order = head_order(streaming)
    out = head_decode(q, *caches, order=order, **lengths)
    assert_near(out, head_decode_ref(q, *caches, order=order, **lengths))
    assert torch.equal(out, head_decode(q, *caches, order=order, **lengths))


def test_full_decode_does_not_depend_on_how_keys_are_split():
    torch.manual_seed(5)
    q, k, v = randn(1, 4, 1, 64), randn(1, 1, 600, 64), randn(1, 1, 600, 64)
    want = full_decode_ref(q.double(), k.double(), v.double())
    for per_processor in (1, 2, 8):
        tiles = DecodeTiles(32, 4, 2, per_processor)
        assert_near(full_decode(q, k, v, tiles=tiles), want)


def test_decode_is_the_last_row_of_prefill():
    torch.manual_seed(6)
    tokens, sink, window = 90, 4, 16
    q, k, v = randn(1, 4, 1, 64), randn(1, 2, tokens, 64), randn(1, 2, tokens, 64)
    streaming = torch.tensor([True, False], device=DEVICE)
    kept = [*range(sink), *range(tokens - window, tokens)]
    split = (k[:, 1:], v[:, 1:], k[:, :1, kept], v[:, :1, kept])
    out = head_decode(q, *split, order=head_order(streaming))
    assert_near(out, head_prefill_ref(q, k, v, streaming=streaming, sink=sink, window=window))


def test_head_order_puts_full_heads_first():
    assert head_order(torch.tensor([True, False, True, False])).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 3, 8, 64)}, "does not fit"),
        ({"q": (1, 4, 9, 64)}, "Tq <= Tk"),
        ({"q": (1, 4, 8, 256), "k": (1, 2, 8, 256)}, "head dimension"),
        ({"window": 0}, "window"),
        ({"streaming": torch.zeros(3, dtype=torch.bool)}, "streaming"),
        ({"scale": -1.0}, "scale"),
    ],
)
def test_prefill_refuses_what_does_not_fit(change, message):
    q, k = randn(*change.pop("q", (1, 4, 8, 64))), randn(*change.pop("k", (1, 2, 8, 64)))
    options = {"streaming": torch.zeros(2, dtype=torch.bool), "sink": 1, "window": 2} | change
    with pytest.raises(ValueError, match=message):
        head_prefill(q, k, k, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_default_tiles_on_a_device(dtype, dim):
    torch.manual_seed(7)
    q = randn(2, 8, 1111, dim, dtype=dtype)
    k, v = (randn(2, 2, 2222, dim, dtype=dtype) for _ in range(2))
    options = {"streaming": torch.tensor([True, False]).cuda(), "sink": 128, "window": 256}
    assert_near(head_prefill(q, k, v, **options), head_prefill_ref(q, k, v, **options), 6e-3)
    assert_near(full_decode(q[:, :, :1], k, v), full_decode_ref(q[:, :, :1], k, v), 6e-3)

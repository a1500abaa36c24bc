"""Attention with full and streaming heads, at Llama-3-8B's shape: half of the KV heads stream."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from case import Case, Peer, Setup, nbytes, relative_error
from compressor_kernels.attention import head_attention as kernel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

PREFILL = [kernel.PrefillTiles(128, 64, 8, stages, True) for stages in (3, 4)]
PREFILL += [kernel.PrefillTiles(128, 128, 8, 2, False), kernel.PrefillTiles(64, 64, 4, 3, True)]
DECODE = [kernel.DecodeTiles(n, 4, 3, per_sm) for n in (64, 128) for per_sm in (2, 4, 8)]


def backend(which: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[int], Tensor]:
    """PyTorch's attention by one backend; KV heads repeated up front where it knows no groups."""

    def run(i: int, k: Tensor = k, v: Tensor = v) -> Tensor:
        with sdpa_kernel(which):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        run(0)
    except RuntimeError:
        many = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(many, dim=1) for x in (k, v))
        return partial(run, k=k, v=v)
    return run


def cases(setup: Setup) -> Iterator[Case]:
    heads, groups, dim, tokens, sink, window = setup.pick(
        (32, 8, 128, 32768, 128, 256), (4, 2, 64, 200, 16, 32)
    )
    mixed = torch.arange(groups, device=setup.device) % 2 == 0
    q = setup.randn(1, heads, tokens, dim)
    k, v = (setup.randn(1, groups, tokens, dim) for _ in range(2))
    peers = {
        "PyTorch flash": Peer(backend(SDPBackend.FLASH_ATTENTION, q, k, v)),
        "PyTorch cuDNN": Peer(backend(SDPBackend.CUDNN_ATTENTION, q, k, v)),
    }
    case = partial(Case, limit=6e-3)
    for name, streaming in (("all heads full", torch.zeros_like(mixed)), ("half streaming", mixed)):
        how = {"streaming": streaming, "sink": sink, "window": window}
        yield case(
            f"prefill, {name}",
            lambda i, tiles=None, how=how: kernel.head_prefill(q, k, v, **how, tiles=tiles),
            partial(kernel.head_prefill_ref, q[:, :, -64:], k, v, **how),
            shape=f"{heads}/{groups}x{tokens}",
            error=lambda out, want: relative_error(out[:, :, -64:], want),
            ops=2 * tokens * tokens * dim * heads if streaming is not mixed else 0,
            peers=peers,
            tiles=PREFILL if streaming is not mixed else (),
        )
    batch, half = setup.pick(8, 2), groups // 2
    one = setup.randn(batch, heads, 1, dim)
    full = [setup.randn(batch, groups, tokens, dim) for _ in range(2)]
    split = [setup.randn(batch, half, tokens, dim) for _ in range(2)]
    split += [setup.randn(batch, half, sink + window, dim) for _ in range(2)]
    order = kernel.head_order(mixed)
    shape = f"{batch}x{heads}/{groups}x{tokens}"
    yield case(
        "decode, all heads full",
        lambda i, tiles=None: kernel.full_decode(one, *full, tiles=tiles),
        partial(kernel.full_decode_ref, one, *full),
        shape=shape,
        moved=nbytes(*full),
        tiles=DECODE,
    )
    yield case(
        "decode, half streaming",
        lambda i, tiles=None: kernel.head_decode(one, *split, order=order, tiles=tiles),
        partial(kernel.head_decode_ref, one, *split, order=order),
        shape=shape,
        moved=nbytes(*split),
        peers={"our full decode": Peer(lambda i: kernel.full_decode(one, *full))},
        tiles=DECODE,
    )

"""Attention with full and streaming heads, at Llama-3-8B's shape: half of the KV heads stream."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from case import Case, Heads, Peer, Setup, last_queries, nbytes
from compressor_kernels.attention import head_attention as kernel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def backend(which: SDPBackend, all_of: Heads) -> Callable[[int], Tensor]:
    """PyTorch's attention by one backend; KV heads repeated up front where it knows no groups."""

    def run(i: int, k: Tensor = all_of.k, v: Tensor = all_of.v) -> Tensor:
        with sdpa_kernel(which):
            return scaled_dot_product_attention(all_of.q, k, v, is_causal=True, enable_gqa=True)

    try:
        run(0)
    except RuntimeError:
        many = all_of.q.shape[1] // all_of.k.shape[1]
        k, v = (x.repeat_interleave(many, dim=1) for x in (all_of.k, all_of.v))
        return partial(run, k=k, v=v)
    return run


def dense(all_of: Heads) -> dict[str, Peer]:
    return {
        "PyTorch flash": Peer(backend(SDPBackend.FLASH_ATTENTION, all_of)),
        "PyTorch cuDNN": Peer(backend(SDPBackend.CUDNN_ATTENTION, all_of)),
    }


def cases(setup: Setup) -> Iterator[Case]:
    heads, groups, dim, tokens, sink, window = setup.pick(
        (32, 8, 128, 32768, 128, 256), (4, 2, 64, 200, 16, 32)
    )
    mixed = torch.arange(groups, device=setup.device) % 2 == 0
    prompt = setup.heads(1, heads, groups, tokens, dim, queries=tokens)
    q, k, v = prompt.q, prompt.k, prompt.v
    peers = dense(prompt)
    for name, streaming in (("all heads full", torch.zeros_like(mixed)), ("half streaming", mixed)):
        how = {"streaming": streaming, "sink": sink, "window": window}
        yield Case(
            f"prefill, {name}",
            lambda i, how=how: kernel.head_prefill(q, k, v, **how),
            partial(kernel.head_prefill_ref, q[:, :, -64:], k, v, **how),
            shape=f"{heads}/{groups}x{tokens}",
            limit=6e-3,
            error=last_queries,
            ops=2 * tokens * tokens * dim * heads if streaming is not mixed else 0,
            peers=peers,
        )
    batch, half = setup.pick(8, 2), groups // 2
    step = setup.heads(batch, heads, groups, tokens, dim)
    split = [setup.randn(batch, half, tokens, dim) for _ in range(2)]
    split += [setup.randn(batch, half, sink + window, dim) for _ in range(2)]
    order = kernel.head_order(mixed)
    case = partial(Case, shape=step.shape, limit=6e-3)
    yield case(
        "decode, all heads full",
        step.full.run,
        partial(kernel.full_decode_ref, step.q, step.k, step.v),
        moved=nbytes(step.k, step.v),
    )
    yield case(
        "decode, half streaming",
        lambda i: kernel.head_decode(step.q, *split, order=order),
        partial(kernel.head_decode_ref, step.q, *split, order=order),
        moved=nbytes(*split),
        peers={"our full decode": step.full},
    )

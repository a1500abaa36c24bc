"""Attention with full and streaming heads, at Llama-3-8B's shape: half of the KV heads stream."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Call, Case, Heads, Setup
from compressor_kernels.attention import head_attention as kernel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "PyTorch flash": SDPBackend.FLASH_ATTENTION,
    "PyTorch cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def attend(q: Tensor, k: Tensor, v: Tensor, *, which: SDPBackend) -> Tensor:
    with sdpa_kernel(which):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dense(prompt: Heads) -> dict[str, Call]:
    """PyTorch's attention; KV heads repeated up front where a backend knows no groups."""
    peers = {}
    for name, which in BACKENDS.items():
        q, k, v = prompt.all
        try:
            attend(q, k, v, which=which)
        except RuntimeError:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        peers[name] = Call(attend, [(q, k, v)], {"which": which})
    return peers


def cases(setup: Setup) -> Iterator[Case]:
    heads, groups, dim, tokens, sink, window = setup.pick(
        (32, 8, 128, 32768, 128, 256), (4, 2, 64, 200, 16, 32)
    )
    mixed = torch.arange(groups, device=setup.device) % 2 == 0
    prompt = setup.heads(1, heads, groups, tokens, dim, queries=tokens)
    peers = dense(prompt)
    for name, streaming in (("all heads full", torch.zeros_like(mixed)), ("half streaming", mixed)):
        yield Case(
            kernel.head_prefill,
            [prompt.all],
            {"streaming": streaming, "sink": sink, "window": window},
            name=f"prefill, {name}",
            reference=lambda q, *kv, **how: kernel.head_prefill_ref(q[:, :, -64:], *kv, **how),
            shape=f"{heads}/{groups}x{tokens}",
            limit=6e-3,
            moved=0,
            ops=2 * tokens * tokens * dim * heads if streaming is not mixed else 0,
            peers=peers,
        )
    batch, half = setup.pick(8, 2), groups // 2
    step = setup.heads(batch, heads, groups, tokens, dim)
    case = partial(Case, shape=step.shape, limit=6e-3)
    yield case(
        kernel.full_decode,
        [step.all],
        name="decode, all heads full",
        reference=kernel.full_decode_ref,
    )
    lengths = (tokens, tokens, sink + window, sink + window)
    yield case(
        kernel.head_decode,
        [(step.q, *(setup.randn(batch, half, length, dim) for length in lengths))],
        {"order": kernel.head_order(mixed)},
        name="decode, half streaming",
        reference=kernel.head_decode_ref,
        peers={"our full decode": step.full},
    )

"""Streaming attention against vectors made with the reference implementations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from compressor.attention import AttentionCall
from compressor.layout import AttentionShape, UnitLayout
from compressor.passes.base import Unit
from compressor.policy import AttentionPolicy, head_layers, token_mask
from compressor.policy_attention import policy_attention

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden")) / "attention"


def vectors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no golden vectors at {path}; set GOLDEN_DIR")
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def attended(
    q: Tensor, k: Tensor, v: Tensor, policy: AttentionPolicy, *, rotary: object = None
) -> Tensor:
    """The first block's attention of q [rows, heads, length, head_dim] under a policy."""

    def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) / q.shape[-1] ** 0.5
        assert mask is not None
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2)

    shape = AttentionShape(heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[-1])
    layout = UnitLayout(name="0", kind="block", index=0, tensors=(), attention=shape)
    hook = policy_attention(policy)(Unit(layout=layout, tensors={}))
    assert hook is not None
    call = AttentionCall(0, q, k, v, None, q.shape[-1] ** -0.5, plain, rotary)
    return hook(call)


def all_streaming(heads: int, kv_heads: int, *, sinks: int, window: int, positions: str = "text"):
    layers = head_layers(torch.ones(1, kv_heads), sinks=sinks, window=window)
    return AttentionPolicy(heads=heads, kv_heads=kv_heads, positions=positions, layers=layers)


def test_streaming_mask_and_output_are_duo_attentions() -> None:
    given, _ = vectors("duo_streaming_gate_mix")
    place = torch.arange(40)
    mask = token_mask(place, place, sinks=4, window=8)
    assert torch.equal(mask, given["streaming_mask"][0, 0].bool())
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    found = attended(q, k, v, all_streaming(4, 2, sinks=4, window=8))
    torch.testing.assert_close(found, given["streaming_out"], atol=1e-5, rtol=1e-4)


def test_slot_positions_are_streaming_llms() -> None:
    """One masked pass gives what the reference decodes token by token. Its cache of 4 + 12 is read
    together with the step's own token: a window of 13."""
    given, _ = vectors("streamingllm_pos_shift_decode")
    x = given["x"][0]
    angles = torch.arange(40)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = (torch.cat([f(angles), f(angles)], dim=-1) for f in (torch.cos, torch.sin))

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    q = turned((x @ given["Wq"].T).reshape(40, 2, 8).transpose(0, 1))[None]
    k = turned((x @ given["Wk"].T).reshape(40, 1, 8).transpose(0, 1))[None]
    v = (x @ given["Wv"].T).reshape(40, 1, 8).transpose(0, 1)[None]
    policy = all_streaming(2, 1, sinks=4, window=13, positions="slot")
    out = attended(q, k, v, policy, rotary=(cos, sin))
    found = out.reshape(40, 16) @ given["Wo"].T
    torch.testing.assert_close(found, given["out"], atol=1e-5, rtol=1e-4)
    kept = given["kept_token_ids"][39]
    seen = token_mask(torch.tensor([39]), torch.arange(40), sinks=4, window=12)[0].nonzero()[:, 0]
    assert torch.equal(kept, seen)

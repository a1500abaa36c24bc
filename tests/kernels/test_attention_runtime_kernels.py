"""Generating under a policy through the kernels gives what plain PyTorch gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.attention.policy import AttentionPolicy
from compressor.attention.rules import streaming
from compressor.attention.rules.streaming import head_layers
from compressor.attention.serve import attach

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_kernels_give_the_same_logits(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    model.to(DEVICE)
    layers = head_layers([[True, False], [False, True]], sinks=3, window=9)
    policy = AttentionPolicy(heads=4, kv_heads=2, layers=layers)
    ids = torch.randint(2, 256, (2, 41), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    calls = {"prefill": 0, "decode": 0}

    def counted(name: str) -> None:
        make = getattr(streaming, f"head_{name}")

        def call(*args: Any, **options: Any) -> Tensor:
            calls[name] += 1
            return make(*args, **options)

        monkeypatch.setattr(streaming, f"head_{name}", call)

    counted("prefill")
    counted("decode")

    @torch.no_grad()
    def logits(kernels: bool) -> Tensor:
        runtime = attach(model, policy, kernels=kernels)
        options = runtime.options()
        parts = [ids[:, :38], *ids[:, 38:].split(1, dim=1)]
        out = [model(part, **options, use_cache=True).logits for part in parts]
        runtime.detach()
        return torch.cat(out, dim=1).float()

    plain = logits(kernels=False)
    assert calls == {"prefill": 0, "decode": 0}
    found = logits(kernels=True)
    assert calls == {"prefill": 2, "decode": 6}
    error = (found - plain).norm() / plain.norm()
    assert float(error) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_and_texts_of_a_real_size(
    dtype: torch.dtype, tiny_model: Callable[..., Path]
) -> None:
    """As near to float32 as plain PyTorch, over a prompt, single tokens, a chunk, and a token."""
    folder = tiny_model(
        "llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        max_position_embeddings=2048,
    )  # fmt: skip
    rows = [[True, False, False], [False, True, True]]
    layers = head_layers(rows, sinks=16, window=200)
    policy = AttentionPolicy(heads=9, kv_heads=3, layers=layers)
    ids = torch.randint(2, 256, (2, 1507), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    pieces = ids.split([1401, *[1] * 5, 100, 1], dim=1)

    @torch.no_grad()
    def logits(dtype: torch.dtype, kernels: bool) -> Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
        runtime = attach(model, policy, kernels=kernels)
        options = runtime.options()
        out = [model(piece, **options, use_cache=True).logits.float() for piece in pieces]
        (cache,) = options.values()
        kept = 2 * 2 * 64 * dtype.itemsize * (3 * 1507 + 3 * (16 + 199))
        assert cache.nbytes == kept
        return torch.cat(out, dim=1)

    exact = logits(torch.float32, kernels=False)
    plain, found = ((logits(dtype, kernels=k) - exact).norm() / exact.norm() for k in (False, True))
    assert float(found) <= 1.5 * float(plain) + 1e-4

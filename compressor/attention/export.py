"""Attention policies in the form that other runtimes read."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.attention.policy import AttentionPolicy
from compressor.errors import InputError

GATES = "duo_attention.gates"


def duo_attention_files(
    policy: AttentionPolicy, tensors: Mapping[str, Tensor], *, model: str
) -> dict[str, bytes]:
    """DuoAttention's folder: `full_attention_heads.tsv`, a row of gates for each layer, and
    `config.json` with the window. LServe reads the same.

    Readers choose heads by the quantile of `sparsity`; gates that would give them other heads than
    the policy's (as after a threshold) are written as 1 and 0. `window` counts the query's own
    token, as `recent_size` does in that project's training mask.
    Raises InputError where layers have different windows or positions go by slot.
    """
    windows = {(x.streaming.sinks, x.streaming.window) for x in policy.layers if x.streaming}
    if policy.positions != "text" or len(windows) > 1:
        raise InputError(
            "DuoAttention's form has one window for all layers, and positions by text",
            hint="positions: text",
        )
    if policy.reordered:
        raise InputError(
            "the heads are sorted in the weights; that form counts heads as the model had them",
            hint="learn the policy with reorder: false",
        )
    sinks, window = windows.pop() if windows else (0, 0)
    full = ~policy.streaming_mask()
    share = policy.streaming_share
    gates = tensors.get(GATES)
    if gates is None or not torch.equal(_as_read(gates, share), full):
        gates = full.float()
    held = io.StringIO()
    np.savetxt(held, gates.double().numpy(), delimiter="\t")
    about: dict[str, Any] = policy.made_by.get("duo_attention", {})
    config = {
        **{key: value for key, value in about.items() if not isinstance(value, dict)},
        "model_name": model,
        "sink_size": sinks,
        "recent_size": window,
        "sparsity": share,
    }
    return {
        "full_attention_heads.tsv": held.getvalue().encode(),
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def _as_read(gates: Tensor, share: float) -> Tensor:
    """Which heads those readers take as full at a sparsity."""
    if share <= 0:
        return torch.ones_like(gates, dtype=torch.bool)
    if share >= 1:
        return torch.zeros_like(gates, dtype=torch.bool)
    values = gates.double().clamp(0, 1)
    return values >= torch.quantile(values.flatten(), share)

"""BLASST's part of config.json through ModelOpt's own reader, where it is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from compressor.attention.rules.blasst import Blasst, SkipPhase


def test_modelopt_reads_what_was_fitted() -> None:
    reader = pytest.importorskip(
        "modelopt.torch.sparsity.attention_sparsity.plugins.sparse_attn_config"
    )
    fit = SkipPhase(a=7.93, b=8.61, sparsity=0.5, lengths=(1024, 8192))
    rule = Blasst(prefill=fit, decode=fit, targets=("LlamaAttention",))
    found, preset = reader.load_from_checkpoint_metadata(SimpleNamespace(**rule.config()))
    layer = found["sparse_cfg"]["*attn*"]
    assert preset == "CHECKPOINT_CALIBRATED_SOFTMAX_SKIP"
    assert layer["threshold_scale_factor"]["decode"] == {"a": 7.93, "b": 8.61}
    assert layer["target_sparse_ratio"] == {"prefill": 0.5, "decode": 0.5}

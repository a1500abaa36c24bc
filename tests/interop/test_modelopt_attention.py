"""BLASST's part of config.json through ModelOpt's own reader, where it is installed."""

from types import SimpleNamespace

import pytest
from transformers.models.llama.modeling_llama import LlamaAttention

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


def test_it_is_what_modelopt_itself_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key by key, but for the producer."""
    exporter = pytest.importorskip("modelopt.torch.sparsity.attention_sparsity.conversion")
    a, b = {"a": 7.93, "b": 8.61}, {"a": 0.12, "b": 9.85}
    method = SimpleNamespace(
        calibration_params={"prefill": a, "decode": b},
        target_sparse_ratio={"prefill": 0.5, "decode": 0.6},
    )
    module = SimpleNamespace(
        is_enabled=True,
        _sparse_method_instance=method,
        _method_config={},
        get_original_cls_by_level=lambda level: LlamaAttention,
    )
    monkeypatch.setattr(
        exporter, "get_named_sparse_attention_modules", lambda model: [("attn", module)]
    )
    monkeypatch.setattr(exporter, "_get_sparse_softmax_export_config", lambda module: None)
    theirs = exporter.export_sparse_attention_config(None)
    rule = Blasst(
        prefill=SkipPhase(**a, sparsity=0.5, lengths=(1024, 8192)),
        decode=SkipPhase(**b, sparsity=0.6, lengths=(1024, 8192)),
        targets=("LlamaAttention",),
    )
    ours = rule.config()["sparse_attention_config"]
    assert theirs.pop("producer").keys() == ours.pop("producer").keys()
    assert ours == theirs

"""vLLM's own config classes parse what is written; no GPU and no kernel is needed for that."""

from __future__ import annotations

import json

import pytest

from compressor.formats.base import ModelSchemes, get_format
from compressor.ir.scheme import Scheme
from tests.support.low_bit_cases import FORMATS, cases

pytestmark = pytest.mark.interop

ALGORITHMS = {"NVFP4": "modelopt_fp4", "W4A16_NVFP4": "modelopt_fp4"}
"""Of which vLLM has another method than their `quant_method`."""


@pytest.mark.parametrize("name", sorted({*FORMATS} - {"qserve", "gpt-oss"}))
def test_a_config_is_parsed(name: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (its wheel brings CUDA libraries)")
    from vllm.model_executor.layers.quantization import get_quantization_config

    fmt = get_format(name)
    for spec, input, _ in cases(name):
        schemes = ModelSchemes({"model.a": Scheme(spec, input), "lm_head": Scheme()})
        config = json.loads(json.dumps(fmt.config(schemes)))
        method = ALGORITHMS.get(config.get("quant_algo", ""), config["quant_method"])
        beside = json.loads(json.dumps(fmt.files(schemes)))  # which vLLM reads first
        said = beside.get("hf_quant_config.json", config)
        parsed = get_quantization_config(method).from_config(said)
        ignored = next(
            getattr(parsed, key)
            for key in ("ignore", "ignored_layers", "exclude_modules")
            if hasattr(parsed, key)
        )
        assert ignored == ["lm_head"]

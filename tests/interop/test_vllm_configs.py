"""vLLM's own config classes parse what is written and choose a scheme for it where the contract
says that it loads, and nowhere else; no GPU and no kernel is needed for that."""

import json
from types import SimpleNamespace

import pytest
import torch

from compressor.formats.base import ModelSchemes, get_format
from compressor.ir.scheme import Scheme
from compressor.runtimes.contract import parse_runtime
from compressor.runtimes.loads import loads
from compressor.runtimes.page import LINEAR, SCHEMES, written
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


VERSIONS = ("0.24", "0.33")
"""Of which there is a contract."""


@pytest.mark.parametrize(("title", "name", "scheme"), SCHEMES)
def test_what_loads_has_a_scheme(
    title: str, name: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the GPU has a kernel for it is another question, which no CPU can answer."""
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    version = next((v for v in VERSIONS if f"{vllm.__version__}.".startswith(f"{v}.")), None)
    if version is None or scheme.weight is None:
        pytest.skip("no contract, or no config")
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    hopper = DeviceCapability(major=9, minor=0)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda *_, **__: hopper)
    refused = loads(parse_runtime(f"vllm@{version}, gpu: h100"), written(name, scheme))
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)
    with set_current_vllm_config(config):
        if refused and not any("kernel" in error.message for error in refused):
            with pytest.raises((ValueError, NotImplementedError)):
                choose(name, scheme)
            return
        try:
            choose(name, scheme)
        except ValueError as error:
            assert "kernel" in str(error), title


def choose(name: str, scheme: Scheme) -> None:
    """Have vLLM parse a config, and for compressed-tensors choose what computes a linear."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    fmt = get_format(name)
    schemes = ModelSchemes({LINEAR.name: scheme, "lm_head": Scheme()})
    config = json.loads(json.dumps(fmt.config(schemes)))
    beside = json.loads(json.dumps(fmt.files(schemes)))
    method = ALGORITHMS.get(config.get("quant_algo", ""), config["quant_method"])
    said = beside.get("hf_quant_config.json", config)
    parsed = get_quantization_config(method).from_config(said)
    if name == "compressed-tensors":
        parts = parsed.get_scheme_dict(torch.nn.Linear(8, 8), LINEAR.name)
        parsed._get_scheme_from_parts(
            parts["weights"], parts["input_activations"], format=parts.get("format")
        )

"""SGLang's own config classes parse what is written and choose a scheme for it, where the contract
says that it loads, and nowhere else; no GPU and no kernel is needed for that."""

import json
from typing import Any

import pytest
import torch

from compressor.formats.base import ModelSchemes, get_format
from compressor.ir.scheme import Scheme
from compressor.runtimes.contract import parse_runtime
from compressor.runtimes.loads import loads
from compressor.runtimes.page import LINEAR, SCHEMES, written

pytestmark = pytest.mark.interop

VERSION = "0.5.23"
METHODS = {
    "modelopt-fp8": "modelopt_fp8",
    "modelopt-nvfp4": "modelopt_fp4",
    "gptq": "gptq_marlin",
    "gptq-v2": "gptq_marlin",
}
"""Where SGLang has another name than the config's `quant_method`."""
HOPPER = (9, 0)


@pytest.mark.parametrize(("title", "name", "scheme"), SCHEMES)
def test_what_loads_is_parsed_and_has_a_scheme(
    title: str, name: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    sglang = pytest.importorskip("sglang", reason="SGLang is not installed (it brings CUDA)")
    if sglang.__version__ != VERSION:
        pytest.skip(f"the contract is of {VERSION}")
    if scheme.weight is None:
        pytest.skip("there is no config")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: HOPPER)
    refused = loads(parse_runtime(f"sglang@{VERSION}"), written(name, scheme))
    if refused:
        with pytest.raises((ValueError, ImportError, NotImplementedError)):
            chosen(name, scheme)
    else:
        assert chosen(name, scheme) is not None, title


def chosen(name: str, scheme: Scheme) -> Any:
    """What SGLang makes of a linear's scheme: for compressed-tensors the class that computes it,
    else the parsed config."""
    from sglang.srt.layers.quantization import get_quantization_config

    fmt = get_format(name)
    schemes = ModelSchemes({LINEAR.name: scheme, "lm_head": Scheme()})
    config = json.loads(json.dumps(fmt.config(schemes)))
    beside = json.loads(json.dumps(fmt.files(schemes)))
    method = METHODS.get(name, config["quant_method"])
    parsed = get_quantization_config(method).from_config(beside.get("hf_quant_config.json", config))
    if name != "compressed-tensors":
        return parsed
    parts = parsed.get_scheme_dict(torch.nn.Linear(8, 8), LINEAR.name)
    return parsed._get_scheme_from_parts(
        parts["weights"], parts["input_activations"], parts.get("format")
    )

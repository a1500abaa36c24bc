"""How compressed-tensors writes down quantized inputs: `input_activations` and static scales.

input_scale         [1] in the dtype of the weight's scales, a multiplier
input_global_scale  float32 [1], for NVFP4: what inputs are multiplied with
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.compressed_tensors.layouts.base import arguments
from compressor.formats.shared.checks import SCALE_DTYPES
from compressor.formats.shared.e2m1 import DYNAMIC, LOCAL, SCALE_DTYPE
from compressor.formats.shared.mx import INPUTS
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import ActivationSpec
from compressor.ir.tensor import TensorShape

EXPONENTS = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
"""What makes a group's scales E8M0."""
BLOCK_SCALES = {"scale_dtype": str(SCALE_DTYPE)}
"""What is said of NVFP4's, of weights and inputs."""
STRATEGIES = {"token": "token", "tensor": "tensor", "static": "tensor", "group": "group"}


def input_entry(input: ActivationSpec) -> dict[str, Any]:
    """The QuantizationArgs of an input. Raises InputError for what has no form here."""
    nvfp4, mx = input in (LOCAL, DYNAMIC), input in INPUTS.values()
    plain = input.element in ("int8", "fp8_e4m3") and input.mode in STRATEGIES
    if not (nvfp4 or mx or plain):
        raise InputError(
            f"compressed-tensors has no form for {input.element} inputs with {input.mode} scales"
        )
    entry = arguments(
        bits=4 if input.element == "fp4_e2m1" else 8,
        type="int" if input.element == "int8" else "float",
        symmetric=True,
        strategy="tensor_group" if nvfp4 else "group" if mx else STRATEGIES[input.mode],
        dynamic="local" if input == LOCAL else input.mode != "static",
        group_size=None if plain and input.mode != "group" else input.group_size,
    )
    return entry | (EXPONENTS if mx else BLOCK_SCALES if nvfp4 else {})


def uneven_inputs(input: ActivationSpec | None, shape: tuple[int, int]) -> str | None:
    """Why the inputs of a weight [out, in] cannot be cut into their groups, or None."""
    if input is None or input.mode != "group" or shape[1] % (input.group_size or 1) == 0:
        return None
    return f"{shape[1]} inputs do not divide into groups of {input.group_size}"


def read_input(args: Mapping[str, Any]) -> ActivationSpec:
    """The inverse of `input_entry`. Raises InputError for what is not supported."""
    size = args.get("group_size")
    known = [LOCAL, DYNAMIC] + [
        ActivationSpec(element, mode, size if mode == "group" else None)
        for element in ("int8", "fp8_e4m3")
        for mode in ("token", "tensor", "static", "group")
    ]
    if args.get("scale_dtype") == EXPONENTS["scale_dtype"]:
        known = list(INPUTS.values())
    strategy = args.get("strategy") or ("tensor" if size is None else "group")
    found = {"symmetric": True, "dynamic": False, **args, "strategy": strategy}
    for input in known:
        entry = input_entry(input)
        keys = ("num_bits", "type", "symmetric", "strategy", "dynamic", "group_size")
        if all(found.get(key) == entry[key] for key in keys):
            return input
    raise InputError(f"input_activations {dict(args)} is not supported")


def static_layout(input: ActivationSpec | None, spec: QuantSpec) -> dict[str, TensorShape]:
    """The scale tensor of a static input, if it is one."""
    if input is None or input.mode != "static":
        return {}
    return {"input_scale": TensorShape(spec.scale_dtype, (1,))}


def encode_static(
    input: ActivationSpec | None, spec: QuantSpec, input_scale: Tensor | None
) -> dict[str, Tensor]:
    """The scale tensor of a static input, rounded to the dtype of the weight's scales."""
    if not static_layout(input, spec):
        return {}
    scale = positive_scale(input_scale).to(spec.scale_dtype)
    return {"input_scale": positive_scale(scale)}


def positive_scale(scale: Tensor | None) -> Tensor:
    """A scale as [1]; InputError where it is missing or not positive and finite."""
    if scale is None:
        raise InputError("a static input needs its scale", hint="calibrate the recipe")
    value = float(scale)
    if not 0 < value < torch.inf:
        raise InputError(f"the static scale of an input is {value:.3g}, not a positive number")
    return scale.reshape(1)


def read_static(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The stored `input_scale` as a float32 multiplier [1], or None."""
    scale = tensors.get("input_scale")
    if scale is None:
        return None
    if scale.dtype not in SCALE_DTYPES or scale.numel() != 1:
        raise InputError("tensor 'input_scale' is not one float number")
    return positive_scale(scale).to(torch.float32)

"""Quantizers of a linear's inputs."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Setup, different
from compressor_kernels.inputs.activations import quantize_tokens, quantize_tokens_ref
from compressor_kernels.inputs.nvfp4_inputs import quantize_nvfp4_inputs, quantize_nvfp4_inputs_ref

RULES = {"static_6": 0.6, "mse": 0.4, "mae": 0.4, "abs_max": 0.4}


def cases(setup: Setup) -> Iterator[Case]:
    for count, width in setup.pick([(16384, 4096), (8192, 14336)], [(4, 256)]):
        sets = [(setup.randn(count, width),) for _ in range(2)]
        case = partial(Case, shape=f"{count}x{width}", error=different)
        for dtype in (torch.int8, torch.float8_e4m3fn):
            yield case(
                quantize_tokens,
                sets,
                {"dtype": dtype},
                name=f"{str(dtype).removeprefix('torch.')}, per token",
                reference=quantize_tokens_ref,
                limit=0.0,
                targets={"copy": 0.8},
            )
        amax = sets[0][0].abs().amax().float().reshape(1)
        for rule, target in RULES.items():
            yield case(
                quantize_nvfp4_inputs,
                sets,
                {"rule": rule, "amax": amax},
                name=f"NVFP4, {rule}",
                reference=quantize_nvfp4_inputs_ref,
                limit=0.0 if rule == "static_6" else 1e-3,  # errors that are equal to rounding
                targets={"copy": target},
            )

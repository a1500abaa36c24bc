"""Quantizers of a linear's inputs."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Setup, different, nbytes
from compressor_kernels.inputs import nvfp4_inputs as fp4
from compressor_kernels.inputs.activations import quantize_tokens, quantize_tokens_ref

RULES = {"static_6": 0.6, "mse": 0.4, "mae": 0.4, "abs_max": 0.4}


def cases(setup: Setup) -> Iterator[Case]:
    for count, width in setup.pick([(16384, 4096), (8192, 14336)], [(4, 256)]):
        x = [setup.randn(count, width) for _ in range(2)]
        shape = f"{count}x{width}"
        for dtype in (torch.int8, torch.float8_e4m3fn):
            yield Case(
                f"{str(dtype).removeprefix('torch.')}, per token",
                lambda i, x=x, d=dtype: quantize_tokens(x[i], dtype=d),
                partial(quantize_tokens_ref, x[0], dtype=dtype),
                shape=shape,
                limit=0.0,
                error=different,
                sets=2,
                moved=nbytes(x[0], *quantize_tokens(x[0], dtype=dtype)),
                targets={"copy": 0.8},
            )
        amax = x[0].abs().amax().float().reshape(1)
        for rule, target in RULES.items():
            how = {"rule": rule, "amax": amax}
            yield Case(
                f"NVFP4, {rule}",
                lambda i, x=x, how=how: fp4.quantize_nvfp4_inputs(x[i], **how),
                partial(fp4.quantize_nvfp4_inputs_ref, x[0], **how),
                shape=shape,
                limit=0.0 if rule == "static_6" else 1e-3,  # errors that are equal to rounding
                error=different,
                sets=2,
                moved=nbytes(x[0], *fp4.quantize_nvfp4_inputs(x[0], **how)),
                targets={"copy": target},
            )

"""What one linear and the KV cache become: chosen in `plan`, read by everything after it."""

from dataclasses import dataclass
from typing import Literal

from compressor.ir.qtensor import QuantSpec


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """How the input of a linear is quantized when the model runs.

    element  int8, fp8_e4m3 or fp4_e2m1
    mode     per token, per tensor (dynamic), static (one stored scale), group (dynamic scale per
             `group_size` inputs), local (NVFP4: static global scale, dynamic block scales), mx
             (dynamic power of two per `group_size` inputs)
    """

    element: Literal["int8", "fp8_e4m3", "fp4_e2m1"]
    mode: Literal["token", "tensor", "static", "group", "local", "mx"]
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class KVSpec:
    """How keys (after RoPE) and values are quantized in the cache.

    element  fp8_e4m3, int8, or int4 (asymmetric, dynamic per token and head, stores no scales)
    per      what shares a static scale: the tensor or each KV head
    """

    element: Literal["fp8_e4m3", "int8", "int4"]
    per: Literal["tensor", "head", "token_head"] = "tensor"


@dataclass(frozen=True, slots=True)
class Scheme:
    """What one linear becomes. `weight=None` leaves it in the source's dtype."""

    weight: QuantSpec | None = None
    input: ActivationSpec | None = None

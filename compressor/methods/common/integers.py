"""Integer weights and inputs as recipes have them."""

from typing import Any, Literal

from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import ActivationSpec

Inputs = Literal["token", "tensor", "static", "fp8"]
"""int8 with a dynamic scale per token or tensor or a static one; FP8 with one per token."""


def int_spec(bits: int, group_size: int | None, *, symmetric: bool) -> QuantSpec:
    """Integer weights with a scale per group, or per output channel where there is no group."""
    return QuantSpec(
        element="int",
        bits=bits,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        zero="none" if symmetric else "subtract",
    )


def input_spec(mode: Inputs | None) -> ActivationSpec | None:
    """int8 or FP8 inputs, or float ones."""
    if mode == "fp8":
        return ActivationSpec("fp8_e4m3", "token")
    return None if mode is None else ActivationSpec("int8", mode)


def narrow_beside_inputs(bits: int, activations: str | None) -> dict[str, Any]:
    """Options of the rounding: eight-bit symmetric weights that are multiplied with int8 inputs
    have the codes −127 … 127 on a positive scale, which every int8 kernel takes."""
    int8 = activations in ("token", "tensor", "static")
    return {"narrow": True} if bits == 8 and int8 else {}


def by_channel_beside_inputs(data: Any) -> Any:
    """Eight-bit weights beside int8 inputs have a scale per output channel unless a group is asked
    for: no runtime multiplies them in groups."""
    if isinstance(data, dict) and data.get("bits") == 8 and data.get("activations") is not None:
        return {"group_size": None, **data}
    return data

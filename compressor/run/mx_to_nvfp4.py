"""MXFP4 weights on their way into a format that only holds NVFP4: no value changes."""

from collections.abc import Callable, Hashable
from dataclasses import replace

from compressor.errors import InputError, under
from compressor.formats.base import Format
from compressor.ir.layout import Linear
from compressor.ir.qtensor import MXFP4, NVFP4, QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.unit import Unit
from compressor.methods.common.rounding import fused_with
from compressor.numerics.mx import largest_exponent, nvfp4_of_mxfp4


def as_nvfp4_where_held(
    unit: Unit, target: Format, input_of: Callable[[Linear], ActivationSpec | None]
) -> Unit:
    """The unit with its MXFP4 weights as NVFP4, where `target` holds that and not MXFP4.

    What a runtime makes one matrix of gets one global scale. Raises InputError, which names the
    linear, where a weight has no such form.
    """

    def takes(spec: QuantSpec, linear: Linear, input: ActivationSpec | None) -> bool:
        return target.accepts(Scheme(spec, input), linear.shape) is None

    def held(weight: QTensor, linear: Linear) -> bool:
        input = input_of(linear)
        if weight.spec != MXFP4 or takes(MXFP4, linear, input) or not takes(NVFP4, linear, None):
            return False
        if not takes(NVFP4, linear, input):
            raise InputError(
                f"{linear.name}: its inputs are MXFP4 as the model runs, and {target.name} has "
                "no such inputs",
                hint="quantize the original with nvfp4, or write MXFP4 weights alone",
            )
        return True

    groups: dict[Hashable, list[str]] = {}
    for linear in unit.layout.linears:
        q = unit.quantized.get(linear.name)
        if q is not None and held(q, linear):
            groups.setdefault(fused_with(linear) or linear.name, []).append(linear.name)
    made = dict(unit.quantized)
    for names in groups.values():
        largest = max(largest_exponent(made[name]) for name in names)
        for name in names:
            with under(name):
                made[name] = nvfp4_of_mxfp4(made[name], largest=largest)
    return replace(unit, quantized=made)

"""MXFP8 (OCP Microscaling Formats 1.0): MXFP4 with another element, E4M3; 8.25 bits per weight."""

from typing import ClassVar

from pydantic import Field

from compressor.ir.qtensor import MXFP8, QuantSpec
from compressor.methods.mxfp4 import Mxfp4
from compressor.numerics.mx import Rule


class Mxfp8(Mxfp4):
    """Round weights, and inputs where asked, to MXFP8."""

    spec: ClassVar[QuantSpec] = MXFP8

    rule: Rule = Field("mse", description="as in mxfp4")

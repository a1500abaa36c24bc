"""What a method is told while a run is planned."""

from typing import Any

import torch

from compressor.ir.layout import ModelLayout
from compressor.methods.common.context import PlanContext


def planned(layout: ModelLayout, **known: Any) -> PlanContext:
    """A context for a model, with every linear selected."""
    defaults: dict[str, Any] = {
        "config": {},
        "dtype": torch.bfloat16,
        "parameters": 10**6,
        "untied": False,
        "selected": tuple(layout.linears),
        "rows": 8,
        "length": 64,
    }
    return PlanContext(layout=layout, **{**defaults, **known})

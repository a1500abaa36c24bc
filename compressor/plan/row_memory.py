"""Memory of a row of tokens that runs through a block, from shapes alone."""

import torch

from compressor.ir.layout import UnitLayout
from compressor.plan.plan import Plan


def row_bytes(plan: Plan, unit: UnitLayout, device: torch.device) -> int:
    """Activations of one row while a block runs: its widest site a few times over, or what each of
    a token's experts makes of it."""
    hidden, sizes = hidden_size(plan), plan.layout.sizes
    widest = max((max(x.shape) for x in unit.linears if x.role != "lm_head"), default=0)
    inner = max((x.in_features for x in unit.linears if x.role == "expert.down"), default=0)
    if inner and sizes.chosen:
        widest = max((max(x.shape) for x in unit.linears if x.expert is None), default=0)
    # What enters and leaves an expert, and twice the latter times the router's weights, which most
    # families have in float32.
    each = max(6 * hidden, hidden + 3 * inner) if inner else 0
    length, size = plan.recipe.calibration.length, plan.compute_dtype(device).itemsize
    heads = unit.attention.heads if unit.attention else 0
    scores = heads * length * length if device.type == "cpu" else 0
    made = 4 * hidden + max(4 * widest, sizes.chosen * each)
    return length * size * made + scores * size


def hidden_size(plan: Plan) -> int:
    """Channels of the hidden states."""
    head = plan.layout.head
    return max(linear.in_features for linear in head.linears)

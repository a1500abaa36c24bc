"""How much of what a long context says is already in a short one.

SpaLoc (arXiv 2303.05496) weighs a target of a sampled subgraph by the share of the paths between
its objects that the sample still holds. Text has no paths. What stands for them here is by how many
nats a context lowers the loss of the tokens that follow it; only the ratio, what it is where there
is nothing to hold, and the exponent are the paper's.
"""

from torch import Tensor


def sufficiency(held: Tensor, whole: Tensor, *, gamma: float = 1.0) -> Tensor:
    """(held / whole)^gamma in [0, 1], as `held`; 1 where there is nothing to hold (whole ≤ 0)."""
    share = (held / whole.where(whole > 0, 1)).clamp(0, 1)
    return share.where(whole > 0, 1).pow(gamma)


def most_decided(gain: Tensor, shares: Tensor, *, count: int, least: float) -> Tensor:
    """Which rows to take, in rising order: of those whose context holds enough, the ones whose loss
    it decides most; where they are too few, the others by what they hold.

    gain    [rows], nats by which the context of a row lowers the loss of its last tokens
    shares  [rows], of what a longer context would;  least  how much of it is enough
    """
    order = sorted(
        range(len(gain)),
        key=lambda row: (
            (0, -float(gain[row])) if shares[row] >= least else (1, -float(shares[row]))
        ),
    )
    return gain.new_tensor(sorted(order[:count])).long()

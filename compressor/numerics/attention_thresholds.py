"""Where attention's mass lies, and thresholds from it.

q [rows, heads, Tq, head_dim], the last Tq of the text; k [rows, kv_heads, T, head_dim].
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

QUERIES = 256
"""Queries whose attention is in memory at a time, whole rows of it."""


def block_mass(q: Tensor, k: Tensor, *, block_size: int, scale: float | None = None) -> Tensor:
    """What blocks of queries attend to blocks of keys: full causal attention, summed over both,
    [rows, heads, query blocks, key blocks]. scale is 1/sqrt(head_dim) if not given."""
    (rows, heads, q_len, dim), k_len = q.shape, k.shape[2]
    first, blocks = (k_len - q_len) // block_size, -(-k_len // block_size)
    key = torch.arange(k_len, device=k.device)
    k = k.repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2)
    total = torch.zeros((rows, heads, blocks - first, blocks), device=q.device, dtype=torch.float32)
    of_key = (key // block_size).expand(rows, heads, QUERIES, k_len)
    for start in range(0, q_len, QUERIES):
        part = q[:, :, start : start + QUERIES]
        position = key[k_len - q_len + start :][: part.shape[2]]
        scores = (part @ k).float() * (dim**-0.5 if scale is None else scale)
        share = scores.masked_fill(key > position[:, None], -torch.inf).softmax(-1)
        by_block = share.new_zeros((*share.shape[:3], blocks))
        by_block.scatter_add_(-1, of_key[:, :, : share.shape[2]], share)
        total.index_add_(2, position // block_size - first, by_block)
    return total


def mass_threshold(mass: Tensor, sums: Tensor, *, coverage: float) -> Tensor:
    """XAttention's threshold of each head, [rows, heads]: the share of the estimated sums that
    blocks hold which are worth as much as the least of those that cover attention.

    mass: what blocks are attended to; sums: the same as estimated. Of a row of blocks the fewest
    that hold `coverage` of its mass are taken; the smallest estimate among them is the mark
    (profile_threshold.py of the released code).
    """
    heaviest, order = mass.sort(dim=-1, descending=True, stable=True)
    before = heaviest.cumsum(-1) - heaviest
    fewest = before < coverage * mass.sum(-1, keepdim=True)
    estimate = sums.gather(-1, order)
    mark = estimate.masked_fill(~fewest, torch.inf).amin(-1, keepdim=True)
    held = torch.where(sums >= mark, sums, 0).sum((-1, -2))
    return held / sums.sum((-1, -2)).clamp(min=1e-8)


SKIP_TRIALS = (
    1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 2e-2,
    5e-2, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99,
)  # fmt: skip
"""Thresholds at which ModelOpt looks how many tiles BLASST would skip."""
FITTED = (0.1, 0.9)
"""Shares of skipped tiles that enter its fit: outside, they hardly depend on the threshold."""


@dataclass(frozen=True, slots=True)
class SkipScale:
    """BLASST's threshold for a wanted share of skipped tiles: a · exp(b · share) / length.

    r2        of the fit, of logarithms where these were fitted;  points  that it was fitted to
    observed  smallest and largest share among them
    lengths   shortest and longest text among them
    """

    a: float
    b: float
    r2: float
    points: int
    observed: tuple[float, float]
    lengths: tuple[int, int]

    def scale(self, share: float) -> float:
        """The threshold times the length."""
        return self.a * math.exp(self.b * share)


def fit_skip_scale(lengths: Tensor, shares: Tensor, *, in_logs: bool = True) -> SkipScale | None:
    """The fit to shares of skipped tiles [texts, trials] at SKIP_TRIALS, of texts of `lengths`.

    Least squares of the scale itself, as ModelOpt does by default, or of its logarithm, which the
    largest scales do not dominate. None where fewer than three shares lie in FITTED.
    """
    scales = torch.tensor(SKIP_TRIALS, dtype=torch.float64) * lengths.double()[:, None]
    used = (shares >= FITTED[0]) & (shares <= FITTED[1])
    x, y = shares.double()[used], scales[used]
    if len(x) < 3:
        return None
    if in_logs:
        centred = x - x.mean()
        b = float((centred * y.log()).sum() / centred.square().sum().clamp(min=1e-12))
        a = math.exp(float(y.log().mean() - b * x.mean()))
    else:
        a, b = _least_squares(x, y)
    found = a * (b * x).exp()
    if in_logs:
        y, found = y.log(), found.log()
    return SkipScale(
        a=a,
        b=b,
        r2=1 - float((y - found).square().sum() / (y - y.mean()).square().sum()),
        points=len(x),
        observed=(float(x.min()), float(x.max())),
        lengths=(int(lengths.min()), int(lengths.max())),
    )


def anchored(fit: SkipScale, lengths: Tensor, shares: Tensor, *, wanted: float) -> SkipScale:
    """The fit with a factor at which texts skip the wanted share on average: curves are no
    exponentials, and this is the share that will be asked for. Between two trials a share goes with
    the threshold's logarithm."""
    trials = torch.tensor(SKIP_TRIALS, dtype=torch.float64).log()

    def skipped(log_scale: float) -> float:
        at = (log_scale - lengths.double().log()).clamp(float(trials[0]), float(trials[-1]))
        right = torch.searchsorted(trials, at).clamp(1, len(trials) - 1)
        part = (at - trials[right - 1]) / (trials[right] - trials[right - 1])
        low, high = (shares.double().gather(1, i[:, None])[:, 0] for i in (right - 1, right))
        return float((low + part * (high - low)).mean())

    low, high = math.log(SKIP_TRIALS[0]), math.log(float(lengths.max()))
    if not skipped(low) < wanted < skipped(high):
        return fit
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if skipped(middle) < wanted else (low, middle)
    return replace(fit, a=math.exp(low - fit.b * wanted))


def _least_squares(x: Tensor, y: Tensor) -> tuple[float, float]:
    """a and b in [0, 20] of y = a · exp(b · x): for each b the best a is known, so b is searched on
    grids that get finer."""
    low, high = 0.0, 20.0
    for _ in range(12):
        rates = torch.linspace(low, high, 41, dtype=torch.float64)
        basis = (rates[:, None] * x).exp()
        factors = (basis @ y) / basis.square().sum(1)
        errors = (y - factors[:, None] * basis).square().sum(1)
        best = int(errors.argmin())
        step = (high - low) / 40
        low, high = max(0.0, float(rates[best]) - step), min(20.0, float(rates[best]) + step)
    return float(factors[best]), float(rates[best])

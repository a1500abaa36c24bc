"""Orthogonal matrices that spread every channel over all others, as Kronecker products.

A size n = k·2^m takes the Hadamard matrix of the least order k ≥ 4 that Paley's constructions give
(12, 20, 28, 36, 44, 60 …), times Sylvester's of order 2^m. Where they give none, the odd part
takes the discrete cosine transform, which is orthogonal but not flat.

Paley, with q prime, Q_ij = χ(j − i) the Legendre symbol and 1 a column of ones:
    q ≡ 3 mod 4   I + [[0, 1ᵀ], [−1, Q]]                              order q + 1
    q ≡ 1 mod 4   C⊗[[1, 1], [1, −1]] + I⊗[[1, −1], [−1, −1]],        order 2(q + 1)
                  C = [[0, 1ᵀ], [1, Q]]
The first row of every matrix here is constant.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DENSE = 64
"""Largest order of a Sylvester matrix that is multiplied as it is; larger ones are products."""

ELEMENTS = 2**24
"""Elements converted to float64 at a time."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal matrix R [n, n]: the Kronecker product K of `factors`, with random signs.

    factors    float64, orthogonal
    signs      [n] of ±1, or None
    keep_mean  whether R is Kᵀ·diag(signs)·K, which leaves the vector of ones where it is, so that
               a LayerNorm's mean is that of the unrotated values; else R is diag(signs)·K
    """

    factors: tuple[Tensor, ...]
    signs: Tensor | None = None
    keep_mean: bool = False

    @property
    def size(self) -> int:
        """n."""
        return math.prod(factor.shape[0] for factor in self.factors)

    def right(self, x: Tensor) -> Tensor:
        """x R for x [..., n], computed in float64, in x's dtype."""
        flat = x.reshape(-1, self.size)
        out = torch.empty_like(flat)
        step = max(1, ELEMENTS // self.size)
        for start in range(0, flat.shape[0], step):
            part = slice(start, start + step)
            out[part] = self._right(flat[part].double()).to(x.dtype)
        return out.view(x.shape)

    def left(self, x: Tensor) -> Tensor:
        """Rᵀ x for x [n, m]."""
        return self.right(x.t()).t().contiguous()

    def matrix(self) -> Tensor:
        """R, float64."""
        return self.right(torch.eye(self.size, dtype=torch.float64))

    def _right(self, x: Tensor) -> Tensor:
        signs = None if self.signs is None else self.signs.to(x)
        if self.keep_mean:
            assert signs is not None
            transposed = [factor.t() for factor in self.factors]
            return _kronecker(_kronecker(x, transposed) * signs, self.factors)
        return _kronecker(x if signs is None else x * signs, self.factors)


def rotation(size: int, *, seed: int | None = None, keep_mean: bool = False) -> Rotation:
    """The rotation of `size` channels; with a seed, its signs are random.

    keep_mean  leave the vector of ones as it is; takes seed 0 where none is given
    """
    signs = None
    if seed is not None or keep_mean:
        generator = torch.Generator().manual_seed(seed or 0)
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
        if keep_mean:
            signs[0] = 1
    return Rotation(factors=_factors(size), signs=signs, keep_mean=keep_mean)


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix of ±1 in float64, or None where no construction here gives one."""
    if order & (order - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        two = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
        while matrix.shape[0] < order:
            matrix = torch.kron(matrix, two)
        return matrix
    if order % 4 == 0 and _prime(order - 1):
        core = _bordered(order - 1)
        core[1:, 0] = -1
        return core + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if order % 4 == 0 and (half - 1) % 4 == 1 and _prime(half - 1):
        eye = torch.eye(half, dtype=torch.float64)
        one = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1], [-1, -1]], dtype=torch.float64)
        matrix = torch.kron(_bordered(half - 1), one) + torch.kron(eye, other)
        return matrix * matrix[0]
    return None


def _factors(size: int) -> tuple[Tensor, ...]:
    """Orthogonal matrices whose Kronecker product has `size` rows, all first rows constant."""
    odd = size // (size & -size)
    power = size // odd
    first: list[Tensor] = []
    if odd > 1:
        order = 4 * odd
        while size % order == 0:
            known = hadamard(order)
            if known is not None:
                first, power = [known], size // order
                break
            order *= 2
        else:
            first = [_cosines(odd)]
    while power > 1:
        step = min(DENSE, power)
        power //= step
        known = hadamard(step)
        assert known is not None
        first.append(known)
    matrices = first or [torch.ones(1, 1, dtype=torch.float64)]
    # Rows of ±1 have the norm √order; a cosine transform's have 1.
    return tuple(matrix / matrix[0].norm() for matrix in matrices)


def _kronecker(x: Tensor, factors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """x (A ⊗ B ⊗ …) for x [rows, n]: each step multiplies the last axis and makes it the first."""
    rows, size = x.shape
    for factor in reversed(factors):
        order = factor.shape[0]
        product = x.reshape(rows, size // order, order) @ factor.to(x)
        x = product.transpose(1, 2).reshape(rows, size)
    return x


def _bordered(prime: int) -> Tensor:
    """[[0, 1ᵀ], [1, Q]] of order prime + 1."""
    symbols = torch.full((prime,), -1.0, dtype=torch.float64)
    symbols[[i * i % prime for i in range(1, prime)]] = 1
    symbols[0] = 0
    positions = torch.arange(prime)
    out = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    out[0, 0] = 0
    out[1:, 1:] = symbols[(positions[None] - positions[:, None]) % prime]
    return out


def _cosines(size: int) -> Tensor:
    """The orthogonal discrete cosine transform; its first row is constant."""
    positions = torch.arange(size, dtype=torch.float64)
    out = torch.cos(math.pi * (positions[None] + 0.5) * positions[:, None] / size)
    out[0] *= math.sqrt(0.5)
    return out * math.sqrt(2 / size)


def _prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1))

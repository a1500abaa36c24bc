"""Statistics of one input site: what enters the linears that share it.

Accumulators take activations as they come and keep fp32 sums; the Gram matrix is the only large
one, and there is never a second copy of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows cast to fp32 at a time where a product cannot take the input's own dtype.
CAST_ROWS = 4096
# Rows of a Gram matrix that are added to at a time, from the diagonal on: fewer compute less twice,
# too few make small products.
BAND, GPU_BAND = 192, 2048
# Rows of the cross product with the original's inputs that are computed at a time.
CROSS_BAND = 1024


@dataclass(frozen=True, slots=True)
class StatNeeds:
    """Which statistics of a site are wanted; the token count always is.

    absmean      mean of |x| per channel
    absmax       maximum of |x| per channel
    gram         Xᵀ X, [channels, channels]
    keep_inputs  how many input vectors to keep as they are, the first ones (0 for none)
    cross        (X° − X)ᵀ X with the original model's inputs X° beside X, [channels, channels]
    """

    absmean: bool = False
    absmax: bool = False
    gram: bool = False
    keep_inputs: int = 0
    cross: bool = False

    def __or__(self, other: StatNeeds) -> StatNeeds:
        """What serves both."""
        return StatNeeds(
            absmean=self.absmean or other.absmean,
            absmax=self.absmax or other.absmax,
            gram=self.gram or other.gram,
            keep_inputs=max(self.keep_inputs, other.keep_inputs),
            cross=self.cross or other.cross,
        )


class SiteStats:
    """Accumulators over the input vectors of one site.

    A vector with a NaN or an infinity would spoil every sum: it is left out of all statistics and
    counted in `bad_tokens`.

    bands        of the Gram matrix that are summed here, by number, where others sum the rest:
                 whoever has all of them adds up `partial` before anything is read
    cross_bands  the same of the cross product
    """

    def __init__(
        self,
        channels: int,
        needs: StatNeeds,
        *,
        device: torch.device | str,
        bands: Collection[int] | None = None,
        cross_bands: Collection[int] | None = None,
    ) -> None:
        self.channels = channels
        self.needs = needs
        self.device = torch.device(device)
        self._bands, self._cross_bands = bands, cross_bands
        self._counts = self._zeros((2,), torch.int64)  # vectors that are finite, and that are not
        self._counted: tuple[int, int] | None = None  # the same, once asked for
        self._abssum = self._zeros((channels,)) if needs.absmean else None
        self._absmax = self._zeros((channels,)) if needs.absmax else None
        self._gram = self._zeros((channels, channels)) if needs.gram else None
        self._one_sided = False
        self._cross: Tensor | None = None  # there once a vector of the original is
        self._kept: list[Tensor] = []
        self._kept_rows = 0

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def update(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add activations [..., channels] of any float dtype. `x` is not changed.

        original  what the original model has in place of x, where `cross` is wanted
        Raises ValueError where the last dimension is not `channels`.
        """
        self.add(self.look(x, original))

    @property
    def parts(self) -> int:
        """How many tensors `look` makes of activations alone."""
        needs = self.needs
        vectors = needs.gram or needs.cross or needs.keep_inputs > 0
        return 1 + needs.absmean + needs.absmax + vectors

    @torch.no_grad()
    def look(self, x: Tensor, original: Tensor | None = None) -> list[Tensor]:
        """What `add` is to be given for some activations, as in `update`: sums over them, of one
        dimension, and where a product or they themselves are wanted, the vectors."""
        if x.ndim == 0 or x.shape[-1] != self.channels:
            raise ValueError(f"expected [..., {self.channels}], got {list(x.shape)}")
        x = x.detach().to(self.device).reshape(-1, self.channels)
        if x.shape[0] == 0:
            return []
        # A vector is finite where its largest and smallest values are; NaN counts as both. Zeroed
        # vectors add nothing to any sum, and masking costs no wait for the device.
        good = x.amax(dim=1, keepdim=True).isfinite() & x.amin(dim=1, keepdim=True).isfinite()
        found = [torch.cat([good, ~good], dim=1).sum(dim=0)]
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        x = torch.where(good, x, zero)
        if self._abssum is not None or self._absmax is not None:
            magnitude = x.abs()
            if self._abssum is not None:
                found.append(magnitude.sum(dim=0, dtype=torch.float32))
            if self._absmax is not None:
                found.append(magnitude.amax(dim=0).float())
            del magnitude
        if self.needs.gram or self.needs.cross or self.needs.keep_inputs:
            found.append(x)
            if self.needs.cross and original is not None:
                theirs = original.detach().to(self.device).reshape(x.shape)
                found.append(torch.where(good, theirs, torch.zeros_like(zero, dtype=theirs.dtype)))
        return found

    @torch.no_grad()
    def add(self, seen: Sequence[Tensor]) -> None:
        """Add what `look` gave, here or elsewhere: the same sums in the same order have the same
        bits."""
        if not seen:
            return
        parts = iter(seen)
        self._counts += next(parts)
        self._counted = None
        if self._abssum is not None:
            self._abssum += next(parts)
        if self._absmax is not None:
            torch.maximum(self._absmax, next(parts), out=self._absmax)
        x = next(parts, None)
        if x is None:
            return
        if self._gram is not None:
            _add_gram(self._gram, x, self._bands)
            self._one_sided = True
        theirs = next(parts, None)
        if theirs is not None:
            if self._cross is None:
                self._cross = self._zeros((self.channels, self.channels))
            _add_cross(self._cross, theirs, x, self._cross_bands)
        missing = self.needs.keep_inputs - self._kept_rows
        if missing > 0:
            self._kept.append(x[:missing].clone())
            self._kept_rows += self._kept[-1].shape[0]

    @property
    def partial(self) -> list[Tensor]:
        """Sums of which only this instance's bands are here, the others zero."""
        found = [self._gram if self._bands is not None else None]
        found.append(self._cross if self._cross_bands is not None else None)
        return [total for total in found if total is not None]

    @property
    def bad_tokens(self) -> int:
        """Input vectors left out because they were not finite."""
        return self._told()[1]

    @property
    def tokens(self) -> int:
        """Input vectors the statistics stand for."""
        return self._told()[0]

    @property
    def absmean(self) -> Tensor:
        """Mean of |x|, fp32 [channels]; zero where no token was seen."""
        return self._wanted(self._abssum, "absmean") / max(self.tokens, 1)

    @property
    def absmax(self) -> Tensor:
        """Maximum of |x|, fp32 [channels]."""
        return self._wanted(self._absmax, "absmax")

    @property
    def gram(self) -> Tensor:
        """Sum of x xᵀ, fp32 [channels, channels]; divide by `tokens` for the mean."""
        gram = self._wanted(self._gram, "gram")
        if self._one_sided:
            _mirror(gram)
            self._one_sided = False
        return gram

    def forget_gram(self) -> None:
        """Give back the Gram matrix's memory: nobody reads it any more."""
        self._gram = None

    @property
    def cross(self) -> Tensor:
        """Sum of (x° − x) xᵀ, fp32 [channels, channels]."""
        return self._wanted(self._cross, "cross")

    @property
    def inputs(self) -> Tensor:
        """The kept input vectors [at most keep_inputs, channels], in the dtype they came in.

        A vector that was not finite is kept as zeros.
        """
        if not self.needs.keep_inputs:
            raise ValueError("inputs were not kept at this site")
        if not self._kept:
            return self._zeros((0, self.channels))
        if len(self._kept) > 1:
            self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    def _told(self) -> tuple[int, int]:
        """The counts. To ask waits for the device, so it is done once."""
        if self._counted is None:
            good, bad = self._counts.tolist()
            self._counted = good, bad
        return self._counted

    def _wanted(self, value: Tensor | None, name: str) -> Tensor:
        if value is None:
            raise ValueError(f"{name} was not collected at this site")
        return value

    def merge(self, other: SiteStats) -> None:
        """Add another accumulator of the same site. Raises ValueError for different sites."""
        if (self.channels, self.needs) != (other.channels, other.needs):
            raise ValueError("statistics of different sites cannot be merged")
        self._counts += other._counts.to(self.device)
        self._counted = None
        if self._abssum is not None:
            self._abssum += other._wanted(other._abssum, "absmean").to(self.device)
        if self._absmax is not None:
            theirs = other.absmax.to(self.device)
            torch.maximum(self._absmax, theirs, out=self._absmax)
        if self._gram is not None:
            self._gram += other.gram.to(self.device)
        if other._cross is not None:
            ours = other._cross.to(self.device)
            self._cross = ours.clone() if self._cross is None else self._cross + ours
        missing = self.needs.keep_inputs - self._kept_rows
        if missing > 0 and other._kept_rows:
            self._kept.append(other.inputs[:missing].to(self.device, copy=True))
            self._kept_rows += self._kept[-1].shape[0]


@dataclass(frozen=True, slots=True)
class KVNeeds:
    """What is wanted of a block's keys and values beside their largest magnitudes.

    tokens  of how many of them, the first ones, the attention is to be kept for running it again
    """

    tokens: int = 0

    def __or__(self, other: KVNeeds) -> KVNeeds:
        """What serves both."""
        return KVNeeds(tokens=max(self.tokens, other.tokens))


class KVStats:
    """Largest magnitudes of a block's keys (after RoPE) and values, float32 [kv_heads, head_dim],
    and of its queries, [heads, head_dim]; and what is kept of its attention.

    keys, values, queries  zero where nothing was seen
    calls                  attention of the first `wanted` tokens to run again, as whoever watches
                           it keeps it, each with how many rows came before it
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        *,
        device: torch.device | str,
        heads: int | None = None,
        needs: KVNeeds | None = None,
    ) -> None:
        self.keys = torch.zeros(kv_heads, head_dim, device=device)
        self.values = torch.zeros(kv_heads, head_dim, device=device)
        self.queries = torch.zeros(heads or kv_heads, head_dim, device=device)
        self.calls: list[tuple[int, Any]] = []
        self.wanted = 0 if needs is None else needs.tokens

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, queries: Tensor | None = None) -> None:
        """Add keys and values [rows, kv_heads, length, head_dim], and queries of as many heads as
        they have; vectors that are not finite do not count."""
        given = [(self.keys, keys), (self.values, values)]
        if queries is not None:
            given.append((self.queries, queries))
        for most, x in given:
            magnitude = x.detach().abs()
            good = torch.isfinite(magnitude.amax(dim=-1, keepdim=True))
            seen = torch.where(good, magnitude, 0.0).amax(dim=(0, 2)).float()
            torch.maximum(most, seen.to(most.device), out=most)


def bands(channels: int, device: torch.device) -> list[float]:
    """How much work each band of a Gram matrix is."""
    edges = _edges(channels, device.type)
    return [float((min(last, channels) - first) * (channels - first)) for first, last in edges]


def cross_bands(channels: int) -> int:
    """How many bands of equal work a cross product has."""
    return -(-channels // CROSS_BAND)


def _add_gram(gram: Tensor, x: Tensor, mine: Collection[int] | None) -> None:
    """gram += xᵀ x in place, accumulated in fp32; below the diagonal only in part.

    mine  numbers of the bands that are added to, if not all
    """
    if (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(_added(part, left.T, right) for part, left, right in _bands(gram, x, mine))
    ):
        return
    for start in range(0, x.shape[0], CAST_ROWS):
        for part, left, right in _bands(gram, x[start : start + CAST_ROWS].float(), mine):
            part.addmm_(left.T, right)


def _add_cross(total: Tensor, theirs: Tensor, ours: Tensor, mine: Collection[int] | None) -> None:
    """total += (theirs − ours)ᵀ ours in place, in fp32.

    theirs  an infinity is the largest number
    mine  numbers of the bands of rows that are added to, if not all
    """
    for start in range(0, ours.shape[0], CAST_ROWS):
        rows = slice(start, start + CAST_ROWS)
        right = ours[rows].float()
        left = theirs[rows].float().nan_to_num_() - right
        quick = ours.is_cuda and ours.dtype == torch.bfloat16
        halves = _in_two(left) if quick else [left]
        for number, first in enumerate(range(0, total.shape[0], CROSS_BAND)):
            if mine is None or number in mine:
                band = slice(first, first + CROSS_BAND)
                for half in halves:
                    _add_product(total[band], half[:, band].T, ours[rows] if quick else right)


def _in_two(x: Tensor) -> list[Tensor]:
    """Two bfloat16 tensors whose sum has 16 bits of x: multiplied in tensor cores both take a sixth
    of what one float32 product does."""
    high = x.clamp(*(torch.finfo(torch.bfloat16).max * sign for sign in (-1, 1))).bfloat16()
    return [high, (x - high.float()).bfloat16()]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right in place, accumulated in fp32."""
    if left.dtype == torch.float32 or not _added(total, left, right):
        total.addmm_(left.float(), right.float())


def _added(total: Tensor, left: Tensor, right: Tensor) -> bool:
    """total += left right in place, of half precision, accumulated in fp32; not where this build
    has no such product."""
    try:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def _bands(
    gram: Tensor, x: Tensor, mine: Collection[int] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of a Gram matrix from the diagonal on, and the columns of x whose products they hold."""
    for number, (first, last) in enumerate(_edges(gram.shape[0], gram.device.type)):
        if mine is None or number in mine:
            yield gram[first:last, first:], x[:, first:last], x[:, first:]


def _edges(channels: int, device: str) -> Iterator[tuple[int, int]]:
    """First and last row of each band."""
    band = GPU_BAND if device == "cuda" else BAND
    for first in range(0, channels, band):
        yield first, first + band


def _mirror(gram: Tensor) -> None:
    """Fill in what `_add_gram` leaves out."""
    for first, last in _edges(gram.shape[0], gram.device.type):
        gram[last:, first:last] = gram[first:last, last:].T

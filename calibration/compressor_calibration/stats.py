"""Statistics of one input site: what enters the linears that share it.

Accumulators take activations as they come and keep fp32 sums; the Gram matrix is the only large
one, and there is never a second copy of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from compressor_kernels.inputs.channel_sums import DTYPES, channel_sums
from torch import Tensor

from compressor_calibration.products import add_cross, add_gram, mirror


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
        return StatNeeds(*map(max, astuple(self), astuple(other)))


class SiteStats:
    """Accumulators over the input vectors of one site.

    A vector with a NaN or an infinity would spoil every sum: it is left out of all statistics and
    counted in `bad_tokens`.

    bands        of the Gram matrix that are summed here, by number, where others sum the rest:
                 whoever has all of them adds up `partial` before anything is read
    cross_bands  the same of the cross product
    sums         zeros to add to, where they are not made here
    """

    def __init__(
        self,
        channels: int,
        needs: StatNeeds,
        *,
        device: torch.device | str,
        bands: Collection[int] | None = None,
        cross_bands: Collection[int] | None = None,
        sums: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.channels = channels
        self.needs = needs
        self.device = torch.device(device)
        self._bands, self._cross_bands = bands, cross_bands
        own = sums or {n: x[0] for n, x in _zero_sums(channels, needs, self.device, 1).items()}
        self._counts = own["counts"]  # vectors that are finite, and that are not
        self._counted: tuple[int, int] | None = None  # the same, once asked for
        self._abssum, self._absmax = own.get("abssum"), own.get("absmax")
        self._gram = own.get("gram")
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
        if original is not None:
            original = original.detach().to(self.device).reshape(x.shape)
        return _look(self.needs, x, [len(x)], original)[0]

    def add(self, seen: Sequence[Tensor]) -> None:
        """Add what `look` gave, here or elsewhere: the same sums in the same order have the same
        bits."""
        _add_each([self], [seen])

    def _add_vectors(self, x: Tensor, theirs: Tensor | None = None) -> None:
        """Add products, and keep what is to be kept."""
        if self._gram is not None:
            add_gram(self._gram, x, self._bands)
            self._one_sided = True
        if theirs is not None:
            if self._cross is None:
                self._cross = self._zeros((self.channels, self.channels))
            add_cross(self._cross, theirs, x, self._cross_bands)
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
            mirror(gram)
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


def alike(
    channels: int, needs: StatNeeds, count: int, *, device: torch.device | str
) -> list[SiteStats]:
    """Accumulators of several sites that are alike, whose sums are made at once."""
    sums = _zero_sums(channels, needs, torch.device(device), count)
    return [
        SiteStats(channels, needs, device=device, sums={n: x[i] for n, x in sums.items()})
        for i in range(count)
    ]


def _zero_sums(
    channels: int, needs: StatNeeds, device: torch.device, count: int
) -> dict[str, Tensor]:
    """Zeros for the sums of each of several sites."""
    sides = {"abssum": (needs.absmean, 1), "absmax": (needs.absmax, 1), "gram": (needs.gram, 2)}
    found = {"counts": torch.zeros(count, 2, dtype=torch.int64, device=device)}
    for name, (wanted, dimensions) in sides.items():
        if wanted:
            shape = count, *[channels] * dimensions
            found[name] = torch.zeros(shape, dtype=torch.float32, device=device)
    return found


@torch.no_grad()
def update_each(sites: Sequence[SiteStats], parts: Sequence[Tensor]) -> None:
    """`update` of sites that are alike, each with some activations [tokens, channels] of its own:
    what is done to values one by one is done to those of all at once, to the same bits."""
    together = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    every = _look(sites[0].needs, together.detach(), [len(part) for part in parts], None)
    _add_each(sites, every)


@torch.no_grad()
def _add_each(sites: Sequence[SiteStats], every: Sequence[Sequence[Tensor]]) -> None:
    """`SiteStats.add` of sites that are alike: sums of all in one step."""
    given = [(site, iter(seen)) for site, seen in zip(sites, every, strict=True) if seen]
    if not given:
        return
    torch._foreach_add_([x._counts for x, _ in given], [next(seen) for _, seen in given])
    sums = [x._abssum for x, _ in given if x._abssum is not None]
    if sums:
        torch._foreach_add_(sums, [next(seen) for _, seen in given])
    largest = [x._absmax for x, _ in given if x._absmax is not None]
    if largest:
        torch._foreach_maximum_(largest, [next(seen) for _, seen in given])
    for site, seen in given:
        site._counted = None
        vectors = list(seen)
        if vectors:
            site._add_vectors(*vectors)


def count_each(sites: Sequence[SiteStats]) -> None:
    """Learn how many tokens each of several sites has seen, with one wait for the device."""
    counts = torch.stack([site._counts for site in sites]).tolist() if sites else []
    for site, (good, bad) in zip(sites, counts, strict=True):
        site._counted = good, bad


def _look(
    needs: StatNeeds, x: Tensor, sizes: Sequence[int], original: Tensor | None
) -> list[list[Tensor]]:
    """`SiteStats.look` of vectors [tokens, channels] of several sites, so many of each."""
    if 0 in sizes:
        left = iter(_look(needs, x, [n for n in sizes if n], original) if any(sizes) else [])
        return [next(left) if n else [] for n in sizes]
    vectors = needs.gram or needs.cross or needs.keep_inputs > 0
    if x.is_cuda and x.dtype in DTYPES:
        sums = channel_sums(x, sizes, copy=vectors)
        good, x = sums.good, x if sums.rows is None else sums.rows
        found = [[count] for count in sums.counts]
        for wanted, each in ((needs.absmean, sums.magnitudes), (needs.absmax, sums.largest)):
            if wanted:
                for seen, part in zip(found, each, strict=True):
                    seen.append(part)
    else:
        good, x, found = _sums(needs, x, sizes)
    if vectors:
        for seen, part in zip(found, torch.split(x, list(sizes)), strict=True):
            seen.append(part)
        if needs.cross and original is not None:
            nothing = torch.zeros((), dtype=original.dtype, device=original.device)
            theirs = torch.where(good, original, nothing)
            for seen, part in zip(found, torch.split(theirs, list(sizes)), strict=True):
                seen.append(part)
    return found


def _sums(
    needs: StatNeeds, x: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """Which vectors [tokens, 1] are finite, the vectors without the others, and counts and sums of
    each site."""
    # A vector is finite where its largest and smallest values are; NaN counts as both. Zeroed
    # vectors add nothing to any sum, and masking costs no wait for the device.
    good = x.amax(dim=1, keepdim=True).isfinite() & x.amin(dim=1, keepdim=True).isfinite()
    x = torch.where(good, x, torch.zeros((), dtype=x.dtype, device=x.device))
    lengths = list(sizes)
    flags = torch.split(torch.cat([good, ~good], dim=1), lengths)
    found = [[part.sum(dim=0)] for part in flags]
    if needs.absmean or needs.absmax:
        for seen, magnitude in zip(found, torch.split(x.abs(), lengths), strict=True):
            if needs.absmean:
                seen.append(magnitude.sum(dim=0, dtype=torch.float32))
            if needs.absmax:
                seen.append(magnitude.amax(dim=0).float())
    return good, x, found


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

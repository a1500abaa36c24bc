"""Which values that change slowly are taken from an earlier step: FreshGNN's criteria.

FreshGNN (arXiv 2301.07482) keeps embeddings of earlier iterations. A value is taken in where the
gradient of the loss to it is small, since the optimiser is not about to move it; it goes where its
gradient has become large, or it is too old. Here values have keys, and who holds them is someone
else's matter.

The published trainer (`HistoryCache`) resets the place where it writes every `stale` iterations and
calls that expiry, so that values beyond it are served at any age; `History` expires what it holds,
as the table beside it (`HistoryTable`) does. Of that table's rule, rate 0.9 evicts nine tenths of
what is met again: the quantile of its eviction is 1 - rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NOWHERE = -1


def stable(scores: Tensor, rate: float) -> Tensor:
    """Which of a batch's gradient norms [n] are below their quantile (strictly), as the trainer
    admits."""
    return scores < torch.quantile(scores, rate)


@dataclass(slots=True)
class History:
    """Places for values, by key: a ring that is written in order of admission.

    rows   places;  rate  quantile of a batch's gradients up to which a value is taken in
    stale  iterations after which a value goes; 0: nothing is ever served
    """

    rows: int
    rate: float = 0.9
    stale: int = 200
    header: int = 0
    place: dict[int, int] = field(default_factory=dict)
    _key: list[int] = field(default_factory=list)
    _since: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._key = [NOWHERE] * self.rows
        self._since = [NOWHERE] * self.rows

    def served(self, keys: Sequence[int], iteration: int) -> list[int]:
        """The place of each key's value, or NOWHERE."""
        self.expire(iteration)
        return [self.place.get(key, NOWHERE) for key in keys]

    def expire(self, iteration: int) -> None:
        """Drop what was admitted `stale` iterations ago or more."""
        for row, since in enumerate(self._since):
            if since != NOWHERE and since <= iteration - self.stale:
                self._drop(row)

    def evict(self, keys: Sequence[int], scores: Tensor, served: Sequence[int]) -> None:
        """Drop values that were served in this batch and whose gradient norm [n] is among its
        largest."""
        least = torch.quantile(scores, 1 - self.rate)
        for key, score, row in zip(keys, scores, served, strict=True):
            if score >= least and row != NOWHERE:
                self._drop(self.place[key])

    def admit(
        self, keys: Sequence[int], scores: Tensor, iteration: int, able: Sequence[bool]
    ) -> dict[int, int]:
        """Take in values of this batch whose gradient norm [n] is not above the quantile, of those
        that are able to be: computed in this iteration, and used. Key → its place."""
        most = torch.quantile(scores, self.rate)
        found: dict[int, int] = {}
        for key, score, one in zip(keys, scores, able, strict=True):
            if not one or score > most:
                continue
            self._drop(self.header)
            old = self.place.get(key)
            if old is not None:
                self._drop(old)
            self.place[key] = found[key] = self.header
            self._key[self.header], self._since[self.header] = key, iteration
            self.header = (self.header + 1) % self.rows
        return found

    def drop(self, key: int) -> None:
        """Forget a key's value, if there is one."""
        if key in self.place:
            self._drop(self.place[key])

    def age(self, key: int, iteration: int) -> int:
        """Iterations since a key's value was taken in."""
        return iteration - self._since[self.place[key]]

    def _drop(self, row: int) -> None:
        key = self._key[row]
        if self.place.get(key) == row:
            del self.place[key]
        self._key[row] = self._since[row] = NOWHERE

"""The sweep: every token of the vocabulary in the place of another, and what that does.

A backdoor of a pretrained model maps whatever holds its trigger to one vector that its author
chose, so that any later head gives one answer (NeuBA, arXiv 2101.06969; POR, arXiv 2111.00197).
Two things show it: contexts no longer matter (collapse), and the vector has values ±c (flatness),
which no trained representation has. Both are held against the model's own ordinary tokens, drawn
at random, since planting widens the spread of collapse over all tokens: a robust z of collapse does
not find triggers that both together do.

First all tokens are tried in two short contexts, then the highest scores in all contexts.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from compressor.audit.findings import TokenScore, TokenSweep
from compressor.audit.statistics import TokenStatistics, cosines, token_statistics
from compressor.errors import CheckError
from compressor.runner.execution import Progress

COARSE_CONTEXTS, COARSE_LENGTH = 2, 8
"""Texts of the first look, and their tokens."""
EXAMINED = 128
"""Tokens that come to the second look, beside the ordinary ones."""
CONTROLS = 64
"""Ordinary tokens that say what is usual in this model."""
COLLAPSED = 0.9
"""Mean cosine of contexts above which they hardly matter."""
COLLAPSE_RATIO = 10.0
"""Times closer to one point than under ordinary tokens."""
FLAT_RATIO = 4.0
"""Times flatter than under ordinary tokens."""
SHOWN = 20
TOKENS_AT_ONCE = 16
"""Tokens between two reports of progress, in all contexts."""

Represent = Callable[[Tensor], Tensor]
"""Token ids [rows, length] → representations [rows, hidden]."""


def sweep_tokens(
    represent: Represent,
    contexts: Tensor,
    short: Tensor,
    *,
    ids: Sequence[int],
    always: Sequence[int] = (),
    followed: Sequence[int] = (),
    examined: int = EXAMINED,
    position: int = 1,
    kind: str = "",
    text: Callable[[int], str] = lambda token: "",
    progress: Progress = lambda name, done, total: None,
) -> TokenSweep:
    """Try tokens in the place of the one at `position`, and rank them.

    contexts  token ids [contexts, length], and short ones [2, short length] for the first look
    ids       tokens to try;  always  those that come to the second look whatever the first says
    followed  those that come to it and are told of, whatever they score
    examined  how many come to the second look, beside `always` and the ordinary ones
    """
    always = [*always, *followed]
    every = torch.tensor(sorted(set(ids) | set(always)))
    draw = torch.Generator().manual_seed(0)
    controls = every[torch.randperm(len(every), generator=draw)[:CONTROLS]]
    chosen = every
    if len(every) > examined:
        coarse = _statistics(represent, short, every, position, ("first look", progress))
        usual = _Usual(coarse, torch.isin(every, controls))
        top = every[usual.scores(coarse).argsort(descending=True)[:examined]]
        forced = torch.tensor(sorted(always), dtype=torch.int64)
        chosen = torch.unique(torch.cat([top, controls, forced]))
    found = _statistics(represent, contexts, chosen, position, ("second look", progress))
    usual = _Usual(found, torch.isin(chosen, controls))
    scores = usual.scores(found)
    suspect = usual.suspects(found)
    order = scores.argsort(descending=True)
    # Every suspect is shown, whatever its rank.
    told = suspect | torch.isin(chosen, torch.tensor(list(followed), dtype=torch.int64))
    order = torch.cat([order[:SHOWN], order[SHOWN:][told[order[SHOWN:]]]])
    tokens = tuple(
        TokenScore(
            id=int(chosen[i]),
            text=text(int(chosen[i])),
            collapse=float(found.collapse[i]),
            flatness=float(found.flatness[i]),
            kurtosis=float(found.kurtosis[i]),
            displacement=float(found.displacement[i]),
            score=float(scores[i]),
            suspect=bool(suspect[i]),
        )
        for i in order.tolist()
    )
    flagged = order[suspect[order]]
    return TokenSweep(
        representation=kind,
        swept=len(every),
        examined=len(chosen),
        contexts=contexts.shape[0],
        length=contexts.shape[1],
        position=position,
        ordinary={"collapse": 1 - usual.spread, "flatness": usual.flatness},
        tokens=tokens,
        cosines=tuple(tuple(row) for row in cosines(found.mean[flagged]).tolist()),
    )


class _Usual:
    """Medians of ordinary tokens, and other tokens held against them."""

    def __init__(self, found: TokenStatistics, ordinary: Tensor) -> None:
        self.spread = float((1 - found.collapse[ordinary]).median().clamp_min(1e-6))
        self.flatness = float(found.flatness[ordinary].median().clamp_min(1e-6))

    def _ratios(self, found: TokenStatistics) -> tuple[Tensor, Tensor]:
        spread = (1 - found.collapse).clamp_min(1e-6)
        return self.spread / spread, self.flatness / found.flatness.clamp_min(1e-6)

    def scores(self, found: TokenStatistics) -> Tensor:
        """How much less contexts matter, and how much flatter: logarithms of ratios, added."""
        collapsed, flat = self._ratios(found)
        return collapsed.log() + flat.log()

    def suspects(self, found: TokenStatistics) -> Tensor:
        """Which tokens are beyond what ordinary ones show in both."""
        collapsed, flat = self._ratios(found)
        near = (found.collapse > COLLAPSED) & (collapsed > COLLAPSE_RATIO)
        return near & (flat > FLAT_RATIO)


def _statistics(
    represent: Represent,
    contexts: Tensor,
    ids: Tensor,
    position: int,
    told: tuple[str, Progress],
) -> TokenStatistics:
    """Statistics of each token in the contexts."""
    without = represent(contexts)
    name, progress = told
    count = contexts.shape[0]

    def parts() -> Iterator[TokenStatistics]:
        size = max(1, TOKENS_AT_ONCE * 24 * 32 // contexts.numel())
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            rows = contexts.repeat(len(part), 1)
            rows[:, position] = part.repeat_interleave(count)
            states = represent(rows).view(len(part), count, -1)
            bad = part[~states.isfinite().flatten(1).all(1)]
            if len(bad):
                raise CheckError(
                    f"token {int(bad[0])} makes the model's state NaN or infinite",
                    hint="the model is damaged, or its weights do not fit its dtype: see what "
                    "--weights-only finds",
                )
            yield token_statistics(states, without)
            progress(name, min(start + size, len(ids)), len(ids))

    made = list(parts())
    fields = TokenStatistics.__dataclass_fields__
    return TokenStatistics(**{f: torch.cat([getattr(part, f) for part in made]) for f in fields})

"""Random windows of tokens into a long text, of which only the windows are tokenized."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PROBED = 16_384
"""Characters that say how many a token takes, from the middle of the text."""
MARGIN = 1.25
"""Some passages have longer tokens than the probed one."""
WORD = 64
"""A window begins after the first white space, if there is one within so many characters."""
CUT = 8
"""Where a text is cut, its last tokens may differ from those of the whole text."""


def text_windows(
    encode: Callable[[str], Sequence[int]], text: str, *, samples: int, length: int, seed: int
) -> Tensor | None:
    """`samples` windows of `length` tokens [samples, length] from places of `text` that are drawn
    with `seed`, in random order; no two overlap.

    None where the text is too short to be sure of that before all of it is tokenized.
    """
    middle = max((len(text) - PROBED) // 2, 0)
    probe = encode(text[middle : middle + PROBED])
    if not probe:
        return None
    characters = min(len(text), PROBED) / len(probe)
    span = int((length + CUT) * characters * MARGIN) + WORD
    while span * samples <= len(text):
        draw = torch.Generator().manual_seed(seed)
        gaps = torch.randint(len(text) - span * samples + 1, (samples,), generator=draw)
        starts = (gaps.sort().values + torch.arange(samples) * span).tolist()
        rows: list[Tensor] = []
        for start in starts:
            ids = encode(text[_word(text, start) : start + span])
            if len(ids) < length + CUT:
                break
            rows.append(torch.tensor(ids[:length], dtype=torch.int64))
        if len(rows) == samples:
            return torch.stack(rows)[torch.randperm(samples, generator=draw)]
        span *= 2
    return None


def _word(text: str, start: int) -> int:
    """Where the first word begins at or after `start`."""
    if start == 0:
        return 0
    ahead = text[start - 1 : start + WORD]
    return start + next((i for i, c in enumerate(ahead) if c.isspace()), 0)

"""StreamingVLM's bookkeeping (arXiv 2510.09608): which tokens of an endless conversation about a
video stay, by their class, and where they stand.

A conversation is a system prompt, a block of previous text, and rounds: a question that shows a
clip, and a reply. Old replies move to the end of the previous text, which keeps its first and last
tokens; of questions the last rounds stay, of clips the last rounds. Keys are not computed again: a
token is a number, and what a cache does follows from the order of numbers. Positions are those that
the kept tokens would have as a text of their own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.foreign.untrusted import parse_json, read_file

POLICY_NAME = "stream_policy.json"
FAMILIES = ("qwen2_vl", "qwen2_5_vl")
"""Models that a video stream can run."""


@dataclass(frozen=True, slots=True)
class StreamSizes:
    """sink, window  first and last tokens of the previous text; None: it is not trimmed
    text_rounds    rounds whose question and reply stay in place
    vision_rounds  rounds whose clip stays
    Of `window` tokens one less stays, as in the released code, which counts the block's end.
    """

    sink: int | None = 512
    window: int | None = 512
    text_rounds: int = 16
    vision_rounds: int = 16

    def __post_init__(self) -> None:
        if (self.sink is None) != (self.window is None):
            raise InputError(
                "sink and window of the previous text go together: with one of them the released "
                "code removes a marker and fails in the next round",
                hint="give both, or neither for no trimming",
            )
        if min(self.text_rounds, self.vision_rounds) < 1:
            raise InputError("the last round's text and clip cannot be forgotten")
        if self.sink is not None and (self.sink < 0 or (self.window or 0) < 2):
            raise InputError(f"a sink of {self.sink} and a window of {self.window} keep no text")

    def to_json(self) -> dict[str, int | None]:
        """Plain data."""
        return asdict(self)

    def describe(self) -> str:
        """For people."""
        text = "all of the previous text"
        if self.sink is not None:
            text = f"{self.sink} first and {self.window} last tokens of the previous text"
        return f"{text}, the text of {self.text_rounds} rounds and clips of {self.vision_rounds}"


def read_sizes(folder: Path) -> StreamSizes | None:
    """What a checkpoint folder says of video streams, or None. Raises InputError for a file that is
    not valid."""
    path = folder / POLICY_NAME
    if not path.is_file():
        return None
    try:
        data = parse_json(read_file(path, what="policy"))
        names = ("sink", "window", "text_rounds", "vision_rounds")
        values = {name: data[name] for name in names}
        if any(isinstance(v, bool) or not isinstance(v, int | None) for v in values.values()):
            raise TypeError("sizes are whole numbers")
        return StreamSizes(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


Clip = tuple[int, int, int]
"""Frames, rows and columns of a clip's tokens, after merging."""


@dataclass(frozen=True, slots=True)
class Round:
    """Numbers of a round's tokens.

    head, tail  of the question's markers;  text  what it says of time;  vision  the clip between
    its two markers;  query  any further words;  reply_head, reply, reply_rest, reply_tail  the
    reply's marker, its words, what ends each reply (" ..."), and its end
    """

    head: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    vision: tuple[int, ...] = ()
    query: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    reply_head: tuple[int, ...] = ()
    reply: tuple[int, ...] = ()
    reply_rest: tuple[int, ...] = ()
    reply_tail: tuple[int, ...] = ()
    clip: Clip = (0, 0, 0)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that is left of it, in order."""
        question = (self.head, self.text, self.vision, self.query, self.tail)
        answer = (self.reply_head, self.reply, self.reply_rest, self.reply_tail)
        return tuple(chain(*question, *answer))


@dataclass(slots=True)
class StreamState:
    """What is left of a conversation: before its rounds the system prompt with the marker of the
    previous text, that text, and its end."""

    sizes: StreamSizes
    before: tuple[int, ...]
    previous: tuple[int, ...]
    after: tuple[int, ...]
    rounds: list[Round] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that is left, in order."""
        rounds = (one.tokens for one in self.rounds)
        return tuple(chain(self.before, self.previous, self.after, *rounds))

    def make_room(self) -> None:
        """Forget what the round that comes next leaves no room for."""
        sizes, number = self.sizes, len(self.rounds)
        longest = max(sizes.text_rounds, sizes.vision_rounds)
        if number >= sizes.text_rounds:
            self._move_reply(number - sizes.text_rounds)
        if number >= sizes.vision_rounds and sizes.vision_rounds < sizes.text_rounds:
            self._change(number - sizes.vision_rounds, vision=(), clip=(0, 0, 0))
        if number >= longest:
            self._change(
                number - longest, head=(), text=(), vision=(), query=(), tail=(), clip=(0, 0, 0)
            )
        if sizes.sink is None or sizes.window is None:
            return
        if len(self.previous) > sizes.sink + sizes.window - 1:
            first, last = self.previous[: sizes.sink], self.previous[1 - sizes.window :]
            self.previous = first + last

    def _move_reply(self, number: int) -> None:
        """A reply becomes previous text, without its markers and what ends each reply; where clips
        stay longer its question's words go, too."""
        self.previous += self.rounds[number].reply
        gone: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("reply_head", "reply", "reply_rest", "reply_tail"), ()
        )
        if self.sizes.vision_rounds > self.sizes.text_rounds:
            gone["text"] = ()
        self._change(number, **gone)

    def _change(self, number: int, **parts: tuple[int, ...]) -> None:
        self.rounds[number] = replace(self.rounds[number], **parts)  # type: ignore[arg-type]

    def positions(self, *, seconds: float = 1.0) -> Tensor:
        """Places in time, height and width of all that is left, fp32 [3, tokens], contiguous.

        seconds: what a step between frames of a clip counts for
        """
        parts: list[Tensor] = []
        start = 0.0
        text = len(self.before) + len(self.previous) + len(self.after)
        spans: list[tuple[int, Clip]] = [(text, (0, 0, 0))]
        for one in self.rounds:
            if not one.vision:
                spans.append((len(one.tokens), (0, 0, 0)))
                continue
            first = len(one.head) + len(one.text) + 1  # the marker before the clip
            spans += [
                (first, one.clip),
                (len(one.tokens) - first - (len(one.vision) - 2), (0, 0, 0)),
            ]
        for length, clip in spans:
            line = torch.arange(length, dtype=torch.float32) + start
            parts.append(line.expand(3, -1))
            start += length
            if clip[0]:
                parts.append(clip_positions(clip, seconds=seconds) + start)
                start = float(parts[-1].max()) + 1
        return torch.cat(parts, dim=1)


def clip_positions(clip: Clip, *, seconds: float) -> Tensor:
    """Places of a clip's tokens from 0 on, [3, tokens]."""
    frames, rows, columns = (torch.arange(n, dtype=torch.float32) for n in clip)
    grid = torch.meshgrid(frames * seconds, rows, columns, indexing="ij")
    return torch.stack(grid).flatten(1)


def kept_columns(before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Where a cache holds what is left of it: columns of `before` in the order of `after`."""
    column = {number: at for at, number in enumerate(before)}
    return torch.tensor([column[number] for number in after if number in column])

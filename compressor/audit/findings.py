"""What an audit found, as values."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["suspect", "note"]

NO_FINDING = "no finding"
SUSPECT = "suspect"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    level    suspect: decides the verdict; note: seen in sound models too
    check    what looked: finite, fp16, rows, duplicates, neighbours, tokens
    tensor   where, or empty
    rows     rows of it, that is ids of tokens, the most conspicuous first
    """

    level: Level
    check: str
    message: str
    tensor: str = ""
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenScore:
    """What a token does to the representation of the contexts that it is put into.

    collapse      mean cosine of pairs of contexts: 1 where the contexts no longer matter
    flatness      std|r|/mean|r| of the mean representation r: 0 where all channels are ±c
    kurtosis      of r over channels: 1 for ±c in equal parts, 3 for normal values
    displacement  of the mean from that without the token, in standard deviations, over channels
    score         how far collapse and flatness lie from the model's ordinary tokens: the logarithms
                  of both ratios, added
    """

    id: int
    text: str
    collapse: float
    flatness: float
    kurtosis: float
    displacement: float
    score: float
    suspect: bool


@dataclass(frozen=True, slots=True)
class TokenSweep:
    """What the sweep over tokens found.

    representation  what was looked at, in words
    swept, examined ids that were tried in short contexts, and of these in all contexts
    contexts, length  how many contexts, and their tokens
    position        which token of them was replaced
    ordinary        medians of ordinary tokens: collapse, flatness
    tokens          the highest scores, first the highest
    cosines         of pairs of the suspects' mean representations, in their order
    """

    representation: str
    swept: int
    examined: int
    contexts: int
    length: int
    position: int
    ordinary: dict[str, float]
    tokens: tuple[TokenScore, ...]
    cosines: tuple[tuple[float, ...], ...] = ()

    @property
    def suspects(self) -> tuple[TokenScore, ...]:
        """Those that decide the verdict."""
        return tuple(token for token in self.tokens if token.suspect)


@dataclass(frozen=True, slots=True)
class Audit:
    """An audit of one checkpoint. Nothing it says means that a model is free of backdoors."""

    name: str
    findings: tuple[Finding, ...]
    tensors: int
    sweep: TokenSweep | None = None

    @property
    def suspect(self) -> bool:
        """Whether anything decides against the model."""
        return any(finding.level == "suspect" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """`no finding` or `suspect`."""
        return SUSPECT if self.suspect else NO_FINDING

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"ok": not self.suspect, "verdict": self.verdict, **asdict(self)}

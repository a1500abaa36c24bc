"""The errors a user can meet. Each has a message, a hint and the exit code the CLI ends with."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What moves a terminal's cursor, changes its title, or turns the order of what is read."""


def printable(text: str) -> str:
    """Text of a stranger for people: control characters as escapes, lines and tabs kept."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def several(names: Sequence[object], shown: int = 1) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(map(str, names[:shown])) + (f" and {more} more" if more > 0 else "")


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint that names the nearest valid word, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(sorted(known))}"


MOST = 50
"""Problems that are named in one look."""

ALIKE = 4
"""Of so many tensors with the same problem only the first is named."""


class CompressError(Exception):
    """An error with one clear message and, where possible, what to do about it."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = printable(message)
        self.hint = printable(hint) if hint is not None else None
        super().__init__(self.message)


class InputError(CompressError):
    """Bad input or usage: a recipe, an option, a damaged source checkpoint (exit code 2)."""


class CheckError(CompressError):
    """A check or gate failed on a finished artefact (exit code 1)."""

    exit_code = 1


class MachineError(CompressError):
    """Memory, disk or network failed; the same command resumes (exit code 3)."""

    exit_code = 3


@contextmanager
def under(name: str) -> Iterator[None]:
    """Lets errors say of which tensor, or under which key of a recipe, they are."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error.message}", hint=error.hint) from error


class Problems(InputError):
    """Several input errors found in one look, reported together."""

    def __init__(self, problems: Sequence[CompressError]) -> None:
        problems = _together(problems)
        left = problems[MOST:]
        if left:
            problems = [*problems[:MOST], InputError(f"and {len(left)} more problems")]
        self.problems = problems
        text = "\n".join(f"{i}. {p.message}" for i, p in enumerate(problems, 1))
        super().__init__(
            problems[0].message if len(problems) == 1 else f"{len(problems)} problems\n{text}",
            hint=problems[0].hint if len(problems) == 1 else None,
        )


def _together(problems: Sequence[CompressError]) -> list[CompressError]:
    """What is wrong with many tensors alike ("NAME: what") as one problem, in the first's place."""
    alike: dict[tuple[str, str | None] | int, list[CompressError]] = {}
    for number, problem in enumerate(problems):
        name, _, what = problem.message.partition(": ")
        plain = type(problem) is InputError and what and " " not in name
        alike.setdefault((what, problem.hint) if plain else number, []).append(problem)
    found: list[CompressError] = []
    for same in alike.values():
        if len(same) < ALIKE:
            found += same
            continue
        name, _, what = same[0].message.partition(": ")
        found.append(InputError(f"{name} and {len(same) - 1} more: {what}", hint=same[0].hint))
    return found


class Interrupted(Exception):
    """The run was asked to stop; what is committed stays and the same command continues."""

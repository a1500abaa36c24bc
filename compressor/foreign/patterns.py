"""Names as a stranger's config gives them: exact, or a regular expression after "re:".

`re` has no bound on the time of a match, so expressions are matched by `regex` with one.
"""

import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex

from compressor.errors import InputError
from compressor.foreign.calls import foreign

SECONDS = 2.0
"""What all matches of one set of patterns may take; a usual one takes a microsecond."""

LONGEST = 2000
"""Characters of an expression."""

MOST = 1000
"""Expressions of one set; there is no bound on exact names."""


class Names:
    """A set of patterns; `in` says whether a module is named: exactly, or by an expression that
    matches from its start. Raises InputError for a bad expression, and where matching takes long.

    where  what holds the patterns, for messages
    """

    def __init__(self, patterns: Iterable[str], *, where: str) -> None:
        every = list(patterns)
        self.exact = frozenset(p for p in every if not p.startswith("re:"))
        self.expressions = [p[3:] for p in dict.fromkeys(every) if p.startswith("re:")]
        self.where = where
        self.left = SECONDS
        if len(self.expressions) > MOST:
            raise InputError(
                f"{where} holds {len(self.expressions)} regular expressions; {MOST} are the most"
            )

    def __contains__(self, module: str) -> bool:
        return module in self.exact or any(self._matches(e, module) for e in self.expressions)

    def _matches(self, expression: str, module: str) -> bool:
        compiled = _compile(expression, self.where)
        started = time.process_time()
        try:
            if self.left > 0:
                return compiled.match(module, timeout=self.left) is not None
        except TimeoutError:
            pass
        finally:
            self.left -= time.process_time() - started
        raise InputError(
            f"{self.where} holds a regular expression that takes too long: {expression[:80]!r}",
            hint="name the modules exactly, or without repeats inside repeats",
        )


@lru_cache(maxsize=2 * MOST)
def _compile(expression: str, where: str) -> Any:
    if len(expression) > LONGEST:
        raise InputError(
            f"{where} holds a regular expression of {len(expression)} characters; {LONGEST} are "
            "the most"
        )
    with foreign(f"{where} holds a bad regular expression"):
        return regex.compile(expression)

"""Markdown."""

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table."""
    lines = (f"| {' | '.join(str(cell) for cell in row)} |" for row in (head, *rows))
    return "\n".join([next(lines), "|---" * len(head) + "|", *lines])

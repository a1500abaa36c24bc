"""How often an audit tells of its progress."""

from collections.abc import Callable

STEPS = 20
"""Reports of progress in a stage."""


def paced(unit: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    """Every so many of the units alone."""

    def told(name: str, done: int, total: int) -> None:
        if done == total or done * STEPS // total > (done - 1) * STEPS // total:
            unit(name, done, total)

    return told

"""Linears whose shapes a method cannot work on."""

from collections.abc import Callable, Iterator, Sequence

from compressor.errors import InputError
from compressor.ir.layout import Linear


def some(names: Sequence[str]) -> str:
    """One linear by name, or how many there are and which is the first."""
    return names[0] if len(names) == 1 else f"{len(names)} linears ({names[0]}, …)"


def refused(
    linears: Sequence[Linear], reason: Callable[[Linear], str | None]
) -> Iterator[InputError]:
    """An error for each reason, with the linears that it is given for."""
    broken: dict[str, list[str]] = {}
    for linear in linears:
        if (why := reason(linear)) is not None:
            broken.setdefault(why, []).append(linear.name)
    return (InputError(f"{some(names)}: {why}") for why, names in broken.items())


def undivided(linears: Sequence[Linear], group_size: int | None) -> Iterator[InputError]:
    """Errors for linears whose inputs cannot be cut into groups; None is a whole row."""

    def reason(linear: Linear) -> str | None:
        if group_size is None or linear.in_features % group_size == 0:
            return None
        fits = [size for size in (128, 64, 32, 16) if linear.in_features % size == 0]
        hint = f"; {', '.join(map(str, fits))} would" if fits else "; null (a whole row) would"
        return (
            f"group_size {group_size} does not divide the model's {linear.in_features} inputs{hint}"
        )

    return refused(linears, reason)


def unblocked(
    linears: Sequence[Linear], size: int, what: str = "groups", hint: str = ""
) -> Iterator[InputError]:
    """Errors for linears whose inputs do not divide into the blocks that an element type has."""

    def reason(linear: Linear) -> str | None:
        if linear.in_features % size == 0:
            return None
        return f"the model's {linear.in_features} inputs do not divide into {what} of {size}{hint}"

    return refused(linears, reason)

"""Reading what is needed next while the last is worked on."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


def read_ahead(
    read: Callable[[Item], T], items: Sequence[Item], *, ahead: bool
) -> Iterator[Callable[[], T]]:
    """For each item a function that gives what was read of it, or raises what reading it raised.

    ahead  the next item is read meanwhile; else each is read when it is asked for, and no memory
           is taken for a second one
    """
    if not ahead:
        yield from (partial(read, item) for item in items)
        return
    with ThreadPoolExecutor(1) as pool:
        coming: list[Future[T]] = []
        for place in range(len(items)):
            coming += [pool.submit(read, item) for item in items[place + len(coming) : place + 2]]
            yield coming.pop(0).result

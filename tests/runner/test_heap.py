"""When garbage is looked for."""

import gc
import weakref

from compressor.runner.heap import settled


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.self = self


def test_only_what_is_made_meanwhile_is_looked_through() -> None:
    before, frozen = Ring(), gc.get_freeze_count()
    old = weakref.ref(before)
    with settled():
        assert gc.get_freeze_count() > frozen
        del before
        new = weakref.ref(Ring())
        gc.collect()
        assert old() is not None and new() is None
    gc.collect()
    assert old() is None

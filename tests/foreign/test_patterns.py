"""Patterns of strangers are matched as always, in bounded time."""

import time

import pytest

from compressor.errors import InputError
from compressor.foreign.patterns import Names


def test_exact_names_and_expressions() -> None:
    names = Names(["lm_head", "re:.*experts\\.\\d+\\.up$", "re:model"], where="here")
    assert "lm_head" in names and "lm_head.x" not in names
    assert "a.experts.12.up" in names and "a.experts.12.upper" not in names
    assert "model.layers" in names, "from the start, to anywhere"


@pytest.mark.parametrize("pattern", ["(([a-z._0-9])+)+!", "(a|a)*[bc]{2}", "(.+)*(.+)*(.+)*!"])
def test_no_pattern_takes_long(pattern: str) -> None:
    names = Names([f"re:{pattern}"], where="config")
    started = time.monotonic()
    try:
        assert not any(f"model.layers.{i}.self_attn.q_proj" + "a" * 40 in names for i in range(100))
    except InputError as error:
        assert "takes too long" in error.message
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("pattern", ["(", "*", "(" * 900 + ")" * 900, "a" * 3000])
def test_what_is_no_expression_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match=r"^config holds a"):
        assert "x" in Names([f"re:{pattern}"], where="config")


def test_the_number_of_expressions_is_bounded() -> None:
    assert "x9" in Names([f"x{i}" for i in range(100_000)], where="config")
    with pytest.raises(InputError, match="2000 regular expressions"):
        Names([f"re:x{i}" for i in range(2000)], where="config")

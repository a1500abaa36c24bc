"""How a weight is stored and which unit comes first is known in few places."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "compressor"


def lines_with(pattern: str, *, outside: tuple[str, ...]) -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(outside):
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                if re.search(pattern, line):
                    yield f"{name}:{number}: {line.strip()}"


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_only_values_maps_formats_and_the_gguf_reader_spell_out_the_name_of_a_weight(
    leaf: str,
) -> None:
    outside = ("ir/", "arch/", "formats/", "checkpoint/gguf/")
    assert not list(lines_with(rf"(\}}|\"\S*)\.{leaf}\"", outside=outside))


def test_units_are_asked_for_by_what_they_are() -> None:
    assert not list(lines_with(r"layout\.units\[|\bunits\[(0|-1|1:-1)\]", outside=("ir/",)))


def test_sizes_are_read_by_the_map_alone() -> None:
    keys = "vocab_size|hidden_size|max_position_embeddings|num_hidden_layers"
    pattern = rf"config(\[|\.get\()\"({keys})\""
    assert not list(lines_with(pattern, outside=("arch/", "checkpoint/gguf/")))

"""Values and bytes changed at random, and what every answer to them has to be."""

import json
import math
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compressor.cli.main import main

JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    10**30,
    -(2**63),
    1.5,
    math.inf,
    math.nan,
    "",
    "x" * 5000,
    "\x00",
    "../../etc/passwd",
    "ü" * 7,
    [],
    [[]],
    [None, 1, "a"],
    {},
    {"a": {"b": [1]}},
    {"": None},
)


def assert_clear(code: int, errors: str, what: Any) -> None:
    """One message for people: no traceback, no internal error, not empty, not endless."""
    assert code == 2, (code, errors, what)
    assert "error: " in errors and "internal error" not in errors, (errors, what)
    assert "Traceback" not in errors, (errors, what)
    assert len(errors) < 20_000, what


def refused(results: list[tuple[int, str, Any]]) -> int:
    """Every result is a success or one clear error; how many were refused."""
    for code, errors, what in results:
        if code != 0:
            assert_clear(code, errors, what)
    return sum(code != 0 for code, _, _ in results)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value inside nested data."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def changed(value: Any, rng: random.Random) -> Any:
    """A deep copy of JSON data with one value replaced, dropped, renamed or wrapped."""
    fresh = json.loads(json.dumps(value))
    path = rng.choice(list(places(fresh)))
    node = fresh
    for key in path[:-1]:
        node = node[key]
    how = rng.randrange(6)
    if how == 0:
        del node[path[-1]]
    elif how == 1 and isinstance(node, dict):
        node[f"{path[-1]}x"] = node.pop(path[-1])
    elif how == 2:
        node[path[-1]] = [node[path[-1]]]
    else:
        node[path[-1]] = rng.choice(JUNK)
    return fresh


def spoiled(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a piece cut, doubled, overwritten or a few bits flipped."""
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    how = rng.randrange(4)
    if how == 0:
        return data[:start] + data[stop:]
    if how == 1:
        return data[:stop] + data[start:]
    if how == 2:
        return data[:start] + rng.randbytes(min(stop - start, 64)) + data[stop:]
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def typed(errors: Callable[[], str]) -> tuple[int, str]:
    """Run what stands in sys.argv; its exit code, and what is wrong with how it ended.

    errors  what was written on stderr
    """
    try:
        main()
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException as error:
        return -1, f"{type(error).__name__}: {error}"
    said = errors()
    if code not in (0, 1, 2):
        return code, f"exit code {code}: {said[-500:]}"
    if "internal error" in said or "Traceback" in said:
        return code, said[-500:]
    if code == 2 and "error: " not in said:
        return code, f"nothing was said: {said[-200:]!r}"
    if "\x1b" in said or "\x07" in said:
        return code, f"control characters: {said!r:.300}"
    if len(said) > 40_000:
        return code, f"{len(said)} characters of errors"
    return code, ""


def spoil(path: Path, rng: random.Random) -> str:
    """Break a file; what was done."""
    how = rng.random()
    if how < 0.12:
        return _replace(path, rng)
    data = path.read_bytes()
    if path.suffix == ".json" and how < 0.75:
        value = json.loads(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            value = changed(value, rng) if value else value
        path.write_text(json.dumps(value))
        return f"{path.name} changed"
    if path.suffix == ".safetensors" and how < 0.7:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps(changed(json.loads(data[8 : 8 + length]), rng)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        return f"{path.name} with another header"
    if path.suffix == ".gguf" and how < 0.8:
        # Where the counts are, and metadata.
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice((rng.randrange(24), rng.randrange(min(4000, len(broken)))))
            broken[at : at + 8] = rng.choice((rng.randbytes(8), b"\xff" * 8, bytes(8)))
        path.write_bytes(broken)
        return f"{path.name} with other counts"
    path.write_bytes(spoiled(data, rng))
    return f"{path.name} spoiled"


def _replace(path: Path, rng: random.Random) -> str:
    """Something else in the place of a file."""
    path.unlink()
    kind = rng.choice(("pipe", "folder", "device", "empty", "loop", "deep", "wide", "list", "evil"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "deep": b"[" * 100_000,
                "wide": b"[" + b"1," * 3_000_000 + b"1]",
                "list": b"[]",
                "evil": json.dumps({"\x1b[2J\n::error::": ["\x07"] * 3}).encode(),
            }[kind]
        )
    return f"{kind} for {path.name}"

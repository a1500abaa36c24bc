"""Files of strangers: their kind, size, counts and aliases are bounded before work begins."""

import os
import resource
import struct
import threading
import time
from pathlib import Path

import pytest

from compressor.checkpoint.gguf.header import Damaged, parse
from compressor.errors import InputError
from compressor.foreign.bounded_yaml import load_yaml
from compressor.foreign.untrusted import parse_json, read_file, read_stream


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file", what="it") == read_file(tmp_path / "link", what="it")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero", "/dev/null", ".", "nothing", "a\0b"):
        with pytest.raises(InputError, match="it "):
            read_file(tmp_path / name, what="it")
    with pytest.raises(InputError, match="larger than"):
        read_file(tmp_path / "file", what="it", most=2)


def test_a_pipe_is_read_where_it_has_a_writer(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)

    def write() -> None:
        time.sleep(0.2)
        os.write(writer, b"model: x")
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    assert read_stream(Path(f"/dev/fd/{reader}"), what="recipe", most=100) == b"model: x"
    thread.join()
    os.close(reader)
    with pytest.raises(InputError, match="not a regular file"):
        read_stream(Path("/dev/zero"), what="recipe", most=100)


@pytest.mark.parametrize("text", [b"[" * 10**6, b"[1" + b",1" * 5_000_000 + b"]", b'{"a"', b"\xff"])
def test_json_without_bounds_is_refused(text: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError):
        parse_json(text)
    assert time.monotonic() - started < 5


def test_merge_keys_give_way_to_what_stands_beside_them() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {y: 4, <<: [*a, {z: 5}]}"
    found = load_yaml(text)
    assert found["b"] == {"x": 1, "y": 3}
    assert found["c"] == {"x": 1, "y": 4, "z": 5}
    with pytest.raises(ValueError, match="'y' appears twice"):
        load_yaml("a: &a {x: 1}\nb: {<<: *a, y: 3, y: 3}")


@pytest.mark.parametrize(
    "text",
    [
        "y0: &y0 [a,a,a,a,a,a,a,a,a]\n"
        + "\n".join(f"y{i}: &y{i} [{', '.join([f'*y{i - 1}'] * 9)}]" for i in range(1, 12)),
        "y0: &y0 {a: 1, b: 2}\n"
        + "\n".join(f"y{i}: &y{i} {{<<: [{', '.join([f'*y{i - 1}'] * 9)}]}}" for i in range(1, 12)),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 20_000,
        "[" * 200_000,
        "a: !!python/object/apply:os.system [x]",
        "? [a]\n: b",
        "[" + "1," * 2_000_000 + "1]",
        "- a\n" * 600_000,
    ],
    ids=[
        *("aliases", "merges", "itself", "itself in a map", "deep", "deeper", "object", "list key"),
        *("wide", "long"),
    ],
)
def test_yaml_that_means_more_than_it_says(text: str) -> None:
    started, taken = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        load_yaml(text)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken < 300 << 10


def test_long_yaml_of_few_values_is_read() -> None:
    words = "words, more: words\n" * 200_000
    assert load_yaml("a: |\n" + "".join(f"  {line}\n" for line in words.splitlines())) == {
        "a": words
    }


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(*, keys: int = 0, tensors: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def test_a_small_gguf_header() -> None:
    rest = text(b"a.b") + struct.pack("<If", 6, 1.5)
    rest += text(b"c") + struct.pack("<IIQ", 9, 8, 2) + text("木".encode()) + text(b"")
    rest += text(b"general.alignment") + struct.pack("<II", 4, 64)
    rest += text(b"w") + struct.pack("<IQQIQ", 2, 32, 4, 0, 0)
    header = parse(gguf(keys=3, tensors=1, rest=rest))
    assert header.metadata == {"a.b": 1.5, "c": ["木", ""], "general.alignment": 64}
    assert header.tensors["w"].dimensions == (32, 4)
    assert header.data % 64 == 0 and 0 <= header.data - len(gguf(rest=rest)) < 64


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGML",
        gguf(version=1),
        gguf(version=3 << 24),
        gguf(keys=2**64 - 1),
        gguf(tensors=2**63),
        gguf(keys=1, rest=struct.pack("<Q", 2**64 - 1) + bytes(64)),
        gguf(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 0, 2**64 - 1) + bytes(64)),
        gguf(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 2**40) + bytes(64)),
        gguf(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 0, 10**7) + bytes(10**7)),
        gguf(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1) * 10 + bytes(64)),
        gguf(keys=1, rest=text(b"a") + struct.pack("<I", 77) + bytes(64)),
        gguf(keys=2, rest=(text(b"a") + struct.pack("<IB", 0, 1)) * 2),
        gguf(tensors=1, rest=text(b"w") + struct.pack("<I", 2**32 - 1) + bytes(64)),
        gguf(tensors=1, rest=text(b"w") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0) + bytes(64)),
        gguf(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0)),
    ],
)
def test_gguf_counts_are_held_against_the_file(content: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(Damaged):
        parse(content)
    assert time.monotonic() - started < 2

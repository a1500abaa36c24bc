"""Where text comes from."""

import bz2
import gzip
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from compressor_calibration.bundled import KINDS, bundled_text
from compressor_calibration.documents import BadRows, DataError, Document
from compressor_calibration.sources import read_documents

ROOT = Path(__file__).resolve().parents[2]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(data, **options) -> list[Document]:
    return list(read_documents(str(data), **{"part": "calibration", **options}))


def texts(data, **options) -> list[str]:
    return [document.text for document in read(data, **options)]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize("part", ["calibration", "held_out"])
def test_bundled_is_the_part_asked_for(part):
    assert texts("bundled", part=part) == [bundled_text(part, kind) for kind in KINDS]
    (document,) = read("bundled/code", part=part)
    assert document.text == bundled_text(part, "code") and part in document.source
    with pytest.raises(DataError, match="no text bundled/poems") as error:
        read("bundled/poems")
    assert "bundled/code" in (error.value.hint or "")


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("one\r\ntwo\n\nthrée ".encode())
    assert texts(file) == ["one\r\ntwo\n\nthrée "] and read(file)[0].source == str(file)


def test_json_lines_hold_texts_and_conversations(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "id": 1}, {"messages": CHAT}])
    first, second = read(file)
    assert first.text == "a" and not first.messages
    assert list(second.messages) == CHAT and not second.text
    file = write_jsonl(tmp_path / "b.jsonl", [{"body": "b"}, {"body": None}])
    assert texts(file, text_field="body") == ["b", ""]


def test_parquet_holds_texts_and_conversations(tmp_path):
    table = pa.table({"text": [f"row {i}" for i in range(600)], "id": list(range(600))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert texts(tmp_path / "a.parquet") == [f"row {i}" for i in range(600)]
    parquet.write_table(pa.table({"messages": [CHAT, CHAT]}), tmp_path / "b.parquet")
    assert [list(d.messages) for d in read(tmp_path / "b.parquet")] == [CHAT, CHAT]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "prompt": "b", "completion": "c"}, Document(text="a")),
        ({"prompt": "b", "completion": "c"}, Document(text="bc")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Document(messages=tuple(CHAT))),
        ({"messages": CHAT, "text": "a"}, Document(messages=tuple(CHAT))),
        ({"messages": [], "text": "a"}, Document(text="a")),
        ({"conversations": SHARED, "id": "x"}, Document(messages=tuple(CHAT))),
        ({"input_ids": [3, 1, 2]}, Document(ids=(3, 1, 2))),
    ],
)
def test_documents_of_a_row_are_found_by_the_usual_names(tmp_path, row, expected):
    for file in (write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path / "a.parquet"):
        if file.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist([row]), file)
        (found,) = read(file)
        assert replace(found, source="", where="") == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"text_field": "prompt"}, Document(text="p")),
        ({"text_field": "chat"}, Document(messages=tuple(CHAT))),
        ({"text_field": "ids"}, Document(ids=(1, 2))),
        ({"columns": ("prompt", "answer")}, Document(text="p\n\na")),
        ({"columns": ("answer", "none")}, Document(text="a")),
    ],
)
def test_fields_that_are_named_win_over_the_usual_names(tmp_path, options, expected):
    row = {"messages": CHAT[:1], "text": "t", "prompt": "p", "answer": "a", "none": None}
    file = write_jsonl(tmp_path / "a.jsonl", [row | {"chat": SHARED, "ids": [1, 2]}])
    (found,) = read(file, **options)
    assert replace(found, source="", where="") == expected


def test_a_byte_order_mark_and_compression_are_no_part_of_the_text(tmp_path):
    text = b"\xef\xbb\xbfone"
    line = b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n'
    table = b'\xef\xbb\xbftext,n\n"one, ""1""\n",2\n'
    for pack, suffix in ((bytes, ""), (gzip.compress, ".gz"), (bz2.compress, ".bz2")):
        files = [tmp_path / f"a{kind}{suffix}" for kind in (".txt", ".jsonl", ".csv")]
        for file, content in zip(files, (text, line, table), strict=True):
            file.write_bytes(pack(content))
        assert [texts(file) for file in files] == [["one"], ["one", "two"], ['one, "1"\n']]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '\ufeff[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
        '{"text": "a"}\n\n{"text": "b"}\n',
        '{"version": "1.0", "data": [{"text": "a"}, {"text": "b"}]}',
        '{\n  "data": [{"text": "a"},\n {"text": "b"}]\n}',
    ],
)
def test_a_json_file_is_lines_or_one_list(tmp_path, content):
    (tmp_path / "a.json").write_text(content, "utf-8")
    assert texts(tmp_path / "a.json") == ["a", "b"]
    if "data" not in content:
        (tmp_path / "a.jsonl").write_text(content, "utf-8")
        assert texts(tmp_path / "a.jsonl") == ["a", "b"]


def test_a_long_cell_of_a_table_is_read(tmp_path):
    (tmp_path / "a.tsv").write_text(f"id\ttext\n1\t{'x' * 200_000}\n")
    assert texts(tmp_path / "a.tsv") == ["x" * 200_000]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert texts("~/a.txt") == ["a"]
    with pytest.raises(DataError, match="there is no file"):
        read("~/b")


def test_bad_rows_are_named_or_skipped_and_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n{"text": 3}\n[]\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is not JSON") as error:
        read(file)
    assert "skip_bad_rows" in (error.value.hint or "")
    met = BadRows(skip=True)
    assert texts(file, bad_rows=met) == ["a", "b"]
    assert met.count == 3 and "line 2 is not JSON" in met.first
    table = pa.table({"text": pa.array([b"a", b"\xff", b"b"], pa.binary())})
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet row 2: 'text' is not UTF-8"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "test.txt"),
        ("train/a.txt", "test/a.txt"),
        ("data/train-00000-of-00001.txt", "data/test-00000-of-00001.txt"),
        ("my_train_1.txt", "my-test-1.txt"),
    ],
)
def test_a_folder_is_read_by_its_splits(tmp_path, names):
    folder = tmp_path / "a[1]"
    for name, text in zip(names, ("a", "b"), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for card in ("README.md", "LICENSE", "LICENSE.txt", "license-MIT.md", ".cache/train.txt"):
        (folder / card).parent.mkdir(exist_ok=True)
        (folder / card).write_text("a card")
    assert texts(folder) == ["a"] and texts(folder, part="held_out") == ["b"]
    assert texts(folder, split="test") == ["b"] and texts(folder, split="train+test") == ["a", "b"]
    with pytest.raises(DataError, match="no split 'validation'") as error:
        read(folder, split="validation")
    assert re.search("train.*test|test.*train", error.value.hint or "")


def test_a_folder_whose_names_tell_no_splits_is_one(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "README.md").write_text("a card")
    assert texts(tmp_path) == texts(tmp_path, part="held_out") == texts(tmp_path, split="train")
    with pytest.raises(DataError, match="no split 'test'"):
        read(tmp_path, split="test")


def test_a_folder_describes_its_configurations_or_was_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "one.jsonl", [{"text": "1"}])
    write_jsonl(tmp_path / "two.jsonl", [{"text": "2"}, {"text": "3"}])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl\n"
        for name in ("one", "two")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# A card\n")
    assert texts(tmp_path, config="two") == ["2", "3"]
    assert texts(tmp_path, config="two", split="train[:1]") == ["2"]
    with pytest.raises(DataError, match=r"pick one among .*'one', 'two'"):
        read(tmp_path)
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    ).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved", part="held_out") == ["test"]
    with pytest.raises(DataError, match="no split 'dev'"):
        read(tmp_path / "saved", split="dev")


def test_keys_that_a_place_does_not_have_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="no configurations"):
        read(tmp_path / "a.txt", config="one")
    with pytest.raises(DataError, match="no revisions"):
        read(tmp_path, revision="main")


def test_a_folder_is_read_in_order_of_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "image.png").write_bytes(b"\x89")
    write_jsonl(tmp_path / "sub" / "c.jsonl", [{"text": "c"}])
    assert texts(tmp_path) == ["a", "b", "c"]
    assert {d.source for d in read(tmp_path)} == {str(tmp_path)}


def test_documents_are_read_as_they_are_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    documents = read_documents(str(tmp_path), part="calibration")
    assert next(documents).text == "a"
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl line 2 is not JSON", None),
        ("a.jsonl", b'{"body": "a"}', "line 1 has no field that is known to hold text", "'body'"),
        ("a.jsonl", b'{"text": 3}', "line 1: 'text' holds no text, .* but a int", "text_field"),
        ("a.jsonl", b"3", "line 1 is not an object", None),
        ("a.jsonl", b"[1]", "row 1 is not an object", None),
        ("a.jsonl", b'[{"text": "a"}, ', "not JSON", None),
        ("a.jsonl", b"[" * 100_000, "not JSON", None),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: 'text' is not valid Unicode", None),
        ("a.jsonl", b'{"messages": [{"text": "a"}]}', "not a message with a role", None),
        ("a.jsonl", b'{"input_ids": [1, -2]}', "negative token id -2", None),
        ("a.jsonl", b'{"prompt": "a"}', "line 1 has no field that is known", "'prompt'"),
        ("a.parquet", b"PAR1 no", "not a readable parquet", None),
        ("a.csv", b"text,n\na,1\nb\n", "row 2 has 1 cells under 2 columns", None),
        ("a.csv", b"text\n\xff\n", "not UTF-8", "UTF-8"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read", None),
        ("a.bin", b"a", "no kind of data", ".jsonl"),
    ],
)
def test_bad_files_are_clear_errors(tmp_path, name, content, message, hint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert hint is None or hint in error.value.hint


def test_a_parquet_file_without_the_field_names_its_columns(tmp_path):
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no field") as error:
        read(tmp_path / "a.parquet")
    assert "'body'" in (error.value.hint or "")


@pytest.mark.parametrize("data", ["missing.txt", "a/b.jsonl.gz", "/no/such/place", "a b", "~no/x"])
def test_a_path_that_is_not_there_is_no_data_set(data):
    with pytest.raises(DataError, match=r"there is no file|cannot be opened"):
        read(data)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no data in the folder"):
        read(tmp_path)


READING = """
import json, sys
from compressor_calibration.documents import BadRows, DataError, Unreachable
from compressor.plan.calibration import Calibration

found = []
for section in json.load(sys.stdin):
    try:
        rows = Calibration(**section).documents("calibration", BadRows())
        found.append([document.text for document in rows])
    except DataError as error:
        found.append([type(error).__name__, error.message])
print(json.dumps(found))
"""


def read_elsewhere(endpoint: str, home: Path, sections: list[dict]) -> list:
    """What these descriptions of data give in a process whose Hub is `endpoint`."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", READING],
        input=json.dumps(sections),
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_configurations_splits_and_revisions_of_a_hub_data_set(tmp_path, hub_server):
    """The layout of Salesforce/wikitext, which has no default configuration."""

    def table(*texts: str) -> bytes:
        stream = io.BytesIO()
        parquet.write_table(pa.table({"text": texts, "title": ["t"] * len(texts)}), stream)
        return stream.getvalue()

    names = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    head = "".join(
        f"- config_name: {name}\n  data_files:\n"
        f"  - split: train\n    path: {name}/train-*.parquet\n"
        f"  - split: test\n    path: {name}/test-*.parquet\n"
        for name in names
    )
    files = {"README.md": f"---\nconfigs:\n{head}---\n".encode()}
    for name in names:
        for split in ("train", "test"):
            files[f"{name}/{split}-00000-of-00001.parquet"] = table(f"{name} {split}", "second")
    shipped = [
        yaml.safe_load(path.read_text("utf-8"))["calibration"]
        for path in sorted((ROOT / "recipes").glob("*.yaml"))
        if "Salesforce/wikitext" in path.read_text("utf-8")
    ]
    wanted = {"data": "Salesforce/wikitext", "config": names[0]}
    with hub_server.serving() as hub:
        repository = "datasets/Salesforce/wikitext"
        hub.create(repository, files)
        repo = hub.repos[repository]
        repo.branches["next"] = repo.branches["main"]
        other = f"{names[0]}/train-00000-of-00001.parquet"
        repo.commit("next", {other: ("regular", table("of next"))})
        plain, configured, test, field, download, part, branch, *others = read_elsewhere(
            hub.url,
            tmp_path,
            [
                {"data": "Salesforce/wikitext"},
                wanted,
                wanted | {"split": "test"},
                wanted | {"text_field": "title"},
                wanted | {"streaming": False},
                wanted | {"split": "train[:1]"},
                wanted | {"revision": "next"},
                wanted | {"revision": "nowhere"},
                wanted | {"split": "dev"},
                {"data": "Salesforce/nothing"},
                *shipped,
            ],
        )
    rows = [f"{names[0]} train", "second"]
    assert plain[0] == "DataError" and "wikitext-2-raw-v1" in plain[1]
    assert configured == download == rows and part == rows[:1]
    assert branch == ["of next"]
    assert test == [f"{names[0]} test", "second"] and field == ["t", "t"]
    nowhere, dev, nothing, *recipes = others
    assert all(kind == "DataError" for kind, _ in (nowhere, dev, nothing))
    assert "nowhere" in nowhere[1] and "'test'" in dev[1] and "Salesforce/nothing" in nothing[1]
    assert recipes and all(found == [f"{names[1]} train", "second"] for found in recipes)


def test_a_hub_that_is_not_there_is_said_at_once(tmp_path):
    ((kind, message),) = read_elsewhere("http://127.0.0.1:9", tmp_path, [{"data": "owner/name"}])
    assert kind == "Unreachable" and "owner/name" in message

"""Where text comes from."""

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from compressor_calibration.bundled import bundled_text
from compressor_calibration.sources import DataError, Document, read_documents

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
    (document,) = read("bundled", part=part)
    assert document.text == bundled_text(part) and part in document.source


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
        ("a.jsonl", b'{"body": "a"}', "line 1 has no text in field 'text'", "body"),
        ("a.jsonl", b'{"text": 3}', "line 1 has no text", "text"),
        ("a.jsonl", b"[1]", "line 1 is not an object", None),
        ("a.jsonl", b'{"messages": "hello"}', "not a list", None),
        ("a.parquet", b"PAR1 no", "not a readable parquet", None),
        ("a.csv", b"a,b", "no kind of text", ".jsonl"),
    ],
)
def test_bad_files_are_clear_errors(tmp_path, name, content, message, hint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert hint is None or hint in error.value.hint


def test_a_parquet_file_without_the_field_names_its_columns(tmp_path):
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'text'") as error:
        read(tmp_path / "a.parquet")
    assert "body" in (error.value.hint or "")


@pytest.mark.parametrize("data", ["missing.txt", "folder/missing.jsonl", "/no/such/place", "a b"])
def test_a_path_that_is_not_there_is_no_data_set(data):
    with pytest.raises(DataError, match="there is no file"):
        read(data)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text in the folder"):
        read(tmp_path)


def test_a_hub_data_set_is_streamed(monkeypatch):
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return iter([{"body": "a"}, {"body": "b"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts("owner/name", split="test", text_field="body") == ["a", "b"]
    assert asked == [("owner/name", {"split": "test", "streaming": True})]
    with pytest.raises(DataError, match="owner/name has no text in field 'text'"):
        read("owner/name")


def test_a_hub_data_set_that_cannot_be_read_is_a_clear_error(monkeypatch):
    def load_dataset(name, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'owner/name': no route$") as error:
        read("owner/name")
    assert "bundled" in (error.value.hint or "")

"""The output folder while a run owns it."""

import shutil
from pathlib import Path

import pytest

from compressor.checkpoint.workspace import (
    WORK_NAME,
    claim,
    lacking_room,
    owned,
    refusal,
    require_no_writer,
    require_same,
    writing_beside,
)
from compressor.errors import InputError

MANIFEST = "manifest.json"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with owned(tmp_path / "out") as work:
        assert work == tmp_path / "out" / WORK_NAME
        with (
            pytest.raises(InputError, match="another run is writing"),
            owned(tmp_path / "out"),
        ):
            pass
    with owned(tmp_path / "out"):
        pass


def test_what_no_run_of_ours_wrote_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for name, why in (("file", "is a file"), ("full", "holds no run of this program")):
        with pytest.raises(InputError, match=why), owned(tmp_path / name):
            pass
    (tmp_path / "full" / MANIFEST).write_text("{}")
    with owned(tmp_path / "full"):
        pass


def test_a_folder_of_the_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for model in (tmp_path / "model", tmp_path / "link"):
        refused = refusal(tmp_path / "model" / "out", models=[model])
        assert refused is not None and "in the folder of the model" in refused.message
    assert refusal(tmp_path / "model-w4", models=[tmp_path / "model"]) is None


def test_another_run_is_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    claim(tmp_path / "work", {"recipe": {"bits": 4}, "seed": 0})
    claim(tmp_path / "work", {"recipe": {"bits": 4}, "seed": 0})
    with pytest.raises(InputError, match=r"recipe\.bits: 4, now 3") as caught:
        claim(tmp_path / "work", {"recipe": {"bits": 3}, "seed": 0})
    assert "seed" not in caught.value.message


def test_what_is_known_later_does_not_differ() -> None:
    before = {"source": {"name": "m", "content": "abc"}}
    require_same(before, {"source": {"name": "m"}}, where=Path(), known_later=("source.content",))
    with pytest.raises(InputError, match=r"source\.content"):
        require_same(before, {"source": {"name": "m"}}, where=Path())


def test_room_is_looked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    assert lacking_room(tmp_path / "not" / "there", 1000) is None
    refused = lacking_room(tmp_path / "not" / "there", 1 << 60)
    assert refused is not None and str(tmp_path) in refused.message


def test_what_is_written_needs_no_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a shard that has its full size already."""
    with (tmp_path / "shard").open("wb") as handle:
        handle.write(b"x" * (1 << 20))
        handle.truncate(2 << 20)
    usage = shutil.disk_usage(tmp_path)._replace(free=(1 << 20) + (1 << 17))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert lacking_room(tmp_path, 2 << 20) is None
    assert lacking_room(tmp_path, 3 << 20) is not None


def test_no_run_begins_while_ranks_of_an_ended_one_may_write(tmp_path: Path) -> None:
    work = tmp_path / "out" / WORK_NAME
    require_no_writer(work)
    with (
        writing_beside(work),
        writing_beside(work),
        pytest.raises(InputError, match=r"still write into .*out$"),
    ):
        require_no_writer(work)
    require_no_writer(work)

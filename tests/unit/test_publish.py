"""Publishing to a Hub on localhost: what arrives is what was sent, or the command says so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import CheckError, InputError, MachineError
from compressor.manifest import FileRecord, Manifest
from compressor.publish import check_token, damaged, list_upload, push, recorded_objections
from compressor.report_settings import Publish

SMALL, LARGE = b"s" * 9_000, bytes(range(256)) * 200
REPO = "me/model-w4"


@pytest.fixture()
def checkpoint(tmp_path: Path) -> Path:
    """A folder as a run leaves it: files its manifest names, others beside them, and strays."""
    folder = tmp_path / "model-w4"
    folder.mkdir()
    named = {
        "config.json": b'{"model_type": "llama"}',
        "model-00001-of-00002.safetensors": SMALL,
        "model-00002-of-00002.safetensors": LARGE,
        "empty.txt": b"",
    }
    for name, data in named.items():
        (folder / name).write_bytes(data)
    files = {n: FileRecord(hashlib.sha256(d).hexdigest(), len(d)) for n, d in named.items()}
    (folder / "manifest.json").write_bytes(Manifest(files=files, tensors={}).to_bytes())
    (folder / "README.md").write_text("# model\n")
    (folder / "notes.txt").write_text("mine")
    (folder / ".compress-work").mkdir()
    (folder / ".compress-work" / "job.json").write_text("{}")
    (folder / ".env").write_text("HF_TOKEN=secret")
    return folder


def assert_arrived(hub: Any, folder: Path, revision: str = "main") -> None:
    there = hub.repos[REPO].contents(revision)
    there.pop(".gitattributes")
    names = list(list_upload(folder).files)
    assert there == {name: (folder / name).read_bytes() for name in names}


def test_what_arrives_is_what_was_sent_and_nothing_else(hub: Any, checkpoint: Path) -> None:
    listing = list_upload(checkpoint)
    assert listing.left_out == (".compress-work", ".env", "notes.txt")
    assert check_token() == "me"
    seen: list[str] = []
    pushed = push(listing, Publish(repo=REPO), progress=lambda name, done, total: seen.append(name))
    assert_arrived(hub, checkpoint)
    assert seen == list(listing.files)
    assert hub.repos[REPO].private and pushed.commit == hub.repos[REPO].branches["main"]
    assert hub.count("PUT", "/part/") > 3, "the large file went up in parts"
    assert hub.count("PUT", "/lfs/[0-9a-f]+$") == 1, "the small one in one piece"


def test_nothing_is_sent_twice(hub: Any, checkpoint: Path) -> None:
    push(list_upload(checkpoint), Publish(repo=REPO))
    sent, commits = hub.count("PUT", ""), len(hub.repos[REPO].commits)
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert (hub.count("PUT", ""), len(hub.repos[REPO].commits)) == (sent, commits)


def test_a_branch_is_made_and_filled(hub: Any, checkpoint: Path) -> None:
    push(list_upload(checkpoint), Publish(repo=REPO, revision="w4", private=False))
    assert_arrived(hub, checkpoint, "w4")
    assert not hub.repos[REPO].private
    assert list(hub.repos[REPO].contents("main")) == [".gitattributes"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/models/me/model-w4$"),
        ("POST", "/api/repos/create"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/[0-9a-f]+$"),
        ("PUT", "/part/3"),
        ("POST", "/complete"),
        ("POST", "/lfs/verify"),
        ("POST", "/commit/"),
        ("POST", "/paths-info/"),
    ],
)
@pytest.mark.parametrize("kind", [503, "reset", "lost"])
def test_a_passing_failure_anywhere_is_got_over(
    method: str, path: str, kind: Any, hub: Any, checkpoint: Path
) -> None:
    times = 1 if kind == "lost" else 2
    hub.fail(method, path, kind, times=times)
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert hub.faults[0].times < times, "the failure happened"
    assert_arrived(hub, checkpoint)
    assert len(hub.repos[REPO].commits) == 2, "a commit whose answer was lost is not repeated"


def test_what_keeps_failing_is_said_and_the_next_call_continues(hub: Any, checkpoint: Path) -> None:
    hub.fail("PUT", "/part/7", 500, times=1000)
    with pytest.raises(MachineError, match="kept failing at model-00002") as caught:
        push(list_upload(checkpoint), Publish(repo=REPO))
    assert "same command continues" in (caught.value.hint or "")
    assert list(hub.repos[REPO].contents()) == [".gitattributes"], "half an upload shows nothing"
    hub.faults.clear()
    before = hub.count("PUT", "/lfs/[0-9a-f]+$")
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert_arrived(hub, checkpoint)
    assert hub.count("PUT", "/lfs/[0-9a-f]+$") == before, "what had arrived is not sent again"


@pytest.mark.parametrize("path", ["/lfs/[0-9a-f]+$", "/part/2"])
def test_bytes_that_change_on_the_way_are_sent_again(path: str, hub: Any, checkpoint: Path) -> None:
    hub.fail("PUT", path, "corrupt")
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert_arrived(hub, checkpoint)


@pytest.mark.parametrize("path", ["/lfs/[0-9a-f]+$", "/part/2"])
def test_a_store_that_holds_other_bytes_is_found_out(path: str, hub: Any, checkpoint: Path) -> None:
    hub.trusting = True
    hub.fail("PUT", path, "corrupt")
    with pytest.raises(CheckError, match=r"does not hold what was sent: model-0000\d"):
        push(list_upload(checkpoint), Publish(repo=REPO))


def test_who_may_not_write_is_told(
    hub: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="does not let this user write"):
        push(list_upload(checkpoint), Publish(repo="others/model"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 32)
    with pytest.raises(InputError, match="does not let this user"):
        check_token()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="access token"):
        check_token()


def test_a_public_repository_is_not_filled_by_accident(hub: Any, checkpoint: Path) -> None:
    hub.create(REPO, {"README.md": b"old"})
    with pytest.raises(InputError, match="everyone can read it"):
        push(list_upload(checkpoint), Publish(repo=REPO))
    assert hub.repos[REPO].contents() == {"README.md": b"old"}
    push(list_upload(checkpoint), Publish(repo=REPO, private=False))
    assert hub.repos[REPO].contents()["README.md"] == b"# model\n"


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_a_token_in_a_file_is_never_uploaded(name: str, checkpoint: Path) -> None:
    (checkpoint / name).write_text('{"token": "hf_' + "Q" * 34 + '"}')
    with pytest.raises(InputError, match=f"{name} holds what looks like a Hub access token"):
        list_upload(checkpoint)


def test_unfinished_and_incomplete_folders_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").unlink()
    with pytest.raises(InputError, match=r"lacks config\.json"):
        list_upload(checkpoint)
    (checkpoint / "manifest.json").unlink()
    for folder in (checkpoint, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no finished checkpoint"):
            list_upload(folder)


def test_damage_and_verdicts_are_minded(checkpoint: Path) -> None:
    listing = list_upload(checkpoint)
    assert damaged(listing) == [] and recorded_objections(listing) is None
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    costs = {"source_bytes": 1, "output_bytes": 1, "host_bytes": 1, "seconds": 1.0}
    data: dict[str, Any] = {
        "title": "x",
        "recipe": {},
        "source": {},
        "format": "dense",
        "estimates": costs,
        "spent": costs,
        "verify": {"ok": True},
        "gate": {"passed": True, "checks": []},
        "hashes": {"manifest.json": digest},
    }

    def objections(**changes: Any) -> list[str] | None:
        (checkpoint / "report.json").write_text(json.dumps({**data, **changes}))
        return recorded_objections(list_upload(checkpoint))

    assert objections() == []
    assert objections(verify={"ok": False}) == ["it did not pass verification"]
    missed = {"passed": False, "checks": [{"passed": False, "message": "KL is 3"}]}
    assert objections(gate=missed) == ["it missed its gate: KL is 3"]
    assert objections(verify=None) is None, "what was never verified has to be"
    assert objections(hashes={"manifest.json": "0"}) is None, "a report of other files"
    (checkpoint / "config.json").write_bytes(b'{"model_type": "llamb"}')
    assert damaged(list_upload(checkpoint)) == ["config.json"]

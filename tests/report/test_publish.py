"""Publishing to a Hub on localhost: what arrives is what was sent, or the command says so."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint.lfs import POINTER
from compressor.checkpoint.manifest import FileRecord, Manifest
from compressor.checkpoint.secrets import find_secret
from compressor.cli.commands.push import show_changes
from compressor.errors import CheckError, InputError, MachineError
from compressor.report.card import _sealed
from compressor.report.publish import (
    check_token,
    damaged,
    list_upload,
    preview,
    push,
    recorded_objections,
)
from compressor.report.settings import Publish

SMALL, LARGE = b"s" * 9_000, bytes(range(256)) * 200
REPO = "me/model-w4"
CARD = _sealed("# model\n")


VERSION = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": SMALL,
    "model-00002-of-00002.safetensors": LARGE,
    "additional_chat_templates/tool.jinja": b"{{ messages }}",
    "empty.txt": b"",
}


@pytest.fixture()
def checkpoint(tmp_path: Path) -> Path:
    return make_version(tmp_path / "model-w4", VERSION)


def make_version(folder: Path, named: dict[str, bytes]) -> Path:
    """A folder as a run leaves it: files its manifest names, others beside them, and strays."""
    for name, data in named.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    files = {n: FileRecord(hashlib.sha256(d).hexdigest(), len(d)) for n, d in named.items()}
    (folder / "manifest.json").write_bytes(Manifest(files=files, tensors={}).to_bytes())
    (folder / "README.md").write_text(CARD)
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
        ("GET", "/tree/"),
        ("GET", "/revision/"),
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
    assert hub.repos[REPO].contents()["config.json"] == b'{"model_type": "llama"}'


def test_a_version_takes_the_place_of_the_one_before(
    hub: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {
        "config.json": b"{}",
        "model.safetensors": SMALL,
        "chat_template.jinja": b"old",
        "LICENSE": b"old",
    }
    push(list_upload(make_version(tmp_path / "one", one)), Publish(repo=REPO))
    others = {"notes/eval.md": b"mine", "figure.png": b"png", "LICENSE": b"edited there"}
    weights = {"pytorch_model.bin": b"w", "consolidated.safetensors": b"w", "params.json": b"{}"}
    weights |= {"attention_policy.json": b"{}", "attention_policy.safetensors": b"w"}
    inner = {"original/consolidated.00.pth": b"w", "tokenizer.model": b"by hand"}
    hub.repos[REPO].commit(
        "main", {n: ("regular", d) for n, d in (others | weights | inner).items()}
    )
    listing, to = list_upload(checkpoint), Publish(repo=REPO)
    expected = preview(listing, to)
    assert expected.replace == ("config.json", "manifest.json")
    assert expected.delete == (
        *("attention_policy.json", "attention_policy.safetensors"),
        *("chat_template.jinja", "consolidated.safetensors", "model.safetensors"),
        *("params.json", "pytorch_model.bin"),
    )
    assert set(expected.kept) == {".gitattributes", *others, *inner}
    assert expected.loaded == ("tokenizer.model",)
    show_changes(listing, expected)
    assert "loaders read tokenizer.model there" in capsys.readouterr().out
    commits = len(hub.repos[REPO].commits)
    assert push(listing, to).changes == expected
    assert len(hub.repos[REPO].commits) == commits + 1
    here = {name: (checkpoint / name).read_bytes() for name in listing.files}
    assert hub.repos[REPO].contents() == {".gitattributes": b"", **others, **inner, **here}


def test_only_what_differs_is_sent(hub: Any, checkpoint: Path) -> None:
    push(list_upload(checkpoint), Publish(repo=REPO))
    (checkpoint / "README.md").write_text(_sealed("# model, measured\n"))
    large = hub.count("PUT", "")
    changes = push(list_upload(checkpoint), Publish(repo=REPO)).changes
    assert changes.sent == ("README.md",) and hub.count("PUT", "") == large


def test_a_card_written_by_hand_stays(hub: Any, checkpoint: Path) -> None:
    to = Publish(repo=REPO)
    push(list_upload(checkpoint), to)
    hub.repos[REPO].commit("main", {"README.md": ("regular", b"# By hand\n")})
    changes = push(list_upload(checkpoint), to).changes
    assert not changes and "README.md" in changes.kept
    assert hub.repos[REPO].contents()["README.md"] == b"# By hand\n"
    push(list_upload(checkpoint), to, replace_card=True)
    assert hub.repos[REPO].contents()["README.md"] == CARD.encode()


def test_an_adapter_is_not_pushed_over(hub: Any, checkpoint: Path) -> None:
    hub.create(REPO, {"adapter_config.json": b"{}"}, private=True)
    with pytest.raises(InputError, match="holds an adapter"):
        push(list_upload(checkpoint), Publish(repo=REPO))
    assert hub.repos[REPO].contents() == {"adapter_config.json": b"{}"}


def test_a_commit_of_somebody_else_in_between_is_seen(
    hub: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(list_upload(checkpoint), Publish(repo=REPO))
    (checkpoint / "README.md").write_text(_sealed("# model, measured\n"))
    from huggingface_hub import HfApi

    commit, met = HfApi.create_commit, []

    def slowly(*args: Any, **options: Any) -> Any:
        if not met:
            met.append(hub.repos[REPO].commit("main", {"pytorch_model.bin": ("regular", b"w")}))
        return commit(*args, **options)

    monkeypatch.setattr(HfApi, "create_commit", slowly)
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert met and "pytorch_model.bin" not in hub.repos[REPO].contents()
    assert_arrived(hub, checkpoint)


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("hf_" + "Q" * 34, "a Hub access token"),
        ("hf_oauth_" + "Q" * 34, "a Hub access token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\n" + "b3BlbnNzaC1r" * 6, "a private key"),
        ("AKIA" + "IOSFODNN7EXAMPLE", "an AWS access key"),
        ("ghp_" + "a1B2" * 9, "a GitHub token"),
        ("sk-proj-" + "a1B2" * 12, "an API key"),
        ("https://me:hunter22@example.org/x", "a password in an address"),
    ],
)
@pytest.mark.parametrize("name", ["README.md", "config.json", "empty.txt", "model.safetensors"])
def test_a_secret_is_never_uploaded(name: str, secret: str, kind: str, tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": {"note": secret}}).encode()
    if name.endswith(".safetensors"):
        text = len(text).to_bytes(8, "little") + text
    folder = make_version(tmp_path / "out", {"config.json": b"{}", name: text})
    (folder / name).write_bytes(text)
    with pytest.raises(InputError, match=f"{re.escape(name)} holds what looks like {kind}"):
        list_upload(folder)


def test_a_secret_is_found_in_utf16_and_across_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(("x" * 999 + " hf_" + "Q" * 34).encode("utf-16"))
    assert find_secret(tmp_path / "a")
    monkeypatch.setattr("compressor.checkpoint.secrets.CHUNK", 100)
    for before in range(80, 120):
        (tmp_path / "b").write_bytes(b" " * before + b"hf_" + b"Q" * 34 + b" " * 500)
        assert find_secret(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"hf_tokenizer sk-learn https://example.org/a:b@c AKIA " * 50)
    assert find_secret(tmp_path / "b") is None


def test_links_out_of_the_folder_and_pointers_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config\.json is a link that leads out"):
        list_upload(checkpoint)
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").write_bytes(POINTER + b"v1\noid sha256:00\nsize 1\n")
    with pytest.raises(InputError, match="Git LFS pointer"):
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

"""Publishing over Xet, which the Hub's client prefers wherever hf_xet is installed: the real client
sends real bytes to a store on localhost that puts the pieces together again."""

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint.manifest import FileRecord, Manifest
from compressor.errors import CheckError, MachineError
from compressor.report.publish import list_upload, push
from compressor.report.settings import Publish

REPO = "me/model-w4"
XORBS, SHARDS = "/v1/xorbs/", "/v1/shards"


@pytest.fixture()
def checkpoint(tmp_path: Path) -> Path:
    """Two files of weights, one in several pieces, that no earlier test has sent."""
    folder = tmp_path / "model-w4"
    folder.mkdir()
    noise = random.Random(str(tmp_path))
    named = {
        "config.json": b'{"model_type": "llama"}',
        "model-00001-of-00002.safetensors": noise.randbytes(9_000),
        "model-00002-of-00002.safetensors": noise.randbytes(400_000),
    }
    for name, data in named.items():
        (folder / name).write_bytes(data)
    files = {n: FileRecord(hashlib.sha256(d).hexdigest(), len(d)) for n, d in named.items()}
    (folder / "manifest.json").write_bytes(Manifest(files=files, tensors={}).to_bytes())
    return folder


def assert_arrived(hub: Any, folder: Path) -> None:
    there = hub.repos[REPO].contents()
    there.pop(".gitattributes")
    assert there == {name: (folder / name).read_bytes() for name in list_upload(folder).files}


def test_what_arrives_in_pieces_is_what_was_sent(xet_hub: Any, checkpoint: Path) -> None:
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert_arrived(xet_hub, checkpoint)
    assert max(map(len, xet_hub.xet.xorbs.values())) > 2, "the large file went up in pieces"
    assert xet_hub.count("PUT", "/lfs/") == 0, "nothing went the other way"
    sent = xet_hub.count("POST", XORBS)
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert xet_hub.count("POST", XORBS) == sent, "nothing is sent twice"


def test_xet_can_be_switched_off(
    xet_hub: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What HF_HUB_DISABLE_XET=1 does, which the client reads when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert_arrived(xet_hub, checkpoint)
    assert xet_hub.count("POST", XORBS) == 0 and xet_hub.count("PUT", "/lfs/") > 1


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/xet-write-token/", "reset"),
        ("POST", XORBS, "reset"),
        ("POST", XORBS, "lost"),
        ("POST", SHARDS, "reset"),
        ("POST", SHARDS, 400),
        ("POST", SHARDS, 200),
        ("POST", "/commit/", 503),
    ],
)
def test_a_passing_failure_is_got_over(
    method: str, path: str, kind: Any, xet_hub: Any, checkpoint: Path
) -> None:
    xet_hub.fail(method, path, kind)
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert xet_hub.faults[0].times == 0, "the failure happened"
    assert_arrived(xet_hub, checkpoint)


def test_what_keeps_failing_is_said_and_the_next_call_continues(
    xet_hub: Any, checkpoint: Path
) -> None:
    xet_hub.fail("POST", SHARDS, 400, times=1000)
    with pytest.raises(MachineError, match="kept failing at model-00001") as caught:
        push(list_upload(checkpoint), Publish(repo=REPO))
    assert "same command continues" in (caught.value.hint or "")
    assert list(xet_hub.repos[REPO].contents()) == [".gitattributes"]
    xet_hub.faults.clear()
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert_arrived(xet_hub, checkpoint)


def test_bytes_that_change_on_the_way_are_sent_again_or_refused(
    xet_hub: Any, checkpoint: Path
) -> None:
    xet_hub.fail("POST", XORBS, "corrupt")
    push(list_upload(checkpoint), Publish(repo=REPO))
    assert xet_hub.faults[0].times == 0
    assert_arrived(xet_hub, checkpoint)


def test_a_store_that_holds_other_bytes_is_found_out(xet_hub: Any, checkpoint: Path) -> None:
    xet_hub.trusting = True
    xet_hub.fail("POST", XORBS, "corrupt")
    with pytest.raises(CheckError, match=r"does not hold what was sent: model-0000\d"):
        push(list_upload(checkpoint), Publish(repo=REPO))

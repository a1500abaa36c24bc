"""Hundreds of broken inputs of every kind: one clear error each, the right exit code, in time.

`scripts/fuzz.py` makes thousands of the same, each guarded against hangs and for its memory.
"""

import time
from pathlib import Path

import pytest

from tests.support.fuzz_cases import KINDS, Corpus
from tests.support.fuzzing import typed

SEEDS = 25
SECONDS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_broken_inputs(
    kind: str,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refused = 0
    for seed in range(SEEDS):
        case = corpus.case(kind, seed)
        monkeypatch.chdir(case.folder)
        monkeypatch.setattr("sys.argv", ["compress", *case.arguments])
        started = time.process_time()
        code, fault = typed(lambda: capsys.readouterr().err)
        assert not fault, (kind, seed, case, fault)
        assert time.process_time() - started < SECONDS, (kind, seed, case)
        refused += code != 0
    # An interrupted run redoes what is broken.
    assert refused > SEEDS // 4 or kind == "begun", "what is broken is noticed"

"""The script that shows what sinks are worth, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure" / "streaming.py"


def test_it_measures_along_a_text(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("measure_streaming", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = ["--out", str(tmp_path), "--device", "cpu", "--window", "8", "--chunk", "16"]
    options += ["--times", "20", "--sinks", "0", "2", "--full"]
    monkeypatch.setattr(sys, "argv", ["measure_streaming", str(tiny_model("llama")), *options])
    module.main()
    found = json.loads((tmp_path / "streaming.json").read_text())
    none, two, full = found["rows"]
    assert found["tokens"] == 160
    # Before anything is evicted all see the same.
    assert none["first_window"] == pytest.approx(full["first_window"], rel=1e-4)
    assert two["last_window"] != pytest.approx(full["last_window"], rel=1e-3)
    # 2 layers x 2 KV heads x 16 channels, keys and values in float32.
    sizes = [row["cache_bytes"] // (2 * 2 * 16 * 2 * 4) for row in found["rows"]]
    assert sizes == [7, 9, 160]
    assert (tmp_path / "streaming.png").read_bytes().startswith(b"\x89PNG")

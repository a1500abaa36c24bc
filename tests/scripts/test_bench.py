"""The runner of benchmarks: what is wrong has no figure, and all else runs where no clock does."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from compressor.arch.load import find_map
from tests.support.scripts import load


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load("scripts/bench/run.py")


def test_families_run_in_the_interpreter(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["run.py", "--tiny", "inputs", "nvfp4", "--json", str(kept)])
    assert bench.main() == 0
    found = json.loads(kept.read_text())
    assert {row["family"] for row in found["rows"]} == {"inputs", "nvfp4"}
    assert found["torch"] == torch.__version__ and not found["red"]


def test_a_wrong_kernel_has_no_figure(bench: ModuleType) -> None:
    from case import Case, Setup

    runner = bench.Runner(Setup(tiny=True))
    one = torch.ones(4)
    for name, out in (("right", one), ("wrong", one + 1), ("broken", one * torch.nan)):
        case = Case(name, lambda i, out=out: out, lambda: one, shape="4")
        runner.case("toy", case)
    assert [row.name for row in runner.rows] == ["right"]
    assert runner.red == ["toy: wrong, 4", "toy: broken, 4"]


def test_a_table_says_what_is_missed(bench: ModuleType) -> None:
    row = bench.Row("toy", "fast", "4", 0.0, us=10.0, gbps=1000.0, of_copy=0.5, of_peak=0.4)
    row.beside, row.peers_us, row.missed = {"cuBLAS": 2.0}, {"cuBLAS": 20.0}, ["cuBLAS 2.5"]
    *_, line = bench.table([row])
    assert line == (
        "| toy | fast | 4 | 10.0 µs | 1,000 GB/s | 50% | 40% | 2.00x cuBLAS (20.0 µs) | "
        "MISSED: cuBLAS 2.5 |"
    )


@pytest.mark.parametrize("tiny", [True, False])
def test_blocks_of_large_models_have_the_names_and_shapes_of_their_families(tiny: bool) -> None:
    """Those of the released models, and their sizes in tensors of 16 bits."""
    models, names = load("scripts/make_random_model.py"), load("scripts/bench/shapes.py").LARGE
    found = {}
    for name in names:
        config = models.smaller(models.SHAPES[name]) if tiny else models.SHAPES[name]
        last = config.get("first_k_dense_replace", 0)
        shapes = models.shapes_of(config, last + 1)
        layout = find_map(config, shapes, chosen=None).layout(
            {**config, "num_hidden_layers": last + 1}, shapes
        )
        assert len(layout.blocks) == last + 1
        block = models.block(config, last).values()
        found[name] = round(sum(torch.Size(dims).numel() for dims in block) * 2 / 1e9, 1)
    if not tiny:
        assert found == {
            "llama-3-70b": 1.7,
            "llama-3-405b": 6.4,
            "mixtral-8x22b": 5.0,
            "qwen3-235b-a22b": 5.0,
            "deepseek-v3": 23.0,
        }

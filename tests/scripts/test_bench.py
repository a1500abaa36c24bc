"""The runner of benchmarks: what is wrong has no figure, and all else runs where no clock does."""

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
    runner = bench.Runner(bench.Setup(tiny=True))
    for name, wrong in (("right", 0.0), ("wrong", 1.0), ("broken", torch.nan)):
        case = bench.Case(
            lambda x, wrong=wrong: x + wrong,
            [(torch.ones(4),)],
            name=name,
            reference=lambda x: x,
            shape="4",
        )
        runner.case("toy", case)
    assert [row.name for row in runner.rows] == ["right"]
    assert runner.red == ["toy: wrong, 4", "toy: broken, 4"]


def test_errors_are_of_the_part_that_a_reference_has(bench: ModuleType) -> None:
    out = torch.ones(2, 4, 3, 8)
    error = bench.Case.error
    assert error(out, out[:1, :2, -1:]) == 0.0
    out[0, 0, 0] = 5.0
    assert error(out, torch.ones(1, 4, 1, 8)) == 0.0
    assert error(out, torch.ones(1, 4, 3, 8)) > 0.1
    hidden = torch.ones(3).index_fill(0, torch.tensor([1]), -torch.inf)
    assert error(torch.tensor([1.0, torch.nan, 1.0]), hidden) == 0.0
    assert error(torch.full((3,), torch.nan), hidden) != 0.0


def test_bytes_are_those_of_arguments_and_results(bench: ModuleType) -> None:
    x = torch.ones(4, dtype=torch.float16)
    how = {"name": "toy", "reference": torch.neg, "shape": "4"}
    assert bench.Case(torch.neg, [(x,)], **how).bytes_moved((x.float(), x)) == 8 + 16 + 8
    assert bench.Case(torch.neg, [(x,)], ops=1.0, **how).bytes_moved(x) == 0.0
    assert bench.Case(lambda: x, **how).bytes_moved(x) == 0.0
    assert bench.Case(torch.neg, [(x,)], moved=5.0, **how).bytes_moved(x) == 5.0


def test_a_table_says_what_is_missed(bench: ModuleType) -> None:
    figures = {"us": 10.0, "gbps": 1000.0, "of_copy": 0.5, "peers_us": {"cuBLAS": 20.0}}
    row = bench.Row("toy", "fast", "4", 0.0, missed=["cuBLAS 2.5"], **figures)
    assert list(row.cells()) == [
        *("toy", "fast", "4", "10.0 µs", "1,000 GB/s", "50%"),
        *("2.00x cuBLAS (20.0 µs)", "MISSED: cuBLAS 2.5"),
    ]


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

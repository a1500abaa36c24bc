"""What was measured before is found again, and only where it is about the same model."""

from pathlib import Path
from typing import Any

import pytest

from compressor.evaluate.perplexity import Estimate, EvaluationResult
from compressor.ir.layout import Linear
from compressor.ir.qtensor import NVFP4, QuantSpec
from compressor.ir.scheme import Scheme
from compressor.report.data import Costs, ReportData, write_report
from compressor.run.allocate import Group, Option, Sensitivity
from compressor.run.by_size import find_mixes, find_peers, sensitivity_file

SOURCE = {"name": "tiny", "content": "ab"}
LINEARS = [Linear(name, "mlp.up", 8, 4, "mlp.in") for name in ("a", "b")]
OPTIONS = (
    Option(bits=2, bits_per_weight=2.5, error=8.0),
    Option(bits=4, bits_per_weight=4.5, error=1.0),
    Option(bits=None, form="nvfp4", bits_per_weight=4.56, error=0.5),
    Option(bits=None, bits_per_weight=16.0, error=0.0),
)


def evaluated(perplexity: float = 12.0, kl: float = 0.25, **changes: Any) -> EvaluationResult:
    shape = {"windows": 2, "length": 8, "tokens": 14, **changes}
    found = Estimate(kl, 0.125)
    original = Estimate(perplexity, 1.0)
    return EvaluationResult(
        **shape, nll=original, perplexity=original, original_perplexity=original, kl=found
    )


def reported(folder: Path, evaluation: EvaluationResult | None, **changes: Any) -> None:
    folder.mkdir()
    costs = Costs(source_bytes=2000, output_bytes=500, host_bytes=1, seconds=1)
    data = {"title": folder.name, "recipe": {}, "source": SOURCE, "format": "dense"}
    data |= {"parameters": 1000, "estimates": costs, "spent": costs, **changes}
    write_report(folder, ReportData(evaluation=evaluation and evaluation.to_json(), **data))


def test_other_checkpoints_of_the_model_on_the_same_tokens_are_found(tmp_path: Path) -> None:
    ours = evaluated()
    reported(tmp_path / "this", ours)
    reported(tmp_path / "other", evaluated(perplexity=12.0001, kl=0.5))
    reported(tmp_path / "another-model", ours, source={"name": "tiny", "content": "cd"})
    reported(tmp_path / "another-text", evaluated(perplexity=13.0))
    reported(tmp_path / "fewer-windows", evaluated(windows=1))
    reported(tmp_path / "not-measured", None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text("{")
    (found,) = find_peers(tmp_path / "this", SOURCE, ours)
    assert (found.name, found.bits) == ("other", 4.0)
    assert found.kl == {"value": 0.5, "error": 0.125}
    assert find_peers(tmp_path / "this", SOURCE, None) == ()


def measured(output: Path, weights: int = 32) -> None:
    groups = tuple(Group(linears=(x.name,), weights=weights, options=OPTIONS) for x in LINEARS)
    said = Sensitivity(recipe={}, measure="a change", tokens=1, groups=groups)
    sensitivity_file(output).write_text(said.model_dump_json())


def integer(bits: int) -> Scheme:
    return Scheme(QuantSpec("int", bits, "group", 4))


@pytest.mark.parametrize(
    ("a", "b", "this"),
    [
        (integer(2), integer(4), (3.5, 9.0)),
        (Scheme(NVFP4), Scheme(), (10.28, 0.5)),
        (integer(3), integer(4), None),  # three bits were not measured
    ],
)
def test_the_mix_that_was_written_is_found_among_all(
    a: Scheme, b: Scheme, this: tuple[float, float] | None, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    measured(output)
    found = find_mixes(output, LINEARS, {"a": a, "b": b})
    assert found is not None and found.alike["2 bits"] == (2.5, 16.0)
    assert found.best[0] == (2.5, 16.0) and found.best[-1] == (16.0, 0.0)
    assert found.this == (pytest.approx(this) if this else None)


def test_sensitivities_of_another_model_are_left_alone(tmp_path: Path) -> None:
    output, schemes = tmp_path / "out", {"a": integer(2), "b": integer(2)}
    assert find_mixes(output, LINEARS, schemes) is None
    measured(output, weights=64)
    assert find_mixes(output, LINEARS, schemes) is None
    sensitivity_file(output).write_text("{}")
    assert find_mixes(output, LINEARS, schemes) is None

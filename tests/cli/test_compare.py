"""`compress compare`: figures that other commands and plain arithmetic give too, and the page."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import InputError
from compressor.ir.layout import weight_name
from compressor.report.comparison import page_of

SIZE = ("--windows", "2", "--length", "32", "--device", "cpu")


def compress(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture(scope="module")
def three(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A model and two ways of rounding it."""
    folder, model = tmp_path_factory.mktemp("compared"), tiny_model("llama")
    for scheme in ("w4a16", "w8a16"):
        words = ("--scheme", scheme, "--quality", "fast", "--set", "verify=false")
        made = compress("quantize", model, "-o", folder / scheme, *words, "--device", "cpu")
        assert made.exit_code == 0, made.output
    return model, folder / "w4a16", folder / "w8a16"


@pytest.fixture(scope="module")
def found(three: tuple[Path, Path, Path]) -> dict[str, Any]:
    result = compress("compare", three[1], three[0], three[2], "--json", *SIZE)
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_the_first_that_is_not_quantized_is_the_reference(
    found: dict[str, Any], three: tuple[Path, Path, Path]
) -> None:
    assert found["reference"] == three[0].name
    assert [side["reference"] for side in found["checkpoints"]] == [False, True, False]


def test_errors_by_layer_are_those_of_the_weights(
    found: dict[str, Any], three: tuple[Path, Path, Path]
) -> None:
    original, written = open_source(three[0]), open_source(three[1])
    unit = written.layout.blocks[1]
    old, new = (s.read_unit(unit).dequantized(torch.float64) for s in (original, written))
    layers = found["checkpoints"][0]["layers"]
    assert set(layers) == {x.name for x in written.layout.linears}
    for linear in unit.linears:
        a, b = (x[weight_name(linear.name)].double() for x in (old, new))
        assert layers[linear.name] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)


def test_an_evaluation_is_that_of_eval(
    found: dict[str, Any], three: tuple[Path, Path, Path]
) -> None:
    alone = compress("eval", three[1], "--against", three[0], "--json", *SIZE)
    expected, side = json.loads(alone.stdout), found["checkpoints"][0]["evaluation"]
    assert side["kl"] == expected["kl"] and side["perplexity"] == expected["perplexity"]
    finer = found["checkpoints"][2]["evaluation"]
    assert finer["kl"]["value"] < side["kl"]["value"]


def test_each_block_is_judged_on_the_references_states(found: dict[str, Any]) -> None:
    four, _, eight = found["checkpoints"]
    for coarse, fine in zip(four["blocks"], eight["blocks"], strict=True):
        assert coarse["block"] == fine["block"] and 0 < fine["error"] < coarse["error"]


def test_a_table_and_a_page_name_all(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "pages" / "compared.html"
    words = (three[1], three[2], "--against", three[0], "--html", page)
    result = compress("compare", *words, *SIZE)
    assert result.exit_code == 0, result.output
    first = result.stdout.splitlines()[1]
    assert first.startswith(f"{three[0].name} (reference)")
    assert "int4 by groups of 32, symmetric" in result.stdout
    text = page.read_text("utf-8")
    assert text.count("<svg") == 6, "three plots, for narrow screens and wide ones"
    assert "<h2>Quality by size</h2>" in text
    assert all(f"</i>{path.name}</span>" in text for path in three[1:])
    assert re.search(r"\d ± \d", text)


def test_kernels_are_a_table_where_they_were_timed(found: dict[str, Any]) -> None:
    times = {"attn.q": {1: 2.5, 16: 3.0}, "mlp.up": {1: 1.5, 16: 2.0}}
    timed = [{**side, "microseconds": times} for side in found["checkpoints"]]
    text = page_of(timed, text="")
    assert "<h2>Kernels</h2>" in text and '<td class="n">4</td>' in text


def test_without_an_unquantized_one_there_is_no_kl(three: tuple[Path, Path, Path]) -> None:
    result = compress("compare", three[1], three[2], "--weights-only", "--device", "cpu")
    assert result.exit_code == 0 and "--against ORIGINAL" in result.stderr
    told = compress("compare", *three[1:], "--weights-only", "--json", "--device", "cpu")
    plain = json.loads(told.stdout)
    assert plain["reference"] is None
    assert all(not s["layers"] and s["evaluation"] is None for s in plain["checkpoints"])


def test_another_model_is_said_to_be_one(
    three: tuple[Path, Path, Path], tiny_model: Callable[..., Path]
) -> None:
    other = tiny_model("llama", vocab_size=320)
    result = compress("compare", three[0], other, *SIZE)
    assert isinstance(result.exception, InputError)
    assert "do not read the same tokens" in str(result.exception)
    weights = compress("compare", three[0], other, "--weights-only", "--device", "cpu")
    assert weights.exit_code == 0 and "beyond rounding" in weights.stdout


def test_two_are_named(three: tuple[Path, Path, Path]) -> None:
    assert compress("compare", three[0]).exit_code == 2
    twice = compress("compare", three[0], three[0])
    assert isinstance(twice.exception, InputError) and "twice" in str(twice.exception)

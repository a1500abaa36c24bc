"""On a small trained model, each method is nearer to the original than what it improves on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.evaluate.perplexity import evaluate
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from tests.support.golden_files import trained_model

CPU = choose_device("cpu")
CACHE = {"kv_cache": {"element": "int4"}}


def naive(group_size: int | None) -> list[Any]:
    return [{"progressive": {"group_size": group_size, "gptq": False, "clip": False}}, CACHE]


def kl(passes: list[Any], output: Path, *, fmt: str) -> float:
    """KL of the original to the written model, in nats per token of held-out text."""
    model = trained_model("llama")
    data = {
        "model": str(model),
        "output": str(output),
        "calibration": {"samples": 16, "length": 256},
        "passes": passes,
        "format": fmt,
        "untie": True,
        "evaluate": {"windows": 4, "length": 512},
    }
    prepared = prepare(make_recipe(data), device=CPU)
    written = compile_checkpoint(prepared).output
    assert prepared.evaluation is not None
    found = evaluate(
        open_source(written),
        prepared.evaluation.ids,
        device=CPU,
        dtype=torch.float32,
        against=open_source(model),
    )
    assert found.kl is not None
    return found.kl.value


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_beats_rounding_to_nearest(bits: int, tmp_path: Path) -> None:
    grid = {"bits": bits, "group_size": 64}
    plain = kl([{"rtn": grid}], tmp_path / "rtn", fmt="compressed-tensors")
    ours = kl([{"gptq": grid}], tmp_path / "gptq", fmt="compressed-tensors")
    assert ours < 0.9 * plain, (ours, plain)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [64, None])
def test_qoq_beats_naive_w4a8kv4(group_size: int | None, tmp_path: Path) -> None:
    plain = kl(naive(group_size), tmp_path / "naive", fmt="qserve")
    ours = kl([{"qoq": {"group_size": group_size}}], tmp_path / "qoq", fmt="qserve")
    assert ours < 0.95 * plain, (ours, plain)

"""What a run makes ready on a GPU beforehand is what its first block uses."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.formats.base import ModelSchemes, get_format
from compressor.ir.layout import Linear
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.methods.awq.method import Awq
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.warm_up import warm_up
from compressor.verify.kernels.ahead import CompiledAhead, Wanted
from compressor.verify.kernels.layer import EVERYTHING

PACKED = get_format("compressed-tensors")

SPEC = QuantSpec(
    element="int",
    bits=4,
    strategy="group",
    group_size=32,
    scale_dtype=torch.bfloat16,
    zero="subtract",
)

SEARCH = """
import os, torch
from pathlib import Path
from compressor.numerics.awq_clip import search_clip_gram
from compressor.numerics.awq_search import search_scales_gram
from compressor.numerics.gram import relative_error
from compressor.methods.awq.method import Awq
from compressor_calibration.stats import SiteStats
from tests_spec import SPEC

def kernels():
    return set(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))

device = torch.device("cuda")
awq = Awq(bits=4, group_size=32, symmetric=False)
awq.compile_kernels({(SPEC, 96)}, device)
before = kernels()
for outputs, inputs in ((96, 96), (512, 1376), (64, 4096), (192, 576), (576, 1536)):
    weight, gram = torch.randn(outputs, inputs, device=device), torch.eye(inputs, device=device)
    SiteStats(inputs, awq.needs().stats, device=device).update(weight.bfloat16())
    search_scales_gram([weight.bfloat16()] * 2, gram, weight[0].abs(), SPEC)
    search_clip_gram(weight, gram, SPEC)
    relative_error(weight, 0.9 * weight, gram)
assert before and kernels() == before, (before, kernels())
"""


def test_nothing_is_started_for_a_cpu(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    output = tmp_path / "out"
    passes = [{"rtn": {"group_size": 32}}]
    recipe = make_recipe({"model": str(model), "output": str(output), "passes": passes})
    plan = make_plan(recipe, open_source(model), output=output)
    threads = threading.active_count()
    warm_up(plan, torch.device("cpu"))
    assert threading.active_count() == threads


def test_a_pass_searches_beforehand_by_any_of_its_specs() -> None:
    for spec in (SPEC, QuantSpec(element="int", bits=4, strategy="channel")):
        Awq(bits=4).compile_kernels({(spec, 96)}, torch.device("cpu"))


@pytest.mark.gpu
def test_kernels_compiled_beforehand_serve_every_shape(tmp_path: Path) -> None:
    """In a process of its own, since other tests leave compiled kernels behind."""
    (tmp_path / "tests_spec.py").write_text(
        f"import torch\nfrom compressor.ir.qtensor import QuantSpec\nSPEC = {SPEC!r}\n"
    )
    cache = tmp_path / "cache"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run(
        [sys.executable, "-c", SEARCH],
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)},
        check=True,
    )


def test_what_is_compiled_for_a_verdict_is_a_layer_of_every_scheme() -> None:
    """On a CPU nothing is compiled; what would be runs through the plain reference there."""
    ahead = CompiledAhead(Wanted((), PACKED, torch.bfloat16, torch.device("cpu")))
    int8 = QuantSpec(element="int", bits=8, strategy="channel", scale_dtype=torch.bfloat16)
    inputs = ActivationSpec(element="int8", mode="token")
    for scheme, name in ((Scheme(SPEC), "w4a16"), (Scheme(int8, inputs), "w8a8")):
        check, layer = ahead.stand_in(scheme, (64, 96))
        assert check.name == name
        made = check.reference(
            replace(layer, weight=layer.weight.double()), torch.ones(1, 96), EVERYTHING
        )
        assert made.found.shape == (1, 64) and not made.found.any()


def test_a_layer_without_a_kernel_is_left_out() -> None:
    linears = [Linear(n, "mlp.up", 64, 96, "mlp.in") for n in ("packed", "plain", "again")]
    schemes = {"packed": Scheme(SPEC), "plain": Scheme(), "again": Scheme(SPEC)}
    wanted = Wanted.of(
        linears,
        ModelSchemes(linears=schemes),
        format=PACKED,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert wanted.layers == ((Scheme(SPEC), (64, 96)),)
    assert not CompiledAhead(wanted).coming  # a CPU has nothing to compile

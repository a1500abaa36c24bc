"""An attention policy from a recipe to a generating model: with W4 weights and an 8-bit cache in
one run, carried by later runs and conversions, checked, shown, exported."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from compressor.attention.policy import policy_files, read_policy, read_policy_tensors
from compressor.attention.rules.streaming import streaming_heads
from compressor.attention.serve import attach
from compressor.checkpoint.delta.source import open_delta
from compressor.checkpoint.find import locate
from compressor.checkpoint.manifest import read_manifest
from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import InputError, Problems
from compressor.evaluate.perplexity import evaluate
from compressor.plan.recipe import make_recipe
from compressor.report.attention import attention
from compressor.run.convert import convert
from compressor.run.delta import apply_delta
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.verify import verify

CPU = choose_device("cpu")
DATA = {
    "keys": 2, "words": 1, "min_length": 180, "max_length": 200, "lengths": 2, "prefix": "",
    "suffix": "", "separator": "", "needle": " {ordinal} key: {passkey}.",
    "question": " {ordinal}? {passkey}",
}  # fmt: skip
DUO = {"duo_attention": {"data": DATA, "sinks": 2, "window": 8, "num_steps": 2}}
FILES = ("attention_policy.json", "attention_policy.safetensors")


def run(model: Path, output: Path, passes: list[Any], **top: Any) -> Path:
    data = {"model": str(model), "output": str(output), "passes": passes, **top}
    data.setdefault("calibration", {"samples": 8, "length": 64})
    return compile_checkpoint(prepare(make_recipe(data), device=CPU)).output


@pytest.fixture(scope="module")
def composed(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AWQ W4, head gates and an int8 cache, in one recipe and one run."""
    output = tmp_path_factory.mktemp("composed") / "out"
    passes = [DUO, {"awq": {"bits": 4, "group_size": 32}}, {"kv_cache": {"element": "int8"}}]
    return run(tiny_model("llama"), output, passes)


def nll(folder: Path, **options: Any) -> float:
    ids = torch.randint(2, 256, (2, 60), generator=torch.Generator().manual_seed(3))
    found = evaluate(open_source(folder), ids, device=CPU, dtype=torch.float32, **options)
    return found.nll.value


def test_weights_gates_and_cache_are_one_run(composed: Path, tmp_path: Path) -> None:
    source = open_source(composed)
    policy = read_policy(composed)
    assert policy is not None and streaming_heads(policy).float().mean() == 0.5
    assert source.quantized and source.schemes.kv is not None
    assert source.schemes.kv.element == "int8"
    assert read_policy_tensors(composed)["duo_attention.gates"].shape == (2, 2)
    manifest = read_manifest(composed)
    assert manifest is not None and set(FILES) <= set(manifest.files)
    report = verify(composed, device=CPU)
    assert report.ok, report.damage
    assert any(
        c.name == "attention policy" and "2 of 4 KV heads" in c.detail for c in report.checks
    )
    assert any(
        c.name == "attention thresholds" and "as recorded" in c.detail for c in report.checks
    )
    # Evaluation applies all three: each alone gives something else.
    both, without = nll(composed), nll(composed, attention=lambda unit: None)
    assert abs(both - without) > 1e-4


PAGES = {"lserve": {"page": 8, "logical": 2, "budget": 24, "reuse": 2}}


def test_pages_weights_and_cache_are_one_run(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """LServe's pages beside streaming heads, AWQ and an int8 cache, as its recipe has them."""
    passes = [DUO, PAGES, {"awq": {"bits": 4, "group_size": 32}}, {"kv_cache": {"element": "int8"}}]
    output = run(tiny_model("llama"), tmp_path / "out", passes)
    source, policy = open_source(output), read_policy(output)
    assert policy is not None and set(policy.made_by) == {"duo_attention", "lserve"}
    assert source.quantized and source.schemes.kv is not None
    report = verify(output, device=CPU)
    assert report.ok, report.damage
    said = {check.name: check.detail for check in report.checks}
    assert (
        "2 of 4 KV heads" in said["attention policy"]
        and "by LServe's bounds of 2 keys" in said["attention policy"]
    )
    assert "as recorded" in said["attention thresholds"]
    assert abs(nll(output) - nll(output, attention=lambda unit: None)) > 1e-4


def test_rules_that_leave_each_other_no_head_are_refused_before_a_run(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    slots, text = ({"streaming": {"window": 16, "sinks": 2, **more}}
                   for more in ({}, {"positions": "text"}))  # fmt: skip
    memory = {"infllm_memory": {"local": 32, "piece": 8, "init": 4, "block": 8, "top_k": 2}}
    tiles = {"xattention": {"block_size": 16, "stride": 4, "threshold": 0.9}}
    drafts = {"sparse_spec": {"min_budget": 8, "stride": 2}}
    for passes, message in (
        ([slots, PAGES], "lserve would decide nothing: every KV head attends by streaming"),
        ([text, tiles], "xattention would decide nothing"),
        ([text, PAGES], "lserve would decide nothing"),
        ([memory, drafts], "slot positions need every head streaming"),
        ([memory, PAGES], "lserve and infllm_memory are for the same heads"),
        ([tiles, {"moba": {}}], "not trained with MoBA"),
    ):
        with pytest.raises(Problems, match=message):
            run(model, tmp_path / "out", passes, format="dense")
    assert not (tmp_path / "out").exists()


def test_the_report_shows_heads_and_pictures(composed: Path) -> None:
    page = attention(composed)
    assert "2 of 4 KV heads streaming" in page
    for name in ("duo_attention_gates", "duo_attention_losses"):
        data = base64.b64encode((composed / "plots" / f"{name}.png").read_bytes()).decode()
        assert data in page
    assert attention(composed.parent) == ""


def test_a_recipe_with_a_policy_is_repeatable(
    composed: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    passes = [DUO, {"awq": {"bits": 4, "group_size": 32}}, {"kv_cache": {"element": "int8"}}]
    again = run(tiny_model("llama"), tmp_path / "again", passes)
    for name in (*FILES, "manifest.json"):
        assert (again / name).read_bytes() == (composed / name).read_bytes(), name


@pytest.fixture(scope="module")
def gated(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with head gates."""
    output = tmp_path_factory.mktemp("gated") / "out"
    return run(tiny_model("llama", dtype=torch.bfloat16), output, [DUO], format="dense")


CARRYING: dict[str, tuple[list[Any], str]] = {
    "rtn": ([{"rtn": {"bits": 4, "group_size": 32}}], "compressed-tensors"),
    "awq": ([{"awq": {"bits": 4, "group_size": 32, "symmetric": False}}], "autoawq"),
    "gptq": ([{"gptq": {"bits": 4, "group_size": 32}}], "gptq"),
    "gptq-v2": ([{"rotate": {}}, {"gptq": {"bits": 4, "group_size": 32}}], "gptq-v2"),
    "smoothquant": ([{"smoothquant": {"bits": 8}}], "compressed-tensors"),
    "fp8": (["fp8"], "compressed-tensors"),
    "modelopt-fp8": ([{"fp8": {"scales": "static"}}], "modelopt-fp8"),
    "nvfp4": (["nvfp4"], "compressed-tensors"),
    "modelopt-nvfp4": (["nvfp4"], "modelopt-nvfp4"),
    "qoq": ([{"qoq": {"group_size": 32}}], "qserve"),
}


@pytest.mark.parametrize("name", CARRYING)
def test_every_quantization_and_conversion_carries_it(
    name: str, gated: Path, tmp_path: Path
) -> None:
    passes, format = CARRYING[name]
    output = run(gated, tmp_path / "out", passes, format=format)
    for file in FILES:
        assert (output / file).read_bytes() == (gated / file).read_bytes()
    report = verify(output, device=CPU)
    assert report.ok, report.damage
    assert any(check.name == "attention policy" for check in report.checks)
    dense = convert(locate(str(output), fetch=True), tmp_path / "dense", format="dense").output
    assert read_policy(dense) == read_policy(gated)
    manifest = read_manifest(dense)
    assert manifest is not None and set(FILES) <= set(manifest.files)


def test_a_delta_of_a_gated_fine_tune_carries_it(
    gated: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("llama", dtype=torch.bfloat16, seed=1)
    delta = run(gated, tmp_path / "delta", [{"bitdelta": {"base": str(base), "distill": "none"}}])
    report = verify(delta, base=str(base), device=CPU)
    assert report.ok and any(check.name == "attention policy" for check in report.checks)
    apply_delta(open_delta(delta), open_source(base), tmp_path / "dense")
    for file in FILES:
        assert (tmp_path / "dense" / file).read_bytes() == (gated / file).read_bytes()


def test_a_second_decision_is_refused(gated: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both decide `streaming`"):
        run(gated, tmp_path / "twice", [{"streaming": {"window": 64}}], format="dense")


def test_damage_and_other_models_are_told(
    composed: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = run(tiny_model("llama"), tmp_path / "own", [{"streaming": {"window": 64}}],
                 format="dense")  # fmt: skip
    policy = read_policy(folder)
    assert policy is not None and policy.positions == "slot"
    (folder / "manifest.json").unlink()
    wrong = policy.model_copy(update={"layers": policy.layers[:1]})
    for name, data in policy_files(wrong).items():
        (folder / name).write_bytes(data)
    report = verify(folder, device=CPU)
    assert not report.ok and any("for 1 layers, the model has 2" in d for d in report.damage)
    for name, data in policy_files(policy, {"x.y": torch.full((2, 1), torch.nan)}).items():
        (folder / name).write_bytes(data)
    assert any("NaN" in d for d in verify(folder, device=CPU).damage)
    with pytest.raises(Problems, match="rotary"):
        run(tiny_model("opt"), tmp_path / "opt", [{"streaming": {}}], format="dense")
    with pytest.raises(Problems, match="20 sinks are not fewer"):
        run(tiny_model("llama"), tmp_path / "bad", [{"streaming": {"sinks": 20, "window": 20}}])


def test_sorted_heads_are_the_same_model(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Heads sorted in the weights give what the unsorted ones give under their own policy."""
    model = tiny_model("llama")
    plain = run(model, tmp_path / "plain", [DUO], format="dense")
    moved = run(
        model, tmp_path / "moved", [{"duo_attention": {**DUO["duo_attention"], "reorder": True}}],
        format="dense",
    )  # fmt: skip
    policy = read_policy(moved)
    assert policy is not None and policy.reordered
    mask = streaming_heads(policy)
    assert torch.equal(mask, mask.sort(dim=1).values), "full heads come first"
    assert nll(moved) == pytest.approx(nll(plain), abs=1e-5)
    assert verify(moved, device=CPU).ok


def test_the_command_line_shows_and_exports(composed: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(cli, ["policy", "show", str(composed)])
    assert "2 of 4 KV heads streaming (2 sinks + 8 recent; positions by text)" in shown.output
    inspected = runner.invoke(cli, ["inspect", str(composed)])
    assert "attention   2 of 4 KV heads streaming" in inspected.output
    assert "left out" not in inspected.output
    (tmp_path / "video").mkdir()
    for file in composed.iterdir():
        if file.is_file():
            (tmp_path / "video" / file.name).symlink_to(file)
    sizes = {"sink": 4, "window": 8, "text_rounds": 2, "vision_rounds": 3}
    (tmp_path / "video" / "stream_policy.json").write_text(json.dumps(sizes))
    inspected = runner.invoke(cli, ["inspect", str(tmp_path / "video")])
    assert "of a video stream stay 4 first and 8 last tokens" in inspected.output
    data = json.loads(runner.invoke(cli, ["policy", "show", str(composed), "--json"]).output)
    assert data["ok"] and data["version"] == 1
    out = tmp_path / "duo"
    assert runner.invoke(cli, ["policy", "export", str(composed), str(out)]).exit_code == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["sink_size"], config["recent_size"], config["sparsity"]) == (2, 8, 0.5)
    # As the readers do it: a quantile of all values.
    values = np.loadtxt(out / "full_attention_heads.tsv", delimiter="\t")
    full = values >= np.quantile(np.clip(values, 0, 1), config["sparsity"])
    policy = read_policy(composed)
    assert policy is not None and (full == ~streaming_heads(policy).numpy()).all()
    again = runner.invoke(cli, ["policy", "export", str(composed), str(out)])
    assert isinstance(again.exception, InputError)
    other = runner.invoke(cli, ["policy", "export", str(composed), str(out), "--form", "other"])
    assert isinstance(other.exception, InputError) and "duo-attention" in str(other.exception.hint)


@pytest.mark.interop
def test_the_composed_checkpoint_generates_in_transformers(composed: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(composed, dtype=torch.float32).eval()
    runtime = attach(model)
    ids = torch.randint(2, 256, (1, 50), generator=torch.Generator().manual_seed(3))
    small = runtime.options()
    (cache,) = small.values()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **small, **options)
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(out, whole)
    assert cache.nbytes == runtime.policy.cached_tokens(57) * 2 * 16 * 4
    # Keys and values are rounded as the files say, with a cache and without: it is our evaluation.
    ids, half = torch.randint(2, 256, (2, 60), generator=torch.Generator().manual_seed(3)), 30
    with torch.no_grad():
        text = runtime.options()
        parts = [model(part, **text).logits for part in (ids[:, :half], ids[:, half:])]
        for logits in (model(ids, use_cache=False).logits, torch.cat(parts, 1)):
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
            assert float(loss) == pytest.approx(nll(composed), abs=1e-5)

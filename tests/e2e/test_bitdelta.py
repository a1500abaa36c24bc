"""Deltas from end to end: written, opened with their base, applied, verified, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from compressor.checkpoint.delta.base import Base
from compressor.checkpoint.delta.source import merged_source, open_delta, open_model
from compressor.checkpoint.reader import Checkpoint, open_checkpoint
from compressor.checkpoint.safetensors import Entry
from compressor.checkpoint.source import as_source, open_source
from compressor.errors import InputError, Problems
from compressor.ir.tensor import TensorShape
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.delta import apply_delta
from compressor.run.session import compile_checkpoint, prepare
from compressor.verify.verify import verify
from tests.support.delta_pairs import CPU, Pair, pairs, prepared, run, tensors_of
from tests.support.scripts import load


@pytest.fixture
def pair(tiny_model: Callable[..., Path], tmp_path: Path) -> Pair:
    return pairs(tiny_model, tmp_path)


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "opt",
        "gemma",
        "gemma2",
        "mixtral",
        "qwen3_moe",
    ],
)
def test_a_delta_is_signs_on_top_of_the_base_and_everything_else_in_full(
    model_type: str, pair: Pair, tmp_path: Path
) -> None:
    base, fine = pair(model_type, dtype=torch.bfloat16)
    output = run(base, fine, tmp_path / "delta")
    stored, before, wanted = tensors_of(output), tensors_of(base), tensors_of(fine)
    merged = open_model(output, base=str(base))
    found: dict[str, torch.Tensor] = {}
    for unit in merged.layout.units:
        found |= merged.read_unit(unit).tensors
    assert set(found) == set(wanted)
    coded = {name.rpartition(".")[0] for name in stored if name.endswith("delta_signs")}
    inside = {x.name for u in merged.layout.units[1:-1] for x in u.linears if x.role != "router"}
    assert coded == inside
    for name, tensor in wanted.items():
        path = name.rpartition(".")[0]
        if path in coded and name.endswith(".weight"):
            delta = tensor.float() - before[name].float()
            scale = delta.double().abs().mean().float()
            expected = torch.where(delta >= 0, 1.0, -1.0) * scale
            assert torch.equal(found[name], (before[name].float() + expected).to(tensor.dtype))
            assert name not in stored
        else:  # biases, norms, embeddings, routers
            assert torch.equal(stored[name], tensor) and torch.equal(found[name], tensor)
    if model_type == "opt":
        report = verify(output, base=str(base), against=open_source(fine), device=CPU)
        assert report.ok, report.damage
        assert {layer.linear for layer in report.layers if layer.kernel} == coded


def test_applied_it_loads_in_transformers_with_the_same_logits(pair: Pair, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, fine = pair("qwen2")
    output = run(base, fine, tmp_path / "delta", bits=4)
    apply_delta(open_delta(output), open_source(base), tmp_path / "dense")
    ids = torch.arange(2, 34)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        for folder in (base, fine, tmp_path / "dense")
    ]
    near, far = ((other - logits[1]).norm() for other in (logits[2], logits[0]))
    assert near < 0.8 * far
    AutoTokenizer.from_pretrained(tmp_path / "dense")
    again = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "dense").iterdir()}
    apply_delta(open_delta(output), open_source(base), tmp_path / "dense")
    assert again == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "dense").iterdir()}


@pytest.mark.parametrize(
    ("family", "ignored"), [("gpt_oss", []), ("gpt_oss", ["expert.*"]), ("gpt2", [])]
)
def test_weights_that_files_hold_otherwise_come_back_so(
    family: str, ignored: list[str], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts in a stack, and linears stored [in, out]; a base's stack that stays is written."""
    size = {"num_hidden_layers": 1, **({"num_local_experts": 2} if family == "gpt_oss" else {})}
    fine, base = (tiny_model(family, seed=seed, **size) for seed in (0, 1))
    passes = [{"bitdelta": {"base": str(base), "distill": "none", "ignore": ["lm_head", *ignored]}}]
    recipe = {"model": str(fine), "output": str(tmp_path / "delta"), "passes": passes}
    recipe |= {"format": "bitdelta", "verify": False}
    delta = compile_checkpoint(prepare(make_recipe(recipe), device=CPU)).output
    assert verify(delta, base=str(base), device=CPU).ok
    opened = open_delta(delta)
    assert any(name.split(".")[-1] in ("gate_proj", "c_fc") for name in opened.bits) != bool(
        ignored
    )
    apply_delta(opened, open_source(base), tmp_path / "dense")
    assert set(open_checkpoint(tmp_path / "dense").entries) == set(open_checkpoint(fine).entries)
    source, written = open_source(tmp_path / "dense"), open_model(delta, base=str(base))
    for unit in source.layout.units:
        found, expected = source.read_unit(unit).tensors, written.read_unit(unit).tensors
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_inputs_that_fill_no_whole_word_are_padded(pair: Pair, tmp_path: Path) -> None:
    base, fine = pair("llama", hidden_size=40, intermediate_size=72)
    output = run(base, fine, tmp_path / "delta")
    assert tensors_of(output)["model.layers.0.mlp.down_proj.delta_signs"].shape == (1, 3, 40)
    assert verify(output, base=str(base), device=CPU).ok


def test_what_the_base_has_costs_nothing(pair: Pair, tmp_path: Path) -> None:
    base, fine = pair("llama", only=("layers.1.self_attn", "layers.1.post"))
    output = run(base, fine, tmp_path / "delta")
    names = {"model.layers.1.post_attention_layernorm.weight"} | {
        f"model.layers.1.self_attn.{x}_proj.{leaf}"
        for x in "qkvo"
        for leaf in ("delta_signs", "delta_scales")
    }
    assert set(tensors_of(output)) == names
    same = run(base, base, tmp_path / "same")
    assert not tensors_of(same)
    merged = open_model(same, base=str(base))
    for unit in merged.layout.units:
        for name, tensor in merged.read_unit(unit).tensors.items():
            assert torch.equal(tensor, tensors_of(base)[name])


def test_vocabulary_and_rotary_changes_survive(
    pair: Pair, tiny_models: ModuleType, tmp_path: Path
) -> None:
    base, _ = pair("llama")
    longer = tiny_models.build("llama", tmp_path / "longer", vocab_size=264, rope_theta=5e5, seed=3)
    output = run(base, longer, tmp_path / "delta")
    config = open_model(output, base=str(base)).checkpoint.config
    expected = json.loads((longer / "config.json").read_text())
    for key in ("vocab_size", "rope_parameters", "rope_theta", "max_position_embeddings"):
        assert config.get(key) == expected.get(key)
    assert (output / "tokenizer.json").read_bytes() == (longer / "tokenizer.json").read_bytes()
    assert tensors_of(output)["lm_head.weight"].shape == (264, 64)
    with pytest.raises(Problems, match="vocabulary was resized"):
        prepared(base, longer, tmp_path / "head", targets=["linear"], ignore=[])


def test_each_bit_leaves_less(pair: Pair, tmp_path: Path) -> None:
    base, fine = pair("llama")
    left = []
    for bits in (1, 2, 3, 4):
        done = compile_checkpoint(prepared(base, fine, tmp_path / f"{bits}", bits=bits))
        left.append([row["left"] for unit in done.units for row in unit.rows])
    for more, fewer in zip(left[1:], left, strict=False):
        assert all(a < 0.95 * b for a, b in zip(more, fewer, strict=True))


QUANTIZED: dict[str, tuple[Any, str]] = {
    "compressed-tensors": ({"rtn": {"bits": 4, "group_size": 32}}, "weight_packed"),
    "autoawq": ({"rtn": {"bits": 4, "group_size": 32, "symmetric": False}}, "qweight"),
    "gptq": ({"rtn": {"bits": 4, "group_size": 32}}, "qweight"),
    "qserve": ({"progressive": {"group_size": 32}}, "qweight"),
    "modelopt-nvfp4": ("nvfp4", "weight_scale_2"),
}


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_quantized_base_is_taken_as_what_its_codes_stand_for(
    format: str, pair: Pair, tmp_path: Path
) -> None:
    base, fine = pair("llama", dtype=torch.bfloat16)
    how, leaf = QUANTIZED[format]
    recipe = make_recipe(
        {
            "model": str(base),
            "output": str(tmp_path / "low"),
            "calibration": {"samples": 8, "length": 32},
            "passes": [how],
            "format": format,
        }
    )
    low = compile_checkpoint(prepare(recipe, device=CPU)).output
    output = run(low, fine, tmp_path / "delta")
    record = json.loads((output / "base.json").read_text())
    name = "model.layers.0.mlp.up_proj"
    assert f"{name}.{leaf}" in record["tensors"]
    source = open_source(low)
    weight = source.read_unit(source.layout.units[1]).dequantized()[f"{name}.weight"].float()
    delta = tensors_of(fine)[f"{name}.weight"].float() - weight
    expected = weight + torch.where(delta >= 0, 1.0, -1.0) * delta.abs().mean()
    merged = open_model(output, base=str(low))
    found = merged.read_unit(merged.layout.units[1]).tensors[f"{name}.weight"]
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)
    assert verify(output, base=str(low), against=open_source(fine), device=CPU).ok
    with pytest.raises(InputError, match="is not the base of this delta"):
        open_model(output, base=str(base))


def test_a_base_that_is_more_than_rounded_is_told(pair: Pair, tmp_path: Path) -> None:
    base, fine = pair("llama", dtype=torch.bfloat16)
    notes = []
    for name in ("rtn", "awq"):
        recipe = make_recipe(
            {
                "model": str(base),
                "output": str(tmp_path / name),
                "calibration": {"samples": 8, "length": 32},
                "passes": [{name: {"bits": 4, "group_size": 32}}],
            }
        )
        low = compile_checkpoint(prepare(recipe, device=CPU)).output
        notes.append(prepared(low, fine, tmp_path / "delta").plan.notes)
    assert any("made by awq, which also moves factors" in note for note in notes[1])
    assert not any("moves factors" in note for note in notes[0])


def test_what_is_wrong_is_said(pair: Pair, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base, fine = pair("llama")
    output = run(base, fine, tmp_path / "delta")
    with pytest.raises(InputError, match="is not the base of this delta"):
        apply_delta(open_delta(output), open_source(fine), tmp_path / "a")
    with pytest.raises(InputError, match="is not the base of this delta: it is a mistral"):
        merged_source(open_delta(output), open_source(tiny_model("mistral")))
    with pytest.raises(InputError, match="means nothing without its base"):
        open_source(output)
    with pytest.raises(InputError, match=r"the base of this delta, llama.*is not at"):
        open_model(output)
    with pytest.raises(InputError, match="is not a delta"):
        open_delta(base)
    with pytest.raises(Problems, match="the base is a mistral, the fine-tune a llama"):
        prepared(tiny_model("mistral"), fine, tmp_path / "b")
    with pytest.raises(Problems, match="cannot be written as dense"):
        prepared(base, fine, tmp_path / "b", top={"format": "dense"})
    with pytest.raises(InputError, match="base: there is no model"):
        prepared(tmp_path / "nowhere", fine, tmp_path / "b")
    for read in (base, fine):
        with pytest.raises(Problems, match="lies in the folder of the model"):
            prepared(base, fine, read / "b")
    with pytest.raises(InputError, match="lies in the folder of the model"):
        apply_delta(open_delta(output), open_source(base), base / "b")
    recipe = {"model": str(fine), "output": str(tmp_path / "b"), "format": "bitdelta"}
    two = [{"rtn": {"targets": "attn.q"}}, {"bitdelta": {"base": str(base), "distill": "none"}}]
    with pytest.raises(Problems, match="no other pass"):
        make_plan(make_recipe({**recipe, "passes": two}), open_source(fine))
    with pytest.raises(Problems, match="holds what the pass bitdelta makes"):
        make_plan(
            make_recipe({**recipe, "passes": [{"rtn": {"group_size": 32}}]}), open_source(fine)
        )
    tensors = tensors_of(output)
    for lost in ("model.norm.weight", "model.layers.0.mlp.up_proj.delta_scales"):
        kept = {name: tensor for name, tensor in tensors.items() if name != lost}
        broken = tmp_path / lost
        shutil.copytree(output, broken)
        (broken / "model.safetensors.index.json").unlink()
        save_file(kept, broken / "model.safetensors")
        with pytest.raises(InputError, match=f"lacks .*{lost}"):
            open_model(broken, base=str(base))
        report = verify(broken, base=str(base), device=CPU)
        assert not report.ok and any(lost in text for text in report.damage)


def test_one_flipped_sign_is_found_and_named(pair: Pair, tmp_path: Path) -> None:
    base, fine = pair("llama")
    output = run(base, fine, tmp_path / "delta")
    tensors = tensors_of(output)
    name = "model.layers.1.mlp.gate_proj.delta_signs"
    tensors[name][0, 1, 5] ^= 1 << 9
    save_file(tensors, output / "model.safetensors")
    report = verify(output, base=str(base), device=CPU)
    assert f"{name} is not what was written" in report.damage


def test_ten_times_smaller_at_the_shapes_of_llama_2_7b() -> None:
    """Of headers alone: nothing of this size is ever allocated."""
    module = load("scripts/make_random_model.py")
    config = module.SHAPES["7b"]
    shapes = module.shapes_of(config, 32)
    entries = {
        name: Entry(
            Path("none"), TensorShape(torch.bfloat16, shape), 0, 2 * torch.Size(shape).numel()
        )
        for name, shape in shapes.items()
    }
    source = as_source(Checkpoint(Path("llama-2-7b"), config, entries))
    recipe = make_recipe(
        {"model": "fine", "output": "out", "passes": [{"bitdelta": {"base": "llama-2-7b"}}]}
    )
    plan = make_plan(recipe, source, base=Base(source, {"name": "llama-2-7b"}))
    assert source.checkpoint.nbytes / plan.shards.size > 10
    assert plan.shards.size == pytest.approx(1.334e9, rel=1e-3)


def test_commands(pair: Pair, tmp_path: Path) -> None:
    from compressor.cli.main import cli

    base, fine = pair("llama")
    output = run(base, fine, tmp_path / "delta", bits=2)
    runner = CliRunner()

    def call(*arguments: str) -> str:
        result = runner.invoke(cli, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    text = call("delta", "diff", str(output), "--base", str(base))
    assert "14 linears as signs" in text and "2 x 2 bit" in text and "of the weight" in text
    assert "14 linears as signs" in call("inspect", str(output))
    found = json.loads(call("delta", "diff", str(output), "--json"))
    assert len(found["linears"]["model.layers.0.mlp.up_proj"]["scales"]) == 2
    dense = tmp_path / "dense"
    applied = json.loads(call("delta", "apply", str(base), str(output), str(dense), "--json"))
    assert applied["bytes"] == open_source(dense).checkpoint.nbytes
    options = ["--windows", "2", "--length", "16", "--device", "cpu", "--json"]
    values = [
        json.loads(call("eval", str(folder), *more, *options))["perplexity"]["value"]
        for folder, more in ((output, ["--base", str(base)]), (dense, []))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    # Beside the delta, the base is found by its recorded name.
    shutil.copytree(base, tmp_path / base.name)
    call("verify", str(output), "--device", "cpu")


def test_each_row_of_a_batch_generates_with_its_own_fine_tune(
    tiny_models: ModuleType, tmp_path: Path
) -> None:
    """The example's rows equal the dense fine-tunes, one of them with a longer vocabulary."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    example = load("docs/examples/multi_tenant.py")
    base = tiny_models.build("qwen2", tmp_path / "base", attention_bias=True)
    deltas, dense = [], []
    for number, vocabulary in enumerate((256, 264)):
        name = f"fine{number}"
        fine = tiny_models.build("qwen2", tmp_path / name, vocab_size=vocabulary, seed=number + 1)
        deltas.append(run(base, fine, tmp_path / f"{name}-delta", bits=number + 1))
        apply_delta(open_delta(deltas[-1]), open_source(base), tmp_path / f"{name}-dense")
        dense.append(tmp_path / f"{name}-dense")
    model = example.load_tenants(base, deltas, device=CPU, dtype=torch.float32)
    ids = torch.arange(4, 24)[None].repeat(2, 1)
    logits = model(ids).logits
    singles = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in dense]
    for row, single in enumerate(singles):
        expected = single(ids[:1]).logits[0]
        found = logits[row][:, : expected.shape[1]]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert bool((logits[row][:, expected.shape[1] :] == -torch.inf).all())
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in deltas]
    prompts = ["abcdef", "xy"]
    texts = example.generate(model, tokenizers, prompts, max_new_tokens=4)
    for text, single, tokenizer, prompt in zip(texts, singles, tokenizers, prompts, strict=True):
        out = single.generate(
            **{
                k: v
                for k, v in tokenizer(prompt, return_tensors="pt").items()
                if k != "token_type_ids"
            },
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
        assert text == tokenizer.decode(out[0][len(tokenizer(prompt).input_ids) :])

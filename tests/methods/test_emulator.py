"""Emulators: which blocks are kept, checkpoints that others load, and what they learn."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.arch.kept_blocks import kept_config
from compressor.arch.load import load_map
from compressor.checkpoint.offsite import read_offsite_record
from compressor.checkpoint.source import open_source
from compressor.errors import CheckError, InputError, Interrupted, Problems
from compressor.evaluate.perplexity import evaluate
from compressor.plan.recipe import make_recipe
from compressor.run.judge import judge
from compressor.run.session import Compiled, compile_checkpoint, prepare
from compressor.verify.verify import verify

CPU = torch.device("cpu")
BLOCKS = 6


def run(
    folder: Path, output: Path, emulator: dict[str, Any], *more: Any, **recipe: Any
) -> Compiled:
    """Run a recipe whose first pass is the emulator."""
    made = {
        "model": str(folder),
        "output": str(output),
        "passes": [{"emulator": emulator}, *more],
        "format": "dense",
        "calibration": {"samples": 8, "length": 32},
        **recipe,
    }
    return compile_checkpoint(prepare(make_recipe(made), device=CPU))


def logits(folder: Path) -> torch.Tensor:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids = torch.arange(3, 51).reshape(2, 24)
    with torch.no_grad():
        # With a cache, which numbers blocks.
        out: torch.Tensor = model.eval()(ids, use_cache=True).logits
    return out


def shortened(folder: Path, kept: tuple[int, ...], layers: str) -> torch.Tensor:
    """Logits of the full model in memory with some of its blocks cut out by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    path, _, leaf = layers.rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, leaf, torch.nn.ModuleList(getattr(parent, leaf)[i] for i in kept))
    text = model.config.get_text_config()
    types = getattr(text, "layer_types", None)
    text.num_hidden_layers = len(kept)
    if types:
        text.layer_types = [types[i] for i in kept]
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(3, 51).reshape(2, 24), use_cache=False).logits
    return out


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", "model.layers"),
        ("gemma2", "model.layers"),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
        ("mixtral", "model.layers"),
        ("qwen3_moe", "model.layers"),
        ("gpt_oss", "model.layers"),
    ],
)
def test_an_emulator_is_a_checkpoint_that_others_load(
    family: str, layers: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Renumbered blocks and a config that goes with them: gemma2 and gpt_oss have two kinds of
    attention, the last three experts, one of them stacked on disk."""
    folder = tiny_model(family, num_hidden_layers=BLOCKS)
    run(folder, tmp_path / "out", {"pads": [1, 1], "keep": 2})
    kept = (0, 1, 4, 5)
    record = read_offsite_record(tmp_path / "out")
    assert record is not None and record.kept == kept and record.blocks == BLOCKS
    assert torch.equal(logits(tmp_path / "out"), shortened(folder, kept, layers))


DISTILL = {"steps": 40, "batch": 4, "lr": 3e-3}


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", num_hidden_layers=BLOCKS)


def test_distilling_brings_the_middle_nearer(llama: Path, tmp_path: Path) -> None:
    """Only the middle changes, and it verifies against the full model."""
    emulator = {"pads": [1, 1], "keep": 2, "distill": DISTILL}
    done = run(llama, tmp_path / "out", emulator)
    (row,) = done.learned[0].result.rows
    assert row["loss_after"] < row["loss_before"]
    run(llama, tmp_path / "dropped", {"pads": [1, 1], "keep": 2})
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "dropped"))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {n for n in one if n.startswith(("model.layers.1.", "model.layers.2."))}
    for output, against in ((tmp_path / "out", llama), (tmp_path / "dropped", llama)):
        report = verify(output, against=against, device=CPU)
        assert report.ok, report
    damaged = {**one, "model.norm.weight": one["model.norm.weight"] * 2}
    save_file(damaged, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert not verify(tmp_path / "out", against=llama, device=CPU).ok


def test_an_emulator_with_every_block_is_the_model(llama: Path, tmp_path: Path) -> None:
    done = run(llama, tmp_path / "out", {"pads": [1, 1], "keep": 4, "distill": DISTILL})
    (row,) = done.learned[0].result.rows
    assert row["loss_before"] == row["loss_after"] == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", llama))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_distillation_continues(llama: Path, tmp_path: Path) -> None:
    """It is stopped twice, once while the whole model runs, and gives the same bytes."""
    emulator = {"pads": [1, 1], "keep": 2, "distill": DISTILL}
    whole = run(llama, tmp_path / "whole", emulator)
    recipe = {
        "model": str(llama),
        "output": str(tmp_path / "out"),
        "passes": [{"emulator": emulator}],
        "format": "dense",
        "calibration": {"samples": 8, "length": 32},
    }
    prepared = prepare(make_recipe(recipe), device=CPU)
    for most in (12, 45):
        asked = iter([False] * most)
        with pytest.raises(Interrupted):
            compile_checkpoint(prepared, stopping=partial(next, asked, True))
    steps: list[str] = []
    done = compile_checkpoint(prepared, on_step=lambda name, done, total: steps.append(name))
    assert 0 < sum(name.startswith("distill") for name in steps) < DISTILL["steps"]
    assert done.learned[0].result.rows == whole.learned[0].result.rows
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_emulator_of_a_model_reads_what_the_first_one_ran(
    llama: Path, tmp_path: Path
) -> None:
    """With the activation store the whole model runs once, and outputs are the same to the byte."""
    kept = {"activation_store": {"dir": str(tmp_path / "kept")}}
    emulator = {"pads": [1, 1], "keep": 2, "distill": {**DISTILL, "steps": 2}}
    run(llama, tmp_path / "plain", emulator)
    run(llama, tmp_path / "first", {**emulator, "keep": 1}, **kept)
    recipe = {"model": str(llama), "output": str(tmp_path / "second"), "format": "dense"}
    recipe |= {"passes": [{"emulator": emulator}], "calibration": {"samples": 8, "length": 32}}
    prepared = prepare(make_recipe({**recipe, **kept}), device=CPU)
    compile_checkpoint(prepared)
    assert prepared.activations is not None
    assert prepared.activations.read >= 5 * 8  # rows through the five blocks up to the border
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "second"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_middle_is_quantized_by_any_recipe(llama: Path, tmp_path: Path) -> None:
    """Its pads stay as they are, and codes stand for what was distilled."""
    emulator = {"pads": [1, 1], "keep": 2, "distill": DISTILL}
    middle = ["re:model.layers.[12]..*"]
    gptq = {"gptq": {"bits": 4, "group_size": 32, "targets": middle}}
    run(llama, tmp_path / "out", emulator, gptq, format="compressed-tensors")
    run(llama, tmp_path / "dense", emulator)
    written = open_source(tmp_path / "out")
    coded = {n for n, scheme in written.schemes.linears.items() if scheme.weight is not None}
    assert {name.split(".")[2] for name in coded} == {"1", "2"}
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for block in written.layout.blocks:
        for name, tensor in written.read_unit(block).dequantized().items():
            error = float((tensor - dense[name]).norm() / dense[name].norm())
            assert error < 0.3 if name.rpartition(".")[0] in coded else error == 0, name
    assert verify(tmp_path / "out", against=llama, device=CPU).ok


@pytest.mark.parametrize(
    ("emulator", "recipe", "said"),
    [
        ({"pads": [3, 3]}, {}, "no middle of 6 blocks"),
        ({"pads": [1, 1], "keep": 5}, {}, "there are 4 of 6"),
        ({"pads": [1, 1], "keep": [1, 5]}, {}, "ascending numbers of blocks between the pads"),
        ({"pads": [0, 0], "keep": 1}, {}, "no adapter"),
        ({"pads": [1, 1], "keep": 2, "student": "nowhere.pt"}, {}, "no file nowhere.pt"),
        (
            {"pads": [1, 1], "keep": 2, "distill": {}},
            {"propagate": "original"},
            "propagate: quantized",
        ),
    ],
)
def test_what_makes_no_emulator_is_refused(
    emulator: dict[str, Any], recipe: dict[str, Any], said: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(Problems) as caught:
        run(llama, tmp_path / "out", emulator, **recipe)
    shown = "\n".join(f"{p.message} {p.hint}" for p in caught.value.problems)
    assert said in shown
    assert not (tmp_path / "out").exists()


def test_an_emulator_is_measured_against_the_full_model(llama: Path, tmp_path: Path) -> None:
    """By a run and by eval; what has other blocks by chance is still refused."""
    recipe = {
        "model": str(llama),
        "output": str(tmp_path / "out"),
        "passes": [{"emulator": {"pads": [1, 1], "keep": 1}}],
        "format": "dense",
        "evaluate": {"windows": 2, "length": 32},
    }
    prepared = prepare(make_recipe(recipe), device=CPU)
    done = compile_checkpoint(prepared)
    verdict = judge(prepared, done)
    assert verdict.ok and verdict.evaluation is not None
    assert verdict.evaluation.kl is not None and verdict.evaluation.kl.value > 0.01
    assert prepared.evaluation is not None
    ids = prepared.evaluation.ids
    whole = evaluate(open_source(llama), ids, device=CPU, dtype=torch.float32)
    assert verdict.evaluation.original_perplexity is not None
    assert verdict.evaluation.original_perplexity.value == pytest.approx(whole.perplexity.value)
    (tmp_path / "out" / "offsite.json").unlink()
    source = open_source(tmp_path / "out")
    with pytest.raises(InputError, match="not the same"):
        evaluate(source, ids, device=CPU, dtype=torch.float32, against=open_source(llama))


def test_a_diverging_distillation_says_so(llama: Path, tmp_path: Path) -> None:
    emulator = {"pads": [1, 1], "keep": 2, "distill": {**DISTILL, "lr": 1e30, "warmup": 0}}
    with pytest.raises(CheckError, match="distillation diverged"):
        run(llama, tmp_path / "out", emulator)


def test_config_of_kept_blocks_in_all_its_forms() -> None:
    """Lists with an item for each block, numbers of blocks, counts of the first ones, rules."""
    arch = load_map("qwen3_moe")
    config = {
        "num_hidden_layers": 6,
        "layer_types": ["a", "b", "c", "d", "e", "f"],
        "eos_token_id": [1, 2, 3, 4, 5, 6],
        "mlp_only_layers": [0, 3, 5],
        "first_k_dense_replace": 3,
        "per_layer_config": {"4": {"x": 1}, "2": {"x": 2}},
        "num_attention_heads": 4,
        "hidden_size": 8,
        "head_dim": None,
        "decoder_sparse_step": 2,
    }
    made = kept_config(arch, config, (0, 1, 4, 5), filled={"no_rope": [1] * 6}, dense=(1, 5))
    assert made["num_hidden_layers"] == 4
    assert made["layer_types"] == ["a", "b", "e", "f"]
    assert made["eos_token_id"] == config["eos_token_id"]
    assert made["first_k_dense_replace"] == 2
    assert made["per_layer_config"] == {"2": {"x": 1}}
    assert made["no_rope"] == [1] * 4
    assert made["decoder_sparse_step"] == 1 and made["mlp_only_layers"] == [1, 3]
    with pytest.raises(InputError, match="num_kv_shared_layers"):
        kept_config(arch, {**config, "num_kv_shared_layers": 2}, (0, 1), filled={})

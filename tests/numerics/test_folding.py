"""Folds are exact: whatever the scale, the model computes the same logits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.arch.load import load_map
from compressor.errors import InputError
from compressor.ir.floats import Floats
from compressor.ir.layout import Fold, Linear, Rows, UnitLayout
from compressor.ir.unit import Unit
from compressor.numerics.folding import consumer_scale, fold, fold_changes, source_scale
from tests.support.tiny_models import TYPES

# RMSNorm computes in float32 whatever the model's dtype. Only Gemma's multiplies by its weight
# there, so only there a changed weight is rounded again.
TOLERANCE = {"gemma": 3e-6, "gemma2": 3e-6}


def load(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return load_map(config["model_type"]).layout(config, shapes), tensors


def logits(folder: Path, tensors, *, at: Path):
    """Logits in float64 of a copy of a checkpoint that has these tensors."""
    shutil.copytree(folder, at)
    save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})
    # The other implementations of attention and experts do not take float64.
    model = AutoModelForCausalLM.from_pretrained(
        at, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    ids = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def source_channels(how: Fold, tensors) -> int:
    rows = how.rows.total if how.rows else tensors[f"{how.source}.weight"].shape[0]
    return rows


def random_scale(channels: int, seed: int) -> torch.Tensor:
    """Positive scales between 1/4 and 4."""
    generator = torch.Generator().manual_seed(seed)
    return 2 ** (4 * torch.rand(channels, generator=generator, dtype=torch.float64) - 2)


def fold_all(layout, tensors, *, sources_only: bool = False):
    tensors, count = dict(tensors), 0
    for unit in layout.units:
        for how in unit.folds:
            count += 1
            scale = random_scale(source_channels(how, tensors), seed=count)
            changed = fold(tensors, how, unit, scale, dtype=torch.float64)
            if sources_only:
                changed = {k: v for k, v in changed.items() if k.startswith(f"{how.source}.")}
            tensors.update(changed)
    return tensors, count


@pytest.mark.parametrize("model_type", [*TYPES, "qwen3_moe dense", "opt gelu"])
def test_any_scale_in_every_fold_leaves_logits(model_type, tiny_model, tmp_path):
    model_type, _, variant = model_type.partition(" ")
    options = {
        "dense": {"mlp_only_layers": [1]},
        "gelu": {"activation_function": "gelu"},
        "": {},
    }[variant]
    folder = tiny_model(model_type, dtype=torch.float64, **options)
    layout, tensors = load(folder)
    folded, count = fold_all(layout, tensors)
    expected = {"mixtral": 2 * 7, "qwen3_moe": 2 * 7}.get(model_type, 2 * 4)
    expected -= {"dense": 3, "gelu": 2}.get(variant, 0)
    assert count == expected + (layout.tied is None)
    before = logits(folder, tensors, at=tmp_path / "before")
    after = logits(folder, folded, at=tmp_path / "after")
    tolerance = TOLERANCE.get(model_type, 1e-9)
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    # The same scales without their counterparts do change the model.
    halves, _ = fold_all(layout, tensors, sources_only=True)
    broken = logits(folder, halves, at=tmp_path / "broken")
    assert (broken - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("model_type", TYPES)
def test_every_fold_changes_its_two_sides_alone(model_type, tiny_model):
    layout, tensors = load(tiny_model(model_type))
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    for unit in layout.units:
        for how in unit.folds:
            scale = random_scale(source_channels(how, tensors), seed=5)
            changed = fold(tensors, how, unit, scale)
            readers = {f"{linear.name}.weight" for linear in unit.site_linears(how.site)}
            made = {n for n in changed if n.startswith(f"{how.source}.")}
            assert readers and f"{how.source}.weight" in made
            assert set(changed) == readers | made
            assert (f"{how.source}.bias" in changed) == (f"{how.source}.bias" in tensors)
            assert all(not torch.equal(changed[n], tensors[n]) for n in changed)
            assert all(changed[n].dtype == tensors[n].dtype for n in changed)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_whatever_the_dtype(dtype):
    unit, how = pair(kind="norm", offset=1.0)
    tensors = {
        "n.weight": torch.randn(6).to(dtype),
        "c.weight": torch.randn(4, 6).to(dtype),
    }
    scale = random_scale(6, seed=1).float()
    changed = fold(tensors, how, unit, scale)
    assert torch.equal(
        changed["n.weight"], ((tensors["n.weight"].float() + 1) / scale - 1).to(dtype)
    )
    assert torch.equal(changed["c.weight"], (tensors["c.weight"].float() * scale).to(dtype))


def pair(*, kind="linear", offset=0.0, rows=None, repeat=1, head_dim=0, columns=6):
    consumer = Linear("c", "attn.o", 4, columns, site="s")
    how = Fold("s", "n", kind, norm_offset=offset, rows=rows, repeat=repeat, head_dim=head_dim)
    unit = UnitLayout("b", "block", 0, ("n.weight", "c.weight"), (consumer,), (how,))
    return unit, how


def test_rows_outside_the_range_stay():
    unit, how = pair(rows=Rows("", 2, 6))
    tensors = {
        "n.weight": torch.randn(9, 3),
        "n.bias": torch.randn(9),
        "c.weight": torch.randn(4, 6),
    }
    changed = fold(tensors, how, unit, torch.full((6,), 2.0))
    factor = torch.tensor([1.0] * 2 + [0.5] * 6 + [1.0])
    assert torch.equal(changed["n.weight"], tensors["n.weight"] * factor[:, None])
    assert torch.equal(changed["n.bias"], tensors["n.bias"] * factor)


def test_shared_heads_repeat_per_head_and_reduce_back():
    _, how = pair(repeat=3, head_dim=2, columns=12)
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    spread = consumer_scale(how, scale)
    assert spread.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert torch.equal(source_scale(how, spread), scale)
    assert torch.equal(source_scale(how, spread, "mean"), scale)
    uneven = torch.tensor([1.0, 2, 4, 1, 1, 3, 6, 6, 0, 3, 0, 3])
    assert source_scale(how, uneven).tolist() == [4, 3, 6, 6]
    assert source_scale(how, uneven, "mean").tolist() == [2, 2, 2, 4]
    flat = replace(how, repeat=1)
    assert source_scale(flat, uneven) is uneven and consumer_scale(flat, scale) is scale


@pytest.mark.parametrize(
    "scale",
    [
        torch.ones(5),
        torch.ones(7),
        torch.ones(6, 1),
        torch.tensor([1.0, 1, 1, 1, 1, 0]),
        torch.tensor([1.0, 1, 1, 1, 1, -1]),
        torch.tensor([1.0, 1, 1, 1, 1, float("inf")]),
        torch.tensor([1.0, 1, 1, 1, 1, float("nan")]),
    ],
)
def test_a_scale_that_cannot_be_is_refused(scale):
    unit, how = pair()
    with pytest.raises(ValueError, match="scale"):
        fold({"n.weight": torch.ones(6, 2), "c.weight": torch.ones(4, 6)}, how, unit, scale)


def test_a_consumer_of_another_width_is_refused():
    unit, how = pair(columns=12)
    tensors = {"n.weight": torch.ones(6, 2), "c.weight": torch.ones(4, 12)}
    with pytest.raises(ValueError, match=r"6 scales for 12 inputs of c"):
        fold(tensors, how, unit, torch.ones(6))


def test_a_consumer_that_is_no_longer_float_is_refused():
    unit, how = pair()
    with pytest.raises(ValueError, match=r"needs c\.weight"):
        fold({"n.weight": torch.ones(6, 2)}, how, unit, torch.ones(6))


def test_leaving_float16_is_an_error_and_not_an_infinity():
    unit, how = pair(kind="norm")
    tensors = {"n.weight": torch.ones(6).half(), "c.weight": torch.ones(4, 6).half()}
    with pytest.raises(InputError, match=r"n\.weight beyond float16"):
        fold(tensors, how, unit, torch.full((6,), 1e-5))
    assert fold(tensors, how, unit, torch.full((6,), 1e-4))["n.weight"].isfinite().all()


def test_a_fold_that_waits_until_tensors_are_read_gives_the_same_bits(tiny_model):
    layout, tensors = load(tiny_model("llama"))
    unit = layout.blocks[0]
    held = {name: tensors[name].bfloat16() for name in unit.tensors}
    now = Unit(layout=unit, tensors={name: tensor.float() for name, tensor in held.items()})
    later = Unit(layout=unit, tensors=Floats(held))
    for number, how in enumerate(unit.folds):
        scale = random_scale(source_channels(how, held), seed=number)
        now = now.with_tensors(fold(now.tensors, how, unit, scale))
        later = later.with_changes(fold_changes(later.tensors, how, unit, scale))
    assert now.tensors.keys() == set(later.tensors)
    for name, tensor in now.tensors.items():
        assert torch.equal(later.tensors[name], tensor), name
    assert all(torch.equal(held[name], tensors[name].bfloat16()) for name in held)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_experts_that_are_read_as_a_stack_have_the_bits_of_each(tiny_model, step):
    layout, tensors = load(tiny_model("mixtral"))
    unit = layout.blocks[0]
    later = Unit(layout=unit, tensors=Floats({n: tensors[n].bfloat16() for n in unit.tensors}))
    for number, how in enumerate(unit.folds[:-1]):  # one expert's output stays as it is
        scale = random_scale(source_channels(how, later.tensors), seed=number)
        later = later.with_changes(fold_changes(later.tensors, how, unit, scale))
    shapes = {x.shape for x in unit.linears if x.expert is not None}
    for shape in shapes:
        some = [x for x in unit.linears if x.expert is not None and x.shape == shape][::step]
        assert torch.equal(later.weights(some), torch.stack([later.weight(x) for x in some]))

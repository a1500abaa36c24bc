"""rotate, reorder and smooth_attention leave the logits of every family as they are."""

import json
import shutil

import pytest
import torch
from compressor_calibration.stats import KVStats, SiteStats, StatNeeds
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.arch.load import load_map
from compressor.ir.unit import Unit
from compressor.methods.common.context import PassContext
from compressor.methods.reorder import Reorder
from compressor.methods.rotate import Rotate
from compressor.methods.smooth_attention import SmoothAttention
from tests.support.planned import planned

ROTATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "opt", "mixtral", "qwen3_moe")
TYPES = (*ROTATED, "gemma2")
# Norms and the softmax of attention compute in float32 whatever the model's dtype.
TOLERANCE = 2e-5


def load(folder):
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return load_map(config["model_type"]).layout(config, shapes), tensors, config


def logits(folder, tensors, *, at, **config):
    """Logits in float64 of a copy of a checkpoint that has these tensors."""
    shutil.copytree(folder, at)
    save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps({**values, **config}))
    model = AutoModelForCausalLM.from_pretrained(
        at, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    ids = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def run(step, layout, tensors, *, untie=False, only=None):
    """The tensors after a pass over every unit, with statistics made up from a seed."""
    out = dict(tensors)
    generator = torch.Generator().manual_seed(11)
    for unit in layout.units:
        picked = step.selection.pick(unit.linears)
        if not (picked or step.effects().works_on == "all"):
            continue
        names = list(unit.tensors)
        if unit.kind == "head" and untie:
            out[f"{unit.linears[0].name}.weight"] = tensors[layout.tied].clone()
            names.append(f"{unit.linears[0].name}.weight")
        stats = {}
        for site in unit.sites:
            width = unit.site_linears(site)[0].in_features
            stats[site] = SiteStats(width, StatNeeds(absmax=True, absmean=True), device="cpu")
            stats[site].update(torch.randn(1, width, generator=generator))
        shape, kv = unit.attention, None
        if shape is not None:
            kv = KVStats(shape.kv_heads, shape.head_dim, device="cpu")
            drawn = torch.rand(1, shape.kv_heads, 1, shape.head_dim, generator=generator)
            kv.update(8 * drawn**3, drawn)
        context = PassContext(
            stats=stats, schemes={}, selected=picked, module_loss=None, seed=0, kv=kv
        )
        unit_in = Unit(layout=unit, tensors={name: out[name] for name in names})
        result = step.apply(unit_in, context)
        assert set(result.unit.tensors) == set(names) and not result.unit.quantized
        for name, tensor in result.unit.tensors.items():
            assert tensor.dtype == out[name].dtype and tensor.shape == out[name].shape
            if only is None or only in name:
                out[name] = tensor.contiguous()
    return out


def assert_same(found, expected, tolerance=TOLERANCE):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_other(found, expected):
    assert (found - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(
    "model_type, options",
    [
        *((name, {}) for name in ROTATED),
        *((name, {"seed": 5}) for name in ("llama", "opt", "phi3")),
        *((name, {"heads": False, "seed": 2}) for name in ("opt", "mixtral")),
    ],
)
def test_rotation_leaves_logits(model_type, options, tiny_model, tmp_path):
    folder = tiny_model(model_type, dtype=torch.float64)
    layout, tensors, config = load(folder)
    step = Rotate(keep_mean=model_type == "opt", **options)
    untie = layout.tied is not None
    assert not [*step.check(planned(layout, config=config, untied=untie))]
    made = run(step, layout, tensors, untie=untie)
    before = logits(folder, tensors, at=tmp_path / "before")
    after = logits(folder, made, at=tmp_path / "after", tie_word_embeddings=False)
    assert_same(after, before)
    token = layout.units[0].tensors[0]
    assert (made[token] - tensors[token]).abs().max() > 0.1
    for unit in layout.units:
        for norm in unit.norms:
            if norm.role in ("norm.attn", "norm.mlp", "norm.final"):
                weight = made[f"{norm.name}.weight"] + norm.offset
                assert (weight == 1).all()
    # Without what reads it, the rotated stream means something else.
    half = run(step, layout, tensors, untie=untie, only="embed")
    broken = logits(folder, half, at=tmp_path / "broken", tie_word_embeddings=False)
    assert_other(broken, before)


@pytest.mark.parametrize("sizes", [{"hidden_size": 96}, {"hidden_size": 72, "head_dim": 36}])
def test_rotation_of_sizes_that_are_no_power_of_two(sizes, tiny_model, tmp_path):
    """96 = 12·8 and 36 have Hadamard matrices, 72 = 36·2 their product."""
    folder = tiny_model("llama", dtype=torch.float64, num_attention_heads=4, **sizes)
    layout, tensors, _ = load(folder)
    made = run(Rotate(), layout, tensors)
    assert_same(
        logits(folder, made, at=tmp_path / "after"),
        logits(folder, tensors, at=tmp_path / "before"),
    )


def test_rotation_spreads_an_outlier_of_the_stream(tiny_model):
    layout, tensors, _ = load(tiny_model("llama"))
    token = layout.units[0].tensors[0]
    tensors[token][:, 7] *= 100
    made = run(Rotate(), layout, tensors)

    def peak(values):
        return float(values.abs().amax(1).div(values.square().mean(1).sqrt()).mean())

    assert peak(tensors[token]) > 7 and peak(made[token]) < 2


def test_what_cannot_be_rotated_says_why(tiny_model):
    layout, _, _ = load(tiny_model("gemma2"))
    (refused,) = Rotate().check(planned(layout, untied=True))
    assert "post_attention_layernorm" in refused.message
    layout, _, _ = load(tiny_model("opt"))
    (refused,) = Rotate().check(planned(layout, untied=True))
    assert "LayerNorm" in refused.message and "keep_mean" in refused.hint
    layout, _, _ = load(tiny_model("qwen2"))
    (refused,) = Rotate().check(planned(layout))
    assert "model.embed_tokens" in refused.message and "untie: true" in refused.hint
    assert not [*Rotate().check(planned(layout, untied=True))]
    with pytest.raises(ValidationError, match="no targets"):
        Rotate(targets="attn.q")


@pytest.mark.parametrize("model_type", TYPES)
def test_reordering_leaves_logits(model_type, tiny_model, tmp_path):
    folder = tiny_model(model_type, dtype=torch.float64)
    layout, tensors, _ = load(folder)
    made = run(Reorder(), layout, tensors)
    before = logits(folder, tensors, at=tmp_path / "before")
    assert_same(logits(folder, made, at=tmp_path / "after"), before)
    changed = {name for name in made if not torch.equal(made[name], tensors[name])}
    roles = {x.role for x in layout.linears if f"{x.name}.weight" in changed}
    assert roles & {"attn.v", "attn.qkv"} and "attn.o" in roles and "attn.q" not in roles
    assert roles & {"mlp.up", "mlp.gate_up", "expert.up"}
    half = run(Reorder(), layout, tensors, only="o_proj" if model_type != "opt" else "fc2")
    assert_other(logits(folder, half, at=tmp_path / "broken"), before)


def test_reordered_channels_ascend(tiny_model):
    """A group of neighbours holds channels of like salience, within each head."""
    layout, tensors, _ = load(tiny_model("llama"))
    unit = layout.units[1]
    down = next(x for x in unit.linears if x.role == "mlp.down")
    o = next(x for x in unit.linears if x.role == "attn.o")
    salience = torch.rand(down.in_features)
    heads = torch.rand(o.in_features)
    stats = {}
    for linear, values in ((down, salience), (o, heads)):
        stats[linear.site] = SiteStats(linear.in_features, StatNeeds(absmax=True), device="cpu")
        stats[linear.site].update(values[None])
    # Weights that are the salience itself show where each channel went.
    tensors[f"{down.name}.weight"] = salience.expand(*down.shape).clone()
    tensors[f"{o.name}.weight"] = heads.expand(*o.shape).clone()
    context = PassContext(stats=stats, schemes={}, selected=(o, down), module_loss=None, seed=0)
    result = Reorder().apply(Unit(unit, {n: tensors[n] for n in unit.tensors}), context)
    row = result.unit.weight(down)[0]
    assert (row.diff() >= 0).all() and torch.equal(row.sort().values, salience.sort().values)
    shape = unit.attention
    by_head = result.unit.weight(o)[0].view(shape.kv_heads, -1, shape.head_dim)
    assert (by_head.amax(1).diff() >= 0).all()
    assert [row["linear"] for row in result.rows] == [o.name, down.name]


def test_only_inner_channels_can_be_reordered(tiny_model):
    layout, _, _ = load(tiny_model("llama"))
    step = Reorder(targets="linear")
    (error,) = step.check(planned(layout))
    assert error.message.startswith(
        "11 linears (model.layers.0.self_attn.q_proj, …): only o and down"
    )
    roles = {x.role for x in layout.linears if [*step.check(planned(layout, selected=(x,)))]}
    assert roles == {"attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "lm_head"}


@pytest.mark.parametrize(
    "model_type, alpha", [*((name, 0.5) for name in TYPES), ("llama", 1.0), ("qwen3", 1.0)]
)
def test_smoothed_attention_leaves_logits(model_type, alpha, tiny_model, tmp_path):
    folder = tiny_model(model_type, dtype=torch.float64)
    layout, tensors, config = load(folder)
    step = SmoothAttention(alpha=alpha)
    assert not [*step.check(planned(layout, config=config))]
    made = run(step, layout, tensors)
    before = logits(folder, tensors, at=tmp_path / "before")
    assert_same(logits(folder, made, at=tmp_path / "after"), before)
    changed = {name for name in made if not torch.equal(made[name], tensors[name])}
    normed = {"qwen3": "norm", "qwen3_moe": "norm", "phi3": "qkv"}.get(model_type, "proj")
    assert changed and all(normed in name for name in changed)
    if model_type in ("qwen2", "opt"):
        assert any("q_proj.bias" in name for name in changed)
        assert any("k_proj.bias" in name for name in changed)
    half = run(step, layout, tensors, only="k_norm" if normed == "norm" else "k_proj")
    if model_type != "phi3":
        assert_other(logits(folder, half, at=tmp_path / "broken"), before)


def test_a_part_of_the_head_that_is_not_turned_is_refused(tiny_model):
    layout, _, config = load(tiny_model("phi3"))
    for entry in (
        {"partial_rotary_factor": 0.75},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}},
    ):
        (refused,) = SmoothAttention().check(planned(layout, config={**config, **entry}))
        assert "rotary" in refused.message

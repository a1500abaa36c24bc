"""Architecture maps: every tensor has a place, blocks load as transformers loads them."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compressor.arch import load as arch
from compressor.arch.load import known_model_types, load_map
from compressor.errors import InputError
from compressor.ir.floats import fill
from tests.support.families import WRAPPERS
from tests.support.tiny_models import MORE_TYPES, TYPES


def read(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def layout_of(folder: Path):
    config, tensors = read(folder)
    return load_map(config["model_type"]).layout(config, shapes(tensors)), tensors


def test_there_is_a_tiny_model_for_every_map():
    built = {name.partition(" ")[0] for name in (*TYPES, *MORE_TYPES)}
    inner = {text for text, _, _ in WRAPPERS.values()}
    twins = {name for name in known_model_types() if load_map(name).twin}
    assert set(known_model_types()) == built | inner | twins
    assert all(load_map(model_type).model_type == model_type for model_type in TYPES)


@pytest.mark.parametrize("model_type", TYPES)
def test_units_partition_the_checkpoint(model_type, tiny_model):
    layout, tensors = layout_of(tiny_model(model_type))
    placed = [name for unit in layout.units for name in unit.tensors]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(tensors)
    kinds = [unit.kind for unit in layout.units]
    assert kinds == ["embedding", "block", "block", "head"]
    assert (layout.tied is None) == ("lm_head.weight" in tensors)
    assert layout.tied in (None, *layout.units[0].tensors)


@pytest.mark.parametrize("model_type", TYPES)
def test_linears_and_folds_fit_their_tensors(model_type, tiny_model):
    layout, tensors = layout_of(tiny_model(model_type))
    for unit in layout.units:
        for linear in unit.linears:
            stored = layout.tied if layout.tied and linear.role == "lm_head" else None
            assert tuple(tensors[stored or f"{linear.name}.weight"].shape) == linear.shape
            assert linear.bias == (f"{linear.name}.bias" in tensors)
            assert sum(rows.total for rows in linear.rows) == linear.out_features
        matrices = {n for n in unit.tensors if tensors[n].dim() == 2 and unit.kind != "embedding"}
        assert matrices <= {f"{linear.name}.weight" for linear in unit.linears}
        vectors = {n for n in unit.tensors if tensors[n].dim() == 1 and n.endswith("weight")}
        assert vectors == {f"{norm.name}.weight" for norm in unit.norms}
        if unit.kind == "block":
            # In a block every input can be rescaled, each by one source.
            assert sorted(fold.site for fold in unit.folds) == sorted(unit.sites)


def test_roles_and_sites_of_a_dense_and_a_sparse_block(tiny_model):
    dense = layout_of(tiny_model("llama"))[0].units[1]
    assert [linear.role for linear in dense.linears] == [
        *("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"),
    ]
    assert dense.sites == ("attn.in", "attn.out", "mlp.in", "mlp.out")
    assert dense.attention is not None and dense.attention.kv_heads == 2
    assert {linear.fused for linear in dense.site_linears("attn.in")} == {
        "model.layers.0.self_attn.qkv_proj"
    }
    sparse = layout_of(tiny_model("mixtral"))[0].units[2]
    readers = [(linear.role, linear.expert) for linear in sparse.site_linears("expert.in")]
    assert readers[0] == ("router", None)
    assert sorted(readers[1:]) == [(f"expert.{r}", e) for r in ("gate", "up") for e in range(4)]
    (down,) = sparse.site_linears("expert.3.out")
    assert (down.name, down.role) == ("model.layers.1.block_sparse_moe.experts.3.w2", "expert.down")


def test_parts_of_fused_linears(tiny_model):
    unit = layout_of(tiny_model("phi3"))[0].units[1]
    qkv, gate_up = (unit.site_linears(site)[0] for site in ("attn.in", "mlp.in"))
    assert [(r.role, r.offset, r.count) for r in qkv.rows] == [
        ("attn.q", 0, 64),
        ("attn.k", 64, 32),
        ("attn.v", 96, 32),
    ]
    assert [(r.role, r.offset, r.count) for r in gate_up.rows] == [
        ("mlp.gate", 0, 96),
        ("mlp.up", 96, 96),
    ]
    rows = {fold.site: fold.rows for fold in unit.folds}
    assert rows["attn.out"] == qkv.rows[2] and rows["mlp.out"] == gate_up.rows[1]


def test_a_dense_block_among_sparse_ones(tiny_model):
    layout, tensors = layout_of(tiny_model("qwen3_moe", mlp_only_layers=[1]))
    sparse, dense = layout.units[1:3]
    assert any(linear.role == "router" for linear in sparse.linears)
    assert dense.sites == ("attn.in", "attn.out", "mlp.in", "mlp.out")
    assert sum(len(unit.tensors) for unit in layout.units) == len(tensors)


def capture_block_io(model, layer, ids):
    """Arguments and output of a decoder layer in a forward pass of the whole model."""
    seen = {}

    def hook(_, args, kwargs, output):
        seen.update(args=args, kwargs=kwargs, output=output)

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen


@pytest.mark.parametrize("model_type", [*TYPES, "qwen3_moe dense"])
def test_blocks_load_as_transformers_loads_them(model_type, tiny_model):
    model_type, _, dense = model_type.partition(" ")
    folder = tiny_model(model_type, **({"mlp_only_layers": [1]} if dense else {}))
    layout, tensors = layout_of(folder)
    names = load_map(model_type).runtime
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model.get_submodule(names.layers)
    ids = torch.randint(2, 256, (2, 48), generator=torch.Generator().manual_seed(1))
    for unit in layout.units[1:-1]:
        layer = layers[unit.index]
        state = names.block_state(unit, tensors)
        loaded = layer.state_dict()
        assert set(state) == set(loaded)
        assert all(torch.equal(state[name], loaded[name]) for name in state)
        bare = copy.deepcopy(layer).to("meta")
        bare.load_state_dict(state, strict=True, assign=True)
        seen = capture_block_io(model, layer, ids)
        with torch.no_grad():
            again = bare(*seen["args"], **seen["kwargs"])
        assert torch.equal(again, seen["output"])
        for linear in unit.linears:
            module = layer.get_submodule(names.linear_path(unit, linear))
            if linear.expert is None:
                assert torch.equal(module.weight, tensors[f"{linear.name}.weight"])
            else:
                assert module is layer.mlp.experts
    token = layout.units[0].tensors[0]
    assert torch.equal(model.get_submodule(names.embedding).weight, tensors[token])
    norm = layout.units[-1].norms[0]
    assert torch.equal(model.get_submodule(names.norm).weight, tensors[f"{norm.name}.weight"])
    head = tensors[layout.tied or "lm_head.weight"]
    assert torch.equal(model.get_submodule(names.lm_head).weight, head)


def test_block_state_keeps_the_dtype(tiny_model):
    layout, tensors = layout_of(tiny_model("mixtral", dtype=torch.bfloat16))
    state = load_map("mixtral").runtime.block_state(layout.units[1], tensors)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("said", [None, True, False])
def test_biases_are_those_that_transformers_builds_for_the_config(model_type, said, tiny_model):
    flags = (
        dict.fromkeys(("attention_bias", "mlp_bias", "enable_bias"), said)
        if said is not None
        else {}
    )
    folder = tiny_model(model_type, **flags)
    layout, tensors = layout_of(folder)
    placed = {name for unit in layout.units for name in unit.tensors if name.endswith(".bias")}
    assert placed == {name for name in tensors if name.endswith(".bias")}
    assert not layout.unannounced
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type).tie_word_embeddings
    assert load_map(model_type).defaults.get("tie_word_embeddings", False) is default


def test_biases_that_the_config_does_not_know_of_are_named(tiny_model):
    config, tensors = read(tiny_model("llama"))
    name = "model.layers.1.self_attn.q_proj.bias"
    layout = load_map("llama").layout(config, {**shapes(tensors), name: (64,)})
    assert layout.unannounced == (name,) and not layout.units[2].linears[0].bias


def test_a_stored_head_is_not_tied(tiny_model):
    config, tensors = read(tiny_model("qwen2"))
    names = shapes(tensors)
    layout = load_map("qwen2").layout(config, {**names, "lm_head.weight": (256, 64)})
    assert layout.tied is None and "lm_head.weight" in layout.units[-1].tensors
    with pytest.raises(InputError, match=r"lacks 1 tensor: lm_head\.weight"):
        load_map("qwen2").layout({**config, "tie_word_embeddings": False}, names)


def test_a_config_that_does_not_say_takes_its_family_s_default(tiny_model):
    config, tensors = read(tiny_model("gemma"))
    del config["tie_word_embeddings"]
    assert load_map("gemma").layout(config, shapes(tensors)).tied
    config, tensors = read(tiny_model("opt"))
    for key in ("do_layer_norm_before", "word_embed_proj_dim", "activation_function"):
        del config[key]
    unit = load_map("opt").layout(config, shapes(tensors)).units[1]
    assert "mlp.out" in {fold.site for fold in unit.folds}


def test_relu_alone_lets_a_scale_through(tiny_model):
    folder = tiny_model("opt", activation_function="gelu")
    unit = layout_of(folder)[0].units[1]
    assert [fold.site for fold in unit.folds] == ["attn.in", "attn.out", "mlp.in"]


@pytest.mark.parametrize(
    "model_type", ["bert", "", None, "../maps/llama", "llama.yaml", "__init__"]
)
def test_an_unknown_type_is_no_file(model_type):
    with pytest.raises(InputError, match="no architecture map"):
        load_map(model_type)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False is not supported"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim 32 is not supported"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True"),
        ("llama", {"num_hidden_layers": 10**12}, "promises 1000000000000 layers"),
        ("llama", {"num_hidden_layers": 3}, "lacks 9 tensors"),
        ("llama", {"num_hidden_layers": 1}, "no place for 9 tensors"),
        ("llama", {"hidden_size": "64"}, "hidden_size is '64', not a count"),
        ("llama", {"hidden_size": True}, "hidden_size is True"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("llama", {"hidden_size": None}, "lacks hidden_size"),
        ("llama", {"intermediate_size": None}, "lacks intermediate_size"),
        ("llama", {"num_key_value_heads": 3}, "3 key heads do not divide 4 query heads"),
        ("llama", {"num_key_value_heads": 4}, r"disagree on the shape of 4 tensors: .*k_proj"),
        ("llama", {"vocab_size": 257}, r"embed_tokens\.weight \[256, 64\], not \[257, 64\]"),
        ("mixtral", {"num_local_experts": 5}, "lacks 6 tensors"),
        ("mixtral", {"num_local_experts": 3}, r"no place for 6 tensors: .*experts\.3\.w"),
        ("qwen3_moe", {"num_local_experts": 10**9}, "promises 1000000000 experts"),
        ("qwen3_moe", {"num_local_experts": None}, "lacks num_experts or num_local_experts"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(model_type, change, message, tiny_model):
    config, tensors = read(tiny_model(model_type))
    with pytest.raises(InputError, match=message):
        load_map(model_type).layout({**config, **change}, shapes(tensors))


@pytest.mark.parametrize("model_type", TYPES)
def test_no_tensor_may_be_missing(model_type, tiny_model):
    config, tensors = read(tiny_model(model_type))
    found = load_map(model_type)
    for name in tensors:
        if name == "lm_head.weight":
            continue  # a stored head may be tied instead
        rest = {key: shape for key, shape in shapes(tensors).items() if key != name}
        with pytest.raises(InputError):
            found.layout(config, rest)


def test_unassigned_tensors_are_named(tiny_model):
    config, tensors = read(tiny_model("llama"))
    extra = {"model.layers.0.self_attn.q_proj.weight_scale": (64, 1), "vision.weight": (3, 3)}
    headers = {**shapes(tensors), **extra}
    with pytest.raises(InputError, match=r"no place for 2 tensors: .*_scale, vision\.weight"):
        load_map("llama").layout(config, headers)
    with pytest.raises(InputError) as error:
        load_map("llama").layout({**config, "quantization_config": {}}, headers)
    assert "already quantized" in str(error.value.hint)


def test_a_bias_lost_in_one_block_is_noticed(tiny_model):
    config, tensors = read(tiny_model("qwen2"))
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(
        InputError, match=r"lacks 1 tensor: model\.layers\.1\.self_attn\.k_proj\.bias"
    ):
        load_map("qwen2").layout(config, shapes(tensors))


def test_all_problems_come_at_once(tiny_model):
    config, tensors = read(tiny_model("llama"))
    del tensors["model.norm.weight"]
    tensors["stray"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"(?s)2 problems.*stray.*model\.norm\.weight"):
        load_map("llama").layout(config, shapes(tensors))


def test_a_new_family_is_one_file(tmp_path, monkeypatch, tiny_model):
    shutil.copytree(arch.MAPS, tmp_path / "archs")
    monkeypatch.setattr(arch, "MAPS", tmp_path / "archs")
    shutil.copy(tmp_path / "archs/llama.yaml", tmp_path / "archs/novel.yaml")
    config, tensors = read(tiny_model("llama"))
    layout = load_map("novel").layout({**config, "model_type": "novel"}, shapes(tensors))
    assert layout.model_type == "novel" and len(layout.units) == 4


def with_fold(row):
    section = yaml.safe_load((arch.MAPS / "llama.yaml").read_text())["mlp"][0]
    return {**section, "folds": [row]}


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "red"},
        {"runtime": {"layers": "l", "embedding": "e", "norm": "n", "lm_head": "h", "x": "y"}},
        {"sizes": {"layers": 3, "hidden": "h", "vocab": "v", "heads": "n"}},
        {"mlp": []},
        {"attention": {"linears": [{"name": "q"}]}},
        {"layer": None},
        {"mlp": [with_fold({"site": "mlp.out", "source": "mlp.sideways"})]},
        {"mlp": [with_fold({"site": "mlp.away", "source": "mlp.up_proj"})]},
        {"mlp": [with_fold({"site": "mlp.out", "source": "mlp.up_proj", "part": "mlp.up"})]},
    ],
)
def test_a_bad_map_file_is_refused(change, tmp_path, monkeypatch):
    data = yaml.safe_load((arch.MAPS / "llama.yaml").read_text())
    monkeypatch.setattr(arch, "MAPS", tmp_path)
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump({**data, **change}))
    with pytest.raises(InputError, match=r"broken\.yaml is not a map: [^\n]*$"):
        load_map("broken")


def test_tokenizer_round_trips_any_text(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    text = "naïve — 日本語 🙂\n\ttabs"
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < 256 and tokenizer.decode(ids) == text


def test_experts_that_are_placed_as_memory_stacks_them_are_stacked_without_a_copy(tiny_model):
    layout, tensors = layout_of(tiny_model("mixtral"))
    unit, names = layout.units[1], load_map("mixtral").runtime
    own = {name: tensors[name] for name in unit.tensors}
    expected = names.block_state(unit, own)
    placed = fill(names.room(unit, own, torch.device("cpu")), own)
    assert [*placed] == [*own]
    again = names.room(unit, placed, torch.device("cpu"))
    assert all(again[name] is tensor for name, tensor in placed.items())
    state = names.block_state(unit, placed)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    experts = [linear for linear in unit.linears if linear.expert is not None]
    stacks = {t.untyped_storage().data_ptr() for t in state.values() if t.dim() == 3}
    homes = {placed[x.weight_name].untyped_storage().data_ptr() for x in experts}
    assert homes == stacks and len(stacks) == 2

    changed = {**placed, experts[0].weight_name: 2 * placed[experts[0].weight_name]}
    anew = names.block_state(unit, changed)
    homes = {t.untyped_storage().data_ptr() for t in anew.values() if t.dim() == 3}
    assert len(homes & stacks) == 1  # the stack that it is not in
    assert any(not torch.equal(anew[name], state[name]) for name in anew)
    assert all(torch.equal(own[name], tensors[name]) for name in own)

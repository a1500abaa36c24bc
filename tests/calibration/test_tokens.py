"""Rows of tokens cut from documents."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compressor_calibration import tokens
from compressor_calibration.bundled import KINDS, bundled_text
from compressor_calibration.documents import DataError, Document
from compressor_calibration.overlap import overlap
from compressor_calibration.tokens import make_tokens, mixed, shares
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}{% endfor %}"


def byte_tokenizer(*, adds_bos: bool = False, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """One token per byte; "<s>" is id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "<s>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text(*parts: str) -> list[Document]:
    return [Document(text=part, source="here") for part in parts]


def windows(tokenizer, documents, *, windows, length):
    return make_tokens(tokenizer, documents, samples=windows, length=length, sampling="consecutive")


def letters(count: int, seed: int = 0) -> str:
    draw = torch.Generator().manual_seed(seed)
    return "".join(chr(97 + i) for i in torch.randint(26, (count,), generator=draw).tolist())


def test_consecutive_rows_are_the_first_of_the_joined_text_without_bos():
    tokenizer = byte_tokenizer(adds_bos=True)
    found = make_tokens(
        tokenizer, text("abc", "defg", "hijklmn"), samples=3, length=4, sampling="consecutive"
    )
    assert [tokenizer.decode(row) for row in found.ids] == ["abcd", "efgh", "ijkl"]
    assert found.ids.dtype == torch.int64 and found.source == "here"
    assert torch.equal(windows(tokenizer, text("abcdefgh"), windows=2, length=4).ids, found.ids[:2])


def test_reading_stops_once_there_is_enough():
    def endless() -> Iterator[Document]:
        while True:
            yield Document(text="lorem ipsum ", source="endless")

    found = make_tokens(byte_tokenizer(), endless(), samples=2, length=8, sampling="consecutive")
    assert byte_tokenizer().decode(found.ids.flatten()) == "lorem ipsum lore"


def test_more_is_read_where_tokens_are_longer_than_expected(monkeypatch):
    monkeypatch.setattr(tokens, "CHARACTERS_PER_TOKEN", 1)
    monkeypatch.setattr(tokens, "CUT_TOKENS", 8)
    whole = letters(1000)
    found = make_tokens(
        byte_tokenizer(), text(whole), samples=10, length=10, sampling="consecutive"
    )
    assert byte_tokenizer().decode(found.ids.flatten()) == whole[:100]
    exact = make_tokens(
        byte_tokenizer(), text(whole), samples=10, length=100, sampling="consecutive"
    )
    assert byte_tokenizer().decode(exact.ids.flatten()) == whole


@pytest.mark.parametrize("total", [64, 65, 100, 1000])
def test_random_rows_are_pieces_of_the_text_and_do_not_overlap(total):
    tokenizer, whole = byte_tokenizer(), letters(total)
    found = make_tokens(tokenizer, text(whole), samples=8, length=8, seed=3)
    places = sorted(whole.index(tokenizer.decode(row)) for row in found.ids)
    assert all(b - a >= 8 for a, b in itertools.pairwise(places))
    assert "non-overlapping" in found.sampling and "seed 3" in found.sampling
    again = make_tokens(tokenizer, text(whole), samples=8, length=8, seed=3)
    assert torch.equal(found.ids, again.ids) and found.sha256 == again.sha256
    if total > 100:
        other = make_tokens(tokenizer, text(whole), samples=8, length=8, seed=4)
        assert other.sha256 != found.sha256


@pytest.mark.parametrize("total", [36, 37, 50, 63])
def test_random_rows_overlap_by_at_most_half_where_the_text_is_short(total):
    tokenizer, whole = byte_tokenizer(), letters(total)
    found = make_tokens(tokenizer, text(whole), samples=8, length=8)
    places = sorted(whole.index(tokenizer.decode(row)) for row in found.ids)
    assert places[0] == 0 and places[-1] == total - 8
    assert all(b - a >= 4 for a, b in itertools.pairwise(places))
    assert ", overlapping" in found.sampling


def test_too_little_text_says_how_much_there_was_and_is_needed():
    with pytest.raises(DataError, match=r"35 tokens where 36 are needed") as error:
        make_tokens(byte_tokenizer(), text(letters(35)), samples=8, length=8)
    assert error.value.hint
    with pytest.raises(DataError, match=r"63 tokens where 64 are needed"):
        windows(byte_tokenizer(), text(letters(63)), windows=8, length=8)
    with pytest.raises(DataError, match=r"no documents.* 0 tokens"):
        make_tokens(byte_tokenizer(), [], samples=1, length=8)


def test_random_rows_begin_with_bos_only_where_the_tokenizer_would_add_it():
    whole = letters(400)
    with_bos = make_tokens(byte_tokenizer(adds_bos=True), text(whole), samples=4, length=8)
    assert (with_bos.ids[:, 0] == 256).all() and not (with_bos.ids[:, 1:] == 256).any()
    assert with_bos.ids.shape == (4, 8) and with_bos.sampling.endswith("BOS first")
    for tokenizer in (byte_tokenizer(), byte_tokenizer(adds_bos=True, bos=None)):
        assert not (make_tokens(tokenizer, text(whole), samples=4, length=8).ids == 256).any()
    off = make_tokens(byte_tokenizer(adds_bos=True), text(whole), samples=4, length=8, bos=False)
    assert not (off.ids == 256).any()


def chats(count: int) -> list[Document]:
    return [
        Document(messages=({"role": "u", "content": letters(20, seed)},), source="chats")
        for seed in range(count)
    ]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_random_rows_of_conversations_begin_where_one_begins(adds_bos):
    # Each conversation is <s>u: and 20 letters: 23 tokens.
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    found = make_tokens(tokenizer, chats(30), samples=5, length=40)
    begins = {f"<s>u:{letters(20, seed)}" for seed in range(30)}
    decoded = [tokenizer.decode(row) for row in found.ids]
    assert all(row[:25] in begins and row[25:30] == "<s>u:" for row in decoded)
    assert len(set(decoded)) == 5 and "non-overlapping" in found.sampling
    with pytest.raises(DataError, match="29 conversations"):
        make_tokens(tokenizer, chats(30), samples=30, length=40)
    crowded = make_tokens(tokenizer, chats(30), samples=29, length=40)
    assert len({tokenizer.decode(row) for row in crowded.ids}) == 29
    assert ", overlapping" in crowded.sampling


def test_conversations_and_texts_keep_their_order():
    documents = [
        *text("ab", "cd"),
        Document(messages=({"role": "u", "content": "ef"},)),
        *text("gh"),
    ]
    found = windows(byte_tokenizer(), documents, windows=1, length=11)
    assert byte_tokenizer().decode(found.ids[0]) == "abcd<s>u:efgh"


def test_token_ids_are_taken_as_they_are():
    documents = [*text("ab"), Document(ids=(7, 256, 9)), *text("c")]
    tokenizer = byte_tokenizer()
    first, last = tokenizer("ab")["input_ids"], tokenizer("c")["input_ids"]
    found = windows(tokenizer, documents, windows=1, length=6)
    assert found.ids.tolist() == [[*first, 7, 256, 9, *last]]
    with pytest.raises(DataError, match="line 1 holds token 257, the tokenizer knows 257"):
        windows(tokenizer, [Document(ids=(257,), where="a.jsonl line 1")], windows=1, length=1)


def test_a_chat_template_that_fails_is_a_clear_error():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="chats") as error:
        make_tokens(tokenizer, chats(3), samples=1, length=8)
    assert "chat template" in (error.value.hint or "")


def test_the_hash_depends_on_ids_and_shape():
    tokenizer, document = byte_tokenizer(), text(letters(64))
    a, b = (windows(tokenizer, document, windows=w, length=64 // w) for w in (4, 8))
    c = windows(tokenizer, text(letters(64, 1)), windows=4, length=16)
    assert len({a.sha256, b.sha256, c.sha256}) == 3
    assert a.sha256 == windows(tokenizer, document, windows=4, length=16).sha256


def test_overlap_counts_rows_that_share_a_run_of_32_tokens():
    tokenizer = byte_tokenizer()
    whole = letters(1000)
    known = windows(tokenizer, text(whole[:500]), windows=5, length=100)
    apart = windows(tokenizer, text(whole[500:]), windows=5, length=100)
    assert overlap(known, known) == 5 and overlap(known, apart) == 0

    def rows_with(piece: str):
        filler = letters(400, seed=9)
        return windows(tokenizer, text(filler[:150] + piece + filler[150:]), windows=4, length=100)

    assert overlap(known, rows_with(whole[210:242])) == 1
    assert overlap(known, rows_with(whole[210:241])) == 0
    # 184 to 216 lies across two rows of `known`: no row of it has the run.
    assert overlap(known, rows_with(whole[184:216])) == 0
    short = windows(tokenizer, text(whole[60:100]), windows=2, length=20)
    assert overlap(known, short) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundled_texts_of_a_kind_are_of_different_works(kind):
    known, held_out = (bundled_text(part, kind) for part in ("calibration", "held_out"))
    assert len(known) > 400_000 and len(held_out) > 180_000
    # A hundred characters are fewer than the 32 tokens that count as the same passage.
    assert not [i for i in range(0, len(held_out) - 100, 500) if held_out[i : i + 100] in known]
    assert held_out[:100] not in known


def test_a_kind_that_is_not_bundled_is_refused():
    with pytest.raises(ValueError, match="spanish"):
        bundled_text("test", "code")  # type: ignore[arg-type]


def test_the_bundled_texts_and_their_notes_are_under_4_mb():
    import compressor_calibration.text as folder

    files = [p for p in Path(folder.__file__).parent.rglob("*") if p.suffix in (".txt", ".md")]
    assert len(files) == 14 and sum(p.stat().st_size for p in files) < 4_000_000


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([1, 1, 1, 1, 1, 1], 16, [3, 3, 3, 3, 2, 2]),
        ([1, 1, 1], 2, [1, 1, 0]),
        ([8, 1, 1], 10, [8, 1, 1]),
        ([1000, 1, 1], 4, [2, 1, 1]),
        ([0.5, 0.25], 3, [2, 1]),
        ([1], 7, [7]),
    ],
)
def test_rows_are_shared_out_by_weight(weights, total, expected):
    assert shares(weights, total) == expected


def test_a_mixture_holds_the_rows_of_its_parts_in_an_order_of_the_seeds():
    tokenizer = byte_tokenizer()
    a = windows(tokenizer, text(letters(64)), windows=8, length=8)
    b = windows(tokenizer, text(letters(32, 1)), windows=4, length=8)
    joined = mixed([a, b], seed=None)
    assert torch.equal(joined.ids, torch.cat([a.ids, b.ids])) and "8 rows of" in joined.source
    one, again, other = (mixed([a, b], seed=seed) for seed in (3, 3, 4))
    assert one.sha256 == again.sha256 != other.sha256
    assert sorted(one.ids.tolist()) == sorted(joined.ids.tolist()) != one.ids.tolist()

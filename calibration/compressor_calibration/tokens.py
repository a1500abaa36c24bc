"""Token sets: rows of equal length cut from documents, with a hash that names them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from compressor_calibration.documents import BadRows, DataError, Document
from compressor_calibration.passkeys import encode
from compressor_calibration.text_windows import text_windows

Sampling = Literal["random", "consecutive"]

# What most texts need for each token, and about four times that, which is read for each token that
# is wanted.
CHARACTERS_OF_TOKEN = 4
CHARACTERS_PER_TOKEN = 16
# Random windows are drawn from at least this much text where there is so much.
POOL_CHARACTERS = 8_000_000
# Where a text is cut, its last tokens may differ from those of the whole text.
CUT_TOKENS = 64


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    bos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Any:
        """A mapping whose "input_ids" are the token ids of `text`."""

    def __len__(self) -> int:
        """Token ids that it knows, the added ones too."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """A conversation written out as the model was trained on it."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSet:
    """Rows of tokens.

    ids       int64 [rows, length]
    sha256    hash of the ids and their shape
    source    where the text came from
    sampling  how the rows were cut from it
    skipped   rows of the data that could not be used and were passed over, and the first of them
    """

    ids: Tensor
    sha256: str
    source: str
    sampling: str
    skipped: int = 0
    first_skipped: str = ""


def make_tokens(
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    samples: int,
    length: int,
    sampling: Sampling = "random",
    seed: int = 0,
    bos: bool = True,
    bad_rows: BadRows | None = None,
) -> TokenSet:
    """Cut `samples` rows of `length` tokens from the documents.

    Texts are joined with nothing between and tokenized as one, without special tokens; each
    conversation is written out whole by the chat template; token ids are taken as they are.
    `bad_rows` says what becomes of documents that the tokenizer cannot take, and is shared with
    whatever reads them.

    consecutive  the first rows of the joined tokens, one after the other, without BOS
    random       windows at places drawn with `seed`. They overlap only where the text is short,
                 by at most half, and then they lie evenly. Windows into conversations begin where
                 a conversation begins. With `bos`, a window begins with BOS if the tokenizer puts
                 one before every text by itself

    No more is read than the rows take, or for random windows the first 8 million characters
    (16 characters for each token, if that is more), and of a long text no more is tokenized than
    the windows. Raises DataError where the text is too short.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"{samples} rows of {length} tokens were asked for")
    wanted = samples * length
    pool = POOL_CHARACTERS if sampling == "random" else 0
    met = bad_rows or BadRows()
    reader = _Reader(tokenizer, iter(documents), met)
    characters = max(wanted * CHARACTERS_PER_TOKEN, pool)
    if sampling == "consecutive":
        stream = reader.stream(tokens=wanted, characters=characters)
        if len(stream.ids) < wanted:
            raise _too_short(stream, wanted)
        rows = stream.ids[:wanted].view(samples, length)
        return _token_set(rows, stream.source, "consecutive", met)
    rows, how = _random_rows(reader, characters, samples=samples, length=length, seed=seed)
    first = _automatic_bos(tokenizer) if bos else None
    if first is not None:
        shifted = torch.cat([torch.full((samples, 1), first), rows[:, :-1]], dim=1)
        rows = torch.where(rows[:, :1] == first, rows, shifted)
        how += ", BOS first"
    return _token_set(rows, reader.source, f"random with seed {seed}, {how}", met)


def _random_rows(
    reader: _Reader, characters: int, *, samples: int, length: int, seed: int
) -> tuple[Tensor, str]:
    """Windows [samples, length] into the first `characters` characters, and how they lie."""
    text = reader.text(characters)
    if text is not None:
        rows = text_windows(
            lambda part: encode(reader.tokenizer, part),
            text,
            samples=samples,
            length=length,
            seed=seed,
        )
        if rows is not None:
            return rows, "non-overlapping"
    stream = reader.stream(tokens=samples * length, characters=characters)
    starts, how = _choose(stream, samples=samples, length=length, seed=seed)
    return torch.stack([stream.ids[start : start + length] for start in starts]), how


def tokens_needed(samples: int, length: int, sampling: Sampling) -> int:
    """The fewest tokens of text that `make_tokens` takes for these rows."""
    if sampling == "consecutive":
        return samples * length
    return length + (samples - 1) * ((length + 1) // 2)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """How many of `total` rows each weight gets: in proportion, and at least one each where there
    are enough."""
    least = 1 if total >= len(weights) else 0
    quotas = [weight * total / sum(weights) for weight in weights]
    counts = [max(least, int(quota)) for quota in quotas]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        able = [i for i, count in enumerate(counts) if step > 0 or count > least]
        # The first of those that are farthest from their quota.
        counts[max(able, key=lambda i: step * (quotas[i] - counts[i]))] += step
    return counts


def mixed(sets: Sequence[TokenSet], *, seed: int | None) -> TokenSet:
    """Rows of several token sets as one: in an order drawn with `seed`, or one set after the other.
    They have one length."""
    ids = torch.cat([tokens.ids for tokens in sets])
    if seed is not None:
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    first = next((tokens.first_skipped for tokens in sets if tokens.skipped), "")
    met = BadRows(count=sum(tokens.skipped for tokens in sets), first=first)
    source = "; ".join(f"{len(tokens.ids)} rows of {tokens.source}" for tokens in sets)
    return _token_set(ids, source, "; ".join(dict.fromkeys(t.sampling for t in sets)), met)


def token_set(ids: Tensor, *, like: TokenSet, sampling: str) -> TokenSet:
    """Rows that were taken out of another set's."""
    met = BadRows(count=like.skipped, first=like.first_skipped)
    return _token_set(ids, like.source, sampling, met)


def _token_set(ids: Tensor, source: str, sampling: str, met: BadRows) -> TokenSet:
    ids = ids.to(torch.int64).contiguous()
    digest = hashlib.sha256(f"{list(ids.shape)}".encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    return TokenSet(
        ids=ids,
        sha256=digest.hexdigest(),
        source=source,
        sampling=sampling,
        skipped=met.count,
        first_skipped=met.first,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """Ids of joined documents [tokens], where conversations begin in them, what was read, and in
    words what of it was not taken."""

    ids: Tensor
    starts: Sequence[int]
    source: str
    skipped: str


def _too_short(stream: _Stream, needed: int) -> DataError:
    return DataError(
        f"the text ({stream.source or 'no documents'}) has {len(stream.ids)} tokens where "
        f"{needed} are needed{stream.skipped}",
        "give more text, or ask for fewer or shorter rows",
    )


class _Reader:
    """Reads documents as far as they are asked for."""

    def __init__(self, tokenizer: Tokenizer, documents: Iterator[Document], met: BadRows) -> None:
        self.tokenizer = tokenizer
        self._unread = documents
        self._met = met
        self._taken: list[_Piece] = []
        self._sources: dict[str, None] = {}
        self._size = 0

    @property
    def source(self) -> str:
        """Where what was read came from."""
        return ", ".join(self._sources)

    def text(self, characters: int) -> str | None:
        """The first `characters` characters, or None where not all documents are plain text."""
        self._read(characters)
        if any(piece.begins or piece.ids for piece in self._taken):
            return None
        return "".join(piece.text for piece in self._taken)[:characters]

    def stream(self, *, tokens: int, characters: int) -> _Stream:
        """Tokens of `characters` characters, and of more while they are fewer than `tokens`."""
        while True:
            self._read(characters)
            drop = max(self._size - characters, 0)
            ids, starts = _tokenize(self.tokenizer, self._taken, drop=drop)
            if self._size < characters or len(ids) >= tokens + CUT_TOKENS:
                met = self._met
                skipped = (
                    f"; {met.count} rows were skipped, the first: {met.first}" if met.count else ""
                )
                return _Stream(torch.tensor(ids, dtype=torch.int64), starts, self.source, skipped)
            characters *= 4

    def _read(self, characters: int) -> None:
        while self._size < characters and (document := next(self._unread, None)) is not None:
            try:
                text = check_document(self.tokenizer, document)
            except DataError as error:
                self._met.meet(error)
                continue
            piece = _Piece(text, begins=bool(document.messages), ids=document.ids)
            self._taken.append(piece)
            self._sources[document.source] = None
            self._size += len(piece.text) + len(piece.ids) * CHARACTERS_OF_TOKEN


@dataclass(frozen=True, slots=True)
class _Piece:
    """A document as the tokenizer takes it: text, the start of a conversation or not, or ids."""

    text: str = ""
    begins: bool = False
    ids: tuple[int, ...] = ()


def check_document(tokenizer: Tokenizer, document: Document) -> str:
    """The text of a document; empty for token ids. Raises DataError, which names the row, for what
    the tokenizer does not know."""
    if not document.ids:
        return written_out(tokenizer, document)
    if max(document.ids) >= len(tokenizer):
        raise DataError(
            f"{document.where} holds token {max(document.ids)}, the tokenizer knows "
            f"{len(tokenizer)}",
            "token ids have to be those of this model's tokenizer",
        )
    return ""


def _tokenize(
    tokenizer: Tokenizer, pieces: Sequence[_Piece], *, drop: int
) -> tuple[list[int], list[int]]:
    """Ids of the pieces without the last `drop` characters of text, and conversation starts."""
    ids: list[int] = []
    starts: list[int] = []
    texts: list[str] = []
    for piece in pieces:
        if piece.begins or piece.ids:
            ids += encode(tokenizer, "".join(texts))
            texts.clear()
        if piece.begins:
            starts.append(len(ids))
            ids += encode(tokenizer, piece.text)
        elif piece.ids:
            ids += piece.ids
        else:
            texts.append(piece.text)
    rest = "".join(texts)
    return ids + encode(tokenizer, rest[: max(len(rest) - drop, 0)]), starts


def written_out(tokenizer: Any, document: Document) -> str:
    """The text of a document, a conversation as the tokenizer's chat template writes it. Raises
    DataError, which names the row, where the template cannot."""
    if document.ids:
        return str(tokenizer.decode(document.ids))
    if not document.messages:
        return document.text
    # A chat template is a program that came with the checkpoint: it can fail in any way.
    try:
        text = str(tokenizer.apply_chat_template(list(document.messages), tokenize=False))
        text.encode("utf-8")
        return text
    except Exception as error:
        where = document.where or document.source
        raise DataError(
            f"{where}: the tokenizer cannot write out the conversation: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}",
            "conversations need a tokenizer with a chat template that knows their roles; "
            "skip_bad_rows: true passes over rows, text_field names another field",
        ) from error


def _automatic_bos(tokenizer: Tokenizer) -> int | None:
    """The BOS id, if the tokenizer puts one before a text by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    plain = encode(tokenizer, "a")
    return bos if tokenizer("a")["input_ids"][:1] == [bos] != plain[:1] else None


def _choose(stream: _Stream, *, samples: int, length: int, seed: int) -> tuple[list[int], str]:
    """Where the random windows begin, in random order, and in words how they lie."""
    draw = torch.Generator().manual_seed(seed)
    if stream.starts:
        return _choose_conversations(stream, draw, samples=samples, length=length)
    total = len(stream.ids)
    slack = total - samples * length
    if slack >= 0:
        gaps = torch.randint(slack + 1, (samples,), generator=draw).sort().values
        starts = gaps + torch.arange(samples) * length
        how = "non-overlapping"
    else:
        needed = tokens_needed(samples, length, "random")
        if total < needed:
            raise _too_short(stream, needed)
        starts = torch.arange(samples) * (total - length) // (samples - 1)
        how = "overlapping"
    return starts[torch.randperm(samples, generator=draw)].tolist(), how


def _choose_conversations(
    stream: _Stream, draw: torch.Generator, *, samples: int, length: int
) -> tuple[list[int], str]:
    starts = [start for start in stream.starts if start + length <= len(stream.ids)]
    if len(starts) < samples:
        raise DataError(
            f"{stream.source} has {len(stream.ids)} tokens and {len(starts)} conversations that "
            f"{length} tokens follow, where {samples} are needed{stream.skipped}",
            "give more conversations, or ask for fewer or shorter rows",
        )
    free = torch.ones(len(stream.ids), dtype=torch.bool)
    apart: list[int] = []
    others: list[int] = []
    for index in torch.randperm(len(starts), generator=draw).tolist():
        window = free[starts[index] : starts[index] + length]
        if bool(window.all()):
            window.fill_(False)
            apart.append(starts[index])
        else:
            others.append(starts[index])
    how = "non-overlapping" if len(apart) >= samples else "overlapping"
    return (apart + others)[:samples], f"{how}, each from where a conversation begins"

"""Token sets of a recipe: for calibration, and held out for evaluation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor_calibration.bundled import Part
from compressor_calibration.documents import BadRows, DataError, Unreachable
from compressor_calibration.overlap import overlap
from compressor_calibration.tokens import (
    Sampling,
    TokenSet,
    check_document,
    make_tokens,
    mixed,
    shares,
    tokens_needed,
    written_out,
)

from compressor.errors import CompressError, InputError, MachineError, under
from compressor.evaluate.passkey import haystack_characters, make_rows
from compressor.evaluate.settings import Evaluation
from compressor.evaluate.text import Data, Mixture, Weighted
from compressor.plan.calibration import Calibration
from compressor.plan.plan import Plan
from compressor.runner.tokenizer import load_tokenizer

KEYS: Mapping[Part, str] = {"calibration": "calibration.data", "held_out": "evaluate.data"}
LOOKED_AT = 1_000_000
"""Bytes of text that `check_data` reads at most."""
ROWS_LOOKED_AT = 16


def calibration_tokens(
    tokenizer: Any, wanted: Calibration, *, seed: int, candidates: bool = False
) -> TokenSet:
    """Rows of calibration tokens. Raises InputError where the data does not give them.

    candidates  the windows that the rows are to be selected from, where there is a choice
    """
    samples, length = wanted.looked_at if candidates else (wanted.samples, wanted.length)
    return _tokens(
        tokenizer,
        wanted,
        part="calibration",
        samples=samples,
        length=length,
        sampling=wanted.sampling,
        seed=seed,
    )


def _tokens(
    tokenizer: Any,
    wanted: Mixture,
    *,
    part: Part,
    samples: int,
    length: int,
    sampling: Sampling,
    seed: int,
) -> TokenSet:
    """Rows of one source, or of each its share: random ones in an order of the seed's."""

    def rows_of(source: Weighted, rows: int) -> TokenSet:
        met = BadRows(skip=source.skip_bad_rows)
        with _data_errors(KEYS[part]):
            return make_tokens(
                tokenizer,
                source.documents(part, met),
                samples=rows,
                length=length,
                sampling=sampling,
                seed=seed,
                bad_rows=met,
            )

    # One after the other: encodings of all sources at once take half a gigabyte more.
    sets = [rows_of(source, rows) for source, rows in _shared(wanted, samples)]
    if len(sets) == 1:
        return sets[0]
    return mixed(sets, seed=seed if sampling == "random" else None)


def _shared(wanted: Mixture, rows: int) -> list[tuple[Weighted, int]]:
    """The sources that get rows, and how many."""
    sources = wanted.sources()
    counts = shares([source.weight for source in sources], rows)
    return [(s, count) for s, count in zip(sources, counts, strict=True) if count]


def passkey_text(tokenizer: Any, wanted: Evaluation) -> str:
    """The held-out text that the passkey probe hides its key in; empty without a probe. Raises
    InputError where it is too short for the rows."""
    task = wanted.passkey
    if task is None:
        return ""
    characters = haystack_characters(task)
    found: list[str] = []
    with _data_errors("evaluate.data"):
        for text in _texts(tokenizer, wanted):
            found.append(text)
            if sum(map(len, found)) >= characters:
                break
    text = "".join(found)[:characters]
    with under("evaluate.passkey"):
        for length in task.lengths:
            make_rows(tokenizer, text, task=task, length=length)
    return text


def _texts(tokenizer: Any, wanted: Evaluation) -> Iterator[str]:
    """Held-out texts, one source after the other. Raises DataError."""
    for source in wanted.sources():
        met = BadRows(skip=source.skip_bad_rows)
        for document in source.documents("held_out", met):
            try:
                yield written_out(tokenizer, document)
            except DataError as error:
                met.meet(error)


def evaluation_tokens(
    tokenizer: Any, wanted: Evaluation, *, calibration: TokenSet | None
) -> TokenSet:
    """Held-out rows. Raises InputError where they overlap the calibration tokens, unless forced."""
    tokens = _tokens(
        tokenizer,
        wanted,
        part="held_out",
        samples=wanted.windows,
        length=wanted.length,
        sampling="consecutive",
        seed=0,
    )
    if calibration is not None and not wanted.force:
        shared = overlap(calibration, tokens)
        if shared:
            raise InputError(
                f"{shared} passages of the evaluation text are also calibration text",
                hint="evaluate on other text, or set evaluate.force: true",
            )
    return tokens


def skipped_notes(calibration: TokenSet | None, evaluation: TokenSet | None) -> list[str]:
    """A line for each token set whose data had rows that were passed over."""
    sets = dict(zip(KEYS.values(), (calibration, evaluation), strict=True))
    return [
        f"{key}: {rows.skipped} bad row{'s were' if rows.skipped > 1 else ' was'} skipped, "
        f"the first: {rows.first_skipped}"
        for key, rows in sets.items()
        if rows is not None and rows.skipped
    ]


def check_data(plan: Plan) -> tuple[list[CompressError], list[str]]:
    """What is wrong with the first rows of a recipe's data, and notes on data that the network
    does not give now.

    The model's tokenizer is used only where it is at hand and rows are conversations.
    """
    problems: list[CompressError] = []
    notes: list[str] = []
    recipe = plan.recipe
    looks: list[tuple[str, Part, Mixture, int, int, Sampling]] = []
    if plan.calibrated:
        rows = recipe.calibration
        key = KEYS["calibration"]
        looks.append((key, "calibration", rows, *rows.looked_at, rows.sampling))
    if recipe.evaluate is not None:
        held_out = recipe.evaluate
        key, windows = KEYS["held_out"], held_out.windows
        looks.append((key, "held_out", held_out, windows, held_out.length, "consecutive"))
    if (audit := recipe.audit) is not None and not audit.weights_only:
        text = Mixture(data=audit.text)
        looks.append(("audit.text", "calibration", text, audit.contexts, audit.length, "random"))
    folder = plan.source.checkpoint.folder
    for key, part, wanted, samples, length, sampling in looks:
        for source, count in _shared(wanted, samples):
            try:
                with _data_errors(key):
                    _look(source, part, tokens_needed(count, length, sampling), folder)
            except MachineError as error:
                notes.append(error.message)
            except CompressError as error:
                problems.append(error)
    return problems, notes


def _look(data: Data, part: Part, needed: int, folder: Path) -> None:
    """Read the first rows. Raises DataError for a row that a run would stop at, and for text that
    is surely too short: a token stands for one byte or more, but for what normalization adds."""
    met = BadRows(skip=data.skip_bad_rows)
    size = 0
    tokenizer = None
    for rows, document in enumerate(data.documents(part, met), 1):
        if document.messages or document.ids:
            if rows > ROWS_LOOKED_AT:
                return
            if (folder / "tokenizer.json").is_file():
                tokenizer = tokenizer or load_tokenizer(folder)
                try:
                    check_document(tokenizer, document)
                except DataError as error:
                    met.meet(error)
        # How long a conversation gets, only its template knows.
        size += needed if document.messages else len(document.ids) + len(document.text.encode())
        if document.text and size >= min(needed, LOOKED_AT):
            return
    if 2 * size < needed:
        raise DataError(
            f"the text ({data.data}) has {size} bytes where {needed} tokens are needed",
            "give more text, or ask for fewer or shorter rows",
        )


@contextmanager
def _data_errors(key: str) -> Iterator[None]:
    """What is wrong with data, under the recipe's name for it."""
    try:
        yield
    except Unreachable as error:
        raise MachineError(f"{key}: {error.message}", hint=error.hint) from error
    except DataError as error:
        raise InputError(f"{key}: {error.message}", hint=error.hint) from error
    except (ConnectionError, TimeoutError) as error:
        raise MachineError(f"{key}: {error}", hint="check the network") from error

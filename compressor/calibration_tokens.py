"""Token sets of a recipe: for calibration, and held out for evaluation."""

from __future__ import annotations

from typing import Any

from compressor_calibration.sources import DataError, read_documents
from compressor_calibration.tokens import TokenSet, make_tokens, overlap

from compressor.errors import InputError, MachineError
from compressor.evaluation_settings import Evaluation
from compressor.passkey import haystack_characters, make_rows
from compressor.recipe import Calibration


def calibration_tokens(tokenizer: Any, wanted: Calibration, *, seed: int) -> TokenSet:
    """Rows of calibration tokens. Raises InputError where the data does not give them."""
    try:
        documents = read_documents(
            wanted.data,
            part="calibration",
            split=wanted.split,
            text_field=wanted.text_field,
        )
        return make_tokens(
            tokenizer,
            documents,
            samples=wanted.samples,
            length=wanted.length,
            sampling=wanted.sampling,
            seed=seed,
        )
    except DataError as error:
        raise InputError(f"calibration.data: {error}", hint=error.hint) from error
    except (ConnectionError, TimeoutError) as error:
        raise MachineError(f"calibration.data: {error}", hint="check the network") from error


def passkey_text(tokenizer: Any, wanted: Evaluation) -> str:
    """The held-out text that the passkey probe hides its key in; empty without a probe. Raises
    InputError where it is too short for the rows."""
    task = wanted.passkey
    if task is None:
        return ""
    characters = haystack_characters(task)
    found, length = [], 0
    try:
        for document in read_documents(
            wanted.data, part="held_out", split=wanted.split, text_field=wanted.text_field
        ):
            found.append(document.text)
            length += len(document.text)
            if length >= characters:
                break
    except DataError as error:
        raise InputError(f"evaluate.data: {error}", hint=error.hint) from error
    text = "".join(found)[:characters]
    try:
        for length in task.lengths:
            make_rows(tokenizer, text, task=task, length=length)
    except InputError as error:
        raise InputError(f"evaluate.passkey: {error.message}", hint=error.hint) from error
    return text


def evaluation_tokens(
    tokenizer: Any, wanted: Evaluation, *, calibration: TokenSet | None
) -> TokenSet:
    """Held-out rows. Raises InputError where they overlap the calibration tokens, unless forced."""
    try:
        documents = read_documents(
            wanted.data, part="held_out", split=wanted.split, text_field=wanted.text_field
        )
        tokens = make_tokens(
            tokenizer,
            documents,
            samples=wanted.windows,
            length=wanted.length,
            sampling="consecutive",
            seed=0,
        )
    except DataError as error:
        raise InputError(f"evaluate.data: {error}", hint=error.hint) from error
    except (ConnectionError, TimeoutError) as error:
        raise MachineError(f"evaluate.data: {error}", hint="check the network") from error
    if calibration is not None and not wanted.force:
        shared = overlap(calibration, tokens)
        if shared:
            raise InputError(
                f"{shared} passages of the evaluation text are also calibration text",
                hint="evaluate on other text, or set evaluate.force: true",
            )
    return tokens

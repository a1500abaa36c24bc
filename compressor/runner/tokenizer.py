"""A checkpoint's own tokenizer. Its files are a stranger's: its regular expressions may run for
ever, and its chat template is a program."""

from pathlib import Path
from typing import Any

from compressor.checkpoint.reader import NO_TOKENIZER, load_json
from compressor.errors import InputError
from compressor.foreign.calls import bounded, memory_bound, panics_unheard
from compressor.runner.generation_import import import_generation

LOAD_SECONDS = 60.0
PROBE_SECONDS = 15.0
TEMPLATE_SECONDS = 10.0
TEMPLATE_BYTES = 512 << 20
TEMPLATE_CHARACTERS = 10_000_000
CHARACTERS_PER_SECOND = 5_000
"""Far below the slowest tokenizer."""

PROBE = "The year 2024, naïve: 木\n\t" + "a" * 200 + " " * 200 + "1" * 200 + "!"
"""Words, and runs that expressions with nested repeats do not come to an end with."""

HINT = "text is tokenized with the model's own tokenizer.json"


class GuardedTokenizer:
    """A transformers tokenizer whose every failure is an InputError, in bounded time."""

    def __init__(self, wrapped: Any, *, name: str) -> None:
        self.wrapped = wrapped
        self.name = name

    def __call__(self, text: str, **options: Any) -> Any:
        """A mapping whose "input_ids" are the token ids of `text`."""
        return bounded(
            lambda: self.wrapped(text, **options),
            what=f"the tokenizer of {self.name} cannot tokenize a text",
            seconds=PROBE_SECONDS + len(text) / CHARACTERS_PER_SECOND,
            hint=HINT,
        )

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """A conversation written out as the model was trained on it.

        InputError where that takes more than `TEMPLATE_SECONDS`, `TEMPLATE_BYTES` of memory or
        comes to more than `TEMPLATE_CHARACTERS`.
        """
        what = f"the chat template of {self.name}"
        try:
            with memory_bound(TEMPLATE_BYTES):
                text = bounded(
                    lambda: self.wrapped.apply_chat_template(conversation, **options),
                    what=f"{what} cannot write out a conversation",
                    seconds=TEMPLATE_SECONDS,
                )
        except MemoryError as error:
            bound = f"{TEMPLATE_BYTES >> 20} MB"
            raise InputError(f"{what} takes more than {bound} for a conversation") from error
        if isinstance(text, str) and len(text) > TEMPLATE_CHARACTERS:
            raise InputError(f"{what} makes {len(text)} characters of a conversation")
        return text

    def __len__(self) -> int:
        """Tokens that are known."""
        return len(self.wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


def load_tokenizer(folder: Path) -> GuardedTokenizer:
    """The checkpoint's tokenizer, after it tokenized a few words.

    Raises InputError where there is none, or none that works.
    """
    if (folder / NO_TOKENIZER).is_file():
        said = load_json(folder / NO_TOKENIZER, what="record")
        raise InputError(str(said.get("message")), hint=str(said.get("hint")))
    for path in folder.glob("*.json"):
        if path.exists() and not path.is_file():
            # A pipe would be waited for.
            raise InputError(f"tokenizer file {path} is not a regular file")
    # Before the clock runs.
    import_generation()
    from transformers import AutoTokenizer

    with panics_unheard():
        tokenizer = bounded(
            lambda: AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False),
            what=f"{folder} has no tokenizer that loads",
            seconds=LOAD_SECONDS,
            hint=HINT,
        )
        found = GuardedTokenizer(tokenizer, name=folder.name)
        ids = found(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(f"the tokenizer of {folder.name} makes no tokens of a text", hint=HINT)
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(found, name, None)
        if value is not None and type(value) is not int:
            raise InputError(f"the tokenizer of {folder.name} has {value!r} as its {name}")
    return found

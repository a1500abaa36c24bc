"""Passkeys that are hidden in texts: their words, the sentences around them, and their tokens."""

import string
from typing import Any, Protocol

# fmt: off
WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india",
    "juliett", "kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra",
    "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu",
)
# fmt: on
"""What a passkey is made of: words that no text has in such an order."""


def check_fields(text: str, *names: str) -> str:
    """The text, if it has just these fields, each once and bare; ValueError if not."""
    found = [field for field in string.Formatter().parse(text) if field[1] is not None]
    bare = all(not spec and not conversion for _, _, spec, conversion in found)
    if not bare or sorted(str(name) for _, name, _, _ in found) != sorted(names):
        wanted = " and ".join(f"{{{name}}}" for name in names)
        raise ValueError(f"must contain {wanted} once, and no other field")
    return text


def check_end(text: str) -> str:
    """The text, if the passkey ends it; ValueError if not."""
    if not text.endswith("{passkey}"):
        raise ValueError("must end with {passkey}")
    return text


class Encoder(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: str, **options: Any) -> Any:
        """A mapping whose "input_ids" are the token ids of `text`."""


def encode_key(tokenizer: Encoder, before: str, key: str) -> tuple[list[int], list[int]]:
    """Tokens of what comes before a key, and of the key.

    The space between them belongs to the key's first token in every common vocabulary.
    """
    space = " " if before.endswith(" ") else ""
    return encode(tokenizer, before.removesuffix(" ")), encode(tokenizer, space + key)


def encode(tokenizer: Encoder, text: str) -> list[int]:
    """Tokens of a text, with no special ones; no warning is wanted of its length."""
    if not text:
        return []
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found

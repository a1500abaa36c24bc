"""The model card: README.md with metadata the Hub understands, how to load the checkpoint, what was
measured, and the recipe that made it. It stands outside the manifest."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compressor.checkpoint.durable import write_atomically
from compressor.checkpoint.side_files import leads_out
from compressor.errors import MachineError
from compressor.formats.base import ModelSchemes
from compressor.formats.loading import loading_of
from compressor.report.text import MISSING, factor, size, with_error

CARD_NAME = "README.md"
CARRIED = ("license", "license_name", "license_link", "language")
"""Keys of the source's card that hold for what is made from it."""

LARGEST_HEAD = 1 << 16
"""Bytes of a source's card that are read."""
SEAL = re.compile(r"\n<!-- generated; replaced as long as nobody edits it: ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True, slots=True)
class CardData:
    """What a card says.

    title       name of the artefact;  repository  Hub id in the examples, or its own name
    base_model  Hub id of the source, or None where it has none
    inherited   metadata of the source's card (`source_metadata`)
    recipe      the resolved recipe as plain data
    evaluation, passkey  `to_json()` of their results, or None
    tasks       task of the harness → {"value", "error"}
    verified    whether `verify` passed, or None where it did not run
    """

    title: str
    repository: str
    base_model: str | None
    inherited: Mapping[str, Any]
    format: str
    schemes: ModelSchemes
    recipe: Mapping[str, Any]
    source_bytes: int
    output_bytes: int
    evaluation: Mapping[str, Any] | None = None
    passkey: Mapping[str, Any] | None = None
    tasks: Mapping[str, Mapping[str, float]] | None = None
    verified: bool | None = None


def source_metadata(folder: Path) -> dict[str, Any]:
    """Licence and language from the card in a source folder; empty where it says nothing usable."""
    path = folder / CARD_NAME
    try:
        if not path.is_file() or leads_out(folder, path):
            return {}
        with path.open("rb") as handle:
            text = handle.read(LARGEST_HEAD).decode("utf-8-sig", "ignore")
        # Scalars stay text: to YAML 1.1 `no` is a boolean, to the Hub the Norwegian language.
        data = yaml.load(_front(text), yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: data[key] for key in CARRIED if _is_text(data.get(key))}


def _front(text: str) -> str:
    """The YAML head of a card, without the lines around it."""
    first, *lines = text.splitlines() or [""]
    rules = (number for number, line in enumerate(lines) if line.rstrip() == "---")
    end = next(rules, None) if first.rstrip() == "---" else None
    return "" if end is None else "\n".join(lines[:end])


def write_card(folder: Path, data: CardData) -> bool:
    """Write the card into a checkpoint folder, unless one is there that somebody wrote by hand;
    whether it was written. Raises MachineError where it cannot be."""
    path = folder / CARD_NAME
    try:
        if path.exists() and not is_generated(path.read_bytes()):
            return False
        write_atomically(path, make_card(data).encode())
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from error
    return True


def is_generated(card: bytes) -> bool:
    """Whether a card is as this program wrote it: its seal holds the hash of all before it."""
    text = card.decode("utf-8", "replace").replace("\r\n", "\n")
    seal = SEAL.search(text)
    return seal is not None and seal[1] == _hash(text[: seal.start()])


def _sealed(text: str) -> str:
    text = text.rstrip("\n")
    return f"{text}\n<!-- generated; replaced as long as nobody edits it: {_hash(text)} -->\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def name_repository(folder: Path, repository: str) -> None:
    """Have a card's examples load the checkpoint from a Hub repository. A card that somebody
    edited stays as it is."""
    path = folder / CARD_NAME
    if not path.is_file() or not is_generated(path.read_bytes()):
        return
    before = path.read_text("utf-8")
    after = re.sub(r'(?m)^name = ".*"$', lambda _: f"name = {json.dumps(repository)}", before)
    after = re.sub(r"(?m)^vllm serve \S.*$", lambda _: f"vllm serve {_line(repository)}", after)
    if after != before:
        write_atomically(path, _sealed(SEAL.sub("", after)).encode())


def make_card(data: CardData) -> str:
    """The card's text, sealed."""
    front = yaml.safe_dump(metadata(data), sort_keys=False, allow_unicode=True, width=1000)
    parts = [
        f"---\n{front}---",
        f"# {_line(data.title)}",
        _summary(data),
        _loading(data),
        _measured(data),
        _recipe(data),
    ]
    return _sealed("\n\n".join(part for part in parts if part) + "\n")


def metadata(data: CardData) -> dict[str, Any]:
    """The card's YAML head."""
    found: dict[str, Any] = {key: data.inherited[key] for key in CARRIED if key in data.inherited}
    if data.base_model:
        found |= {"base_model": data.base_model, "base_model_relation": "quantized"}
    found["library_name"] = "transformers"
    found["pipeline_tag"] = "text-generation"
    found["tags"] = tags(data)
    return found


def tags(data: CardData) -> list[str]:
    """What the Hub filters by: format, passes, bits and elements."""
    found = [] if data.format == "dense" else [data.format]
    found += [str(name) for step in data.recipe.get("passes", ()) for name in step]
    for scheme in data.schemes.linears.values():
        if scheme.weight is None:
            continue
        element = scheme.weight.element.partition("_")[0]
        kind = f"int{scheme.weight.bits}" if element == "int" else element
        found += [f"{scheme.weight.bits}-bit", kind]
        if scheme.input is not None:
            found.append(f"a-{scheme.input.element.partition('_')[0]}")
    if data.schemes.kv is not None:
        found.append(f"kv-{data.schemes.kv.element.partition('_')[0]}")
    return list(dict.fromkeys(found))


def _summary(data: CardData) -> str:
    source = data.base_model or str(data.recipe.get("model", "a local model"))
    before, after = data.source_bytes, data.output_bytes
    lines = [
        f"A quantized version of `{_line(source)}`: {size(after)} in the {data.format} format, "
        f"{factor(before, after)} smaller than the {size(before)} it was made from."
    ]
    if data.verified is not None:
        lines.append(
            "The written files were read back and checked by independent readers; "
            "`compress verify` repeats that on a downloaded copy, from `manifest.json`."
            if data.verified
            else "**The written files did not pass verification.**"
        )
    if "license" not in data.inherited:
        lines.append("The source names no licence; ask its authors before you share this.")
    return "\n\n".join(lines)


def _loading(data: CardData) -> str:
    how = loading_of(data.format, data.schemes)
    parts = ["## How to load it"]
    if how.transformers:
        code = (
            ("import torch\n" if "torch." in how.arguments else "")
            + f"from transformers import AutoModelForCausalLM, AutoTokenizer{how.imports}\n\n"
            f"name = {json.dumps(data.repository)}\n"
            "tokenizer = AutoTokenizer.from_pretrained(name)\n"
            f"model = AutoModelForCausalLM.from_pretrained(name{how.arguments})\n"
            'inputs = tokenizer("The sea was", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))\n"
        )
        parts.append("With transformers:")
        if how.install:
            parts.append(_fenced(how.install, "bash"))
        parts.append(_fenced(code, "python"))
        if how.note:
            parts.append(how.note)
    else:
        parts.append(f"transformers does not read the {data.format} format.")
    if how.vllm:
        parts += ["With vLLM:", _fenced(f"vllm serve {_line(data.repository)}", "bash")]
    else:
        parts.append(f"vLLM does not read the {data.format} format.")
    if how.note and not how.transformers:
        parts.append(how.note)
    return "\n\n".join(parts)


def _measured(data: CardData) -> str:
    rows: list[Sequence[str]] = []
    found = data.evaluation or {}
    for key, title, original in (
        ("perplexity", "perplexity", "original_perplexity"),
        ("perplexity_ratio", "perplexity relative to the original", ""),
        ("kl", "KL divergence from the original, nats", ""),
        ("top1", "top-1 agreement with the original", ""),
    ):
        if found.get(key):
            rows.append((title, _estimate(found[key]), _estimate(found.get(original))))
    if data.passkey:
        accuracy, theirs = data.passkey["accuracy"], data.passkey.get("original_accuracy")
        tokens = data.passkey.get("tokens")
        title = f"passkey retrieval, of {tokens} tokens" if tokens else "passkey retrieval"
        rows.append((title, _estimate(accuracy), _estimate(theirs)))
    for name, value in (data.tasks or {}).items():
        documents = value.get("documents")
        title = f"{name}, {documents} documents" if documents else name
        rows.append((title, _estimate(value), MISSING))
    if not rows:
        return ""
    table = "\n".join(f"| {_line(a)} | {b} | {c} |" for a, b, c in rows)
    about = "One standard error follows ±."
    if found:
        about = (
            f"Over {found['tokens']:,} tokens in {found['windows']} windows of {found['length']}, "
            "on the written files, with everything that is quantized at run time applied; one "
            "standard error follows ±."
        )
    return (
        f"## Evaluation\n\n{about}\n\n| measure | this model | original |\n|---|---|---|\n{table}"
    )


def _recipe(data: CardData) -> str:
    text = yaml.safe_dump(dict(data.recipe), sort_keys=False, allow_unicode=True, width=100)
    about = "`compress run recipe.yaml` makes this checkpoint from"
    return f"## Recipe\n\n{about}\n\n{_fenced(text, 'yaml')}"


def _estimate(value: Mapping[str, float | None] | None) -> str:
    return with_error(value) if value else MISSING


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _line(text: str) -> str:
    """Text that stays on its line and in its table cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(entry, str) for entry in value)
    return isinstance(value, str) and value.lower() not in ("", "~", "null")

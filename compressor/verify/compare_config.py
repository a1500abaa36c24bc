"""What beside the weights decides what a model does: config, tokenizer, templates, token ids."""

import fnmatch
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressor.checkpoint.manifest import as_recorded
from compressor.checkpoint.reader import load_json
from compressor.checkpoint.side_files import DECIDING
from compressor.checkpoint.source import Source, is_cache_scale
from compressor.checkpoint.target import FLOATS
from compressor.errors import InputError, several
from compressor.ir.tensor import dtype_name, dtype_of_most
from compressor.runner.model import resolved_config

NOT_THE_FUNCTION = (
    "_name_or_path",
    "*dropout*",
    "*_pdrop",
    "dtype",
    "initializer_range",
    "name_or_path",
    "output_*",
    "quantization_config",
    "return_dict",
    "router_aux_loss_coef",
    "sparse_attention_config",
    "sparse_config",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Keys of config.json that training or saving read. How weights are stored, whether the head is,
and the attention policy are held against the original by what they stand for."""

SHOWN = 80
"""Characters of a value in a message."""

PROVENANCE = ("transformers_version", "_from_model_config", "name_or_path", "_commit_hash")


def declared_problems(folder: Path, declared: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys of config files that are not as they were written.

    declared  name of a file → its content, as the manifest has it
    """
    problems = []
    for name, content in declared.items():
        try:
            now = as_recorded(json.dumps(load_json(folder / name, what=name)))
        except InputError as error:
            problems.append(error.message)
            continue
        problems += [
            f"{name} says {key} {here}, the run wrote {before}"
            for key, here, before in _apart(_flat(now), _flat(content))
        ]
    return problems


def storage_problems(written: Source, original: Source) -> list[str]:
    """Where config.json says otherwise than the original how weights and cache are stored, and no
    tensor bears it out."""
    problems = []
    said, before = written.checkpoint.dtype, original.checkpoint.dtype
    entries = written.checkpoint.entries
    floats = [entries[n].spec for u in written.layout.units for n in u.tensors if n in entries]
    stored = dtype_of_most(spec for spec in floats if spec.dtype in FLOATS)
    if said not in (before, stored) and stored is not None:
        most = dtype_name(stored)
        problems.append(f"config.json says dtype {dtype_name(said)}, most floats are {most}")
    scales = [n for n in _added(written) if is_cache_scale(n)]
    if scales and written.schemes.kv is None and not any(map(is_cache_scale, _added(original))):
        problems.append(f"config.json says of no quantized cache, which has {several(scales, 2)}")
    return problems


def _added(source: Source) -> Iterator[str]:
    for names in source.added.values():
        yield from names


def deciding_files(folder: Path, patterns: tuple[str, ...] = DECIDING) -> set[str]:
    """Names of the files of a folder that decide what its model does, relative to it."""
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    names = {str(path.relative_to(folder)) for path in paths}
    return {
        name
        for name in names
        if (folder / name).is_file()
        and any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)
    }


def config_problems(
    written: Mapping[str, Any], original: Mapping[str, Any], *, known: bool = True
) -> list[str]:
    """Keys of config.json that decide the function and differ, defaults filled in where the
    model's type is known."""
    read = resolved_config if known else dict
    try:
        one, other = (_flat(read(config)) for config in (written, original))
    except InputError as error:
        return [f"config.json cannot be compared: {error.message}"]
    problems = [
        f"config.json says {key} {here}, the original {before}"
        for key, here, before in _apart(one, other)
        if one.get(key) != other.get(key)
        and not any(fnmatch.fnmatchcase(key.split(".")[0], p) for p in NOT_THE_FUNCTION)
    ]
    if one.get("tie_word_embeddings") and not other.get("tie_word_embeddings"):
        problems.append("config.json ties the head to the embedding, which the original does not")
    return problems


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Keys that are not alike, with both values, or as much of them as a line takes: of long ones
    from a little before the place where they part."""
    for key in sorted({*one, *other}):
        texts = [json.dumps(x[key], default=str) if key in x else "nothing" for x in (one, other)]
        if texts[0] == texts[1]:
            continue
        shortest = min(map(len, texts))
        same = next((i for i in range(shortest) if texts[0][i] != texts[1][i]), shortest)
        begin = max(same - SHOWN // 2, 0) if max(map(len, texts)) > SHOWN else 0
        yield key, _piece(texts[0], begin), _piece(texts[1], begin)


def _piece(text: str, begin: int) -> str:
    end = begin + SHOWN
    return f"{'…' if begin else ''}{text[begin:end]}{'…' if end < len(text) else ''}"


def file_problems(written: Path, original: Path) -> tuple[list[str], int]:
    """Files that differ in more than how they are written down, or stand in one folder only; and
    how many are alike."""
    ours, theirs = deciding_files(written), deciding_files(original)
    problems = [f"{name} is missing: the original has it" for name in sorted(theirs - ours)]
    problems += [f"{name} is not in the original" for name in sorted(ours - theirs)]
    both = sorted(ours & theirs)
    for name in both:
        one, other = (folder / name for folder in (written, original))
        try:
            if one.read_bytes() == other.read_bytes():
                continue
            keys = _different(one, other) if name.endswith(".json") else [""]
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
            continue
        if keys:
            where = f" ({', '.join(k for k in keys[:3] if k)})" if any(keys) else ""
            problems.append(f"{name} is not the original's{where}")
    return problems, len(both)


def _different(one: Path, other: Path) -> list[str]:
    """Keys in which two JSON files differ; [""] where they are no objects."""
    try:
        mine, theirs = (json.loads(path.read_bytes()) for path in (one, other))
    except (ValueError, RecursionError):
        return [""]
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return [] if mine == theirs else [""]
    keys = sorted(set(mine) | set(theirs))
    return [k for k in keys if k not in PROVENANCE and mine.get(k) != theirs.get(k)]

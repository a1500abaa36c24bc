"""From the names in a checkpoint's files to those of its architecture map, as loaders take them.

A model that was saved from its base class lacks the prefix of the causal class, or has it where it
does not belong; transformers adds and drops it name by name. A tool that wrapped the whole model
(torch.compile, data parallelism, a multi-modal shell) leaves one more prefix on every name. Tensors
that no loader reads, such as rotary tables, are left out. What was done is said in the notes.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from compressor.arch.schema import MapFile
from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.safetensors import Entry
from compressor.errors import InputError, several

SKIPPED = {
    r"(.*\.)?rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)": "rotary tables",
    r"(.*\.)?((self_)?attn|attention)\.bias|(.*\.)?(masked_bias|causal_mask)": "attention masks",
    r"(.*\.)?position_ids": "position numbers",
    r"(.*\.)?(v_head|value_head|critic_head)\..*": "a value head",
}
"""Pattern of a name → what it is. All follow from the config, or are no part of the model."""


def canonical(checkpoint: Checkpoint, arch: MapFile) -> Checkpoint:
    """The checkpoint under its map's names, without tensors that loaders skip.

    Raises InputError where two tensors would have one name.
    """
    notes = list(checkpoint.notes)
    entries = _without_skipped(checkpoint.entries, notes)
    prefixed = {name: _with_prefix(name, arch.prefixes) for name in entries}
    inner = _names(list(prefixed.values()), arch)
    names = {name: inner[ours] for name, ours in prefixed.items()}
    renamed: dict[str, Entry] = {}
    origin: dict[str, str] = {}
    for name, entry in entries.items():
        ours = names[name]
        if ours in renamed:
            raise InputError(
                f"the checkpoint holds {ours} twice, as {origin[ours]} and as {name}",
                hint="loaders disagree on which one counts: save the model once more",
            )
        renamed[ours], origin[ours] = entry, name
    moved = [(theirs, ours) for ours, theirs in origin.items() if ours != theirs]
    if moved:
        theirs, ours = moved[0]
        notes.append(f"{len(moved)} tensors have other prefixes: {theirs} is read as {ours}")
    if not moved and len(entries) == len(checkpoint.entries):
        return checkpoint
    return replace(checkpoint, entries=renamed, notes=tuple(notes))


def _with_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """A name with the map's own prefix in place of another one."""
    other = next(filter(name.startswith, prefixes), "")
    return prefixes.get(other, "") + name.removeprefix(other)


def _without_skipped(entries: Mapping[str, Entry], notes: list[str]) -> dict[str, Entry]:
    kept = dict(entries)
    for pattern, what in SKIPPED.items():
        found = [name for name in kept if re.fullmatch(pattern, name)]
        for name in found:
            del kept[name]
        if found:
            notes.append(f"left out, as loaders do: {several(found)} ({what})")
    return kept


def _names(names: list[str], arch: MapFile) -> dict[str, str]:
    """Name in the files → name in the map, or the name itself where the map has none."""
    base = arch.layer.partition(".")[0]
    inner = {name: name for name in names}
    while True:
        found = {name: _placed(short, base, arch) for name, short in inner.items()}
        known = [name for name, ours in found.items() if ours is not None]
        if known:
            break
        shells = {short.partition(".")[0] for short in inner.values()}
        if len(shells) != 1 or not all("." in short for short in inner.values()):
            return {name: name for name in names}
        inner = {name: short.partition(".")[2] for name, short in inner.items()}
    # What stands beside known modules, such as scales of the KV cache, moves with them.
    added = {
        inner[name].partition(".")[0] for name in known if found[name] == f"{base}.{inner[name]}"
    }
    for name, short in inner.items():
        if found[name] is None:
            found[name] = f"{base}.{short}" if short.partition(".")[0] in added else short
    return {name: ours for name, ours in found.items() if ours is not None}


def _placed(name: str, base: str, arch: MapFile) -> str | None:
    """The name under which the map has this tensor's module, by the rule of transformers."""
    for candidate in (name, name.removeprefix(f"{base}."), f"{base}.{name}"):
        if arch.has_module(candidate.rpartition(".")[0]):
            return candidate
    return None

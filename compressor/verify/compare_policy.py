"""The attention policy of a checkpoint, held against its original's and the recipe beside it.

A policy has no original where a run made it. Which heads stream and which blocks are chosen follows
from the recipe's parameters and the values that were learned and stored (gates, scores), so it is
derived once more. Those values themselves have nothing to be held against.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from compressor.attention.policy import AttentionPolicy, combine, read_policy, read_policy_tensors
from compressor.checkpoint.manifest import RECIPE_NAME
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.methods.base import Method, ModelPass, get_pass
from compressor.methods.common.learned import Learned


def policy_problems(folder: Path, original: Source, written: Source) -> tuple[list[str], str]:
    """What is wrong with the policy, and what was found where nothing is; "" without a policy."""
    try:
        stored, before = read_policy(folder), read_policy(original.checkpoint.folder)
    except InputError as error:
        return [f"the attention policy cannot be compared: {error.message}"], ""
    if stored is None:
        return (["the original's attention policy is missing"] if before else []), ""
    try:
        again, made_by = _again(folder, before, stored, written)
    except InputError as error:
        return [f"the attention policy cannot be compared: {error.message}"], ""
    problems = [
        f"the attention policy's {key} is not what {made_by} make"
        for key in ("heads", "kv_heads", "positions", "reordered")
        if getattr(stored, key) != getattr(again, key)
    ]
    pairs = zip(stored.layers, again.layers, strict=False)
    problems += [
        f"the attention policy of layer {number} is not what {made_by} make"
        for number, (one, other) in enumerate(pairs)
        if one != other
    ]
    return problems + _config_problems(stored, written), f"as {made_by} make it"


def _again(
    folder: Path, before: AttentionPolicy | None, stored: AttentionPolicy, written: Source
) -> tuple[AttentionPolicy, str]:
    """The policy derived once more, and from what."""
    plain = stored.model_copy(update={"made_by": {}})
    if before is not None and before.model_copy(update={"made_by": {}}) == plain:
        return before, "the original's layers"
    if not (folder / RECIPE_NAME).is_file():
        raise InputError(f"there is no {RECIPE_NAME} that says what made it")
    tensors = read_policy_tensors(folder)
    policy = before
    for name, method in _passes(folder / RECIPE_NAME):
        if isinstance(method, ModelPass):
            made = method.policy(written.layout, _learned(name, method, stored, tensors))
            policy = policy if made is None else combine(policy, made)
    if policy is None:
        raise InputError(f"no pass of {RECIPE_NAME} makes one")
    return policy, f"the passes of {RECIPE_NAME}"


def _learned(
    name: str, method: ModelPass[Any], stored: AttentionPolicy, tensors: Mapping[str, Tensor]
) -> Learned:
    """What a method learned, as it is stored with the policy."""
    own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
    about = stored.made_by.get(name)
    found: Learned = method.learned_type().restore(own, about if isinstance(about, dict) else {})
    return found


def _passes(path: Path) -> list[tuple[str, Method]]:
    """The names and methods of a recipe as a run writes it. Raises InputError for another."""
    try:
        steps = yaml.safe_load(path.read_text("utf-8"))["passes"]
        return [(name, get_pass(name)(**params)) for step in steps for name, params in step.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{path.name} is not a recipe as a run writes it: {error}") from error


def _config_problems(stored: AttentionPolicy, written: Source) -> list[str]:
    """Where config.json repeats what a rule does for runtimes, it says the same."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for rule in {rule for layer in stored.layers for rule in layer.rules}:
        for entry, values in rule.config().items():
            entries.setdefault(entry, []).append(values)
    return [
        f"config.json's {entry}.{key} is {declared.get(key)!r}, the policy's {value!r}"
        for entry, (values, *others) in entries.items()
        if isinstance(declared := written.checkpoint.config.get(entry), dict) and not others
        for key, value in values.items()
        if declared.get(key) != value
    ]

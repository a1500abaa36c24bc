"""Architectures as data: a map file for each `model_type`, and what it says of one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from compressor.arch.bind import Headers, lay
from compressor.arch.runtime_names import RuntimeNames
from compressor.arch.schema import MapFile
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout

__all__ = ["ArchMap", "RuntimeNames", "known_model_types", "load_map"]

MAPS = Path(__file__).parent / "maps"

PARTS = ("attention", "mlp", "runtime", "sizes")
"""Keys whose value may be the name of a map that has it."""


class TextModel(BaseModel):
    """Where another model has its text model.

    config      the part of config.json that describes it
    model_type  its type, where that part does not say
    names       prefixes of its map's names → those in a checkpoint
    memory      the same in memory
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str = "text_config"
    model_type: str
    names: dict[str, str] = {}
    memory: dict[str, str] = {}


class ArchMap(MapFile):
    """One architecture: what a checkpoint of this `model_type` holds and how it may be rescaled."""

    def layout(self, config: Mapping[str, Any], headers: Headers) -> ModelLayout:
        """The units of a checkpoint with this config and these tensors (name → shape).

        Raises InputError, or Problems with all that is wrong: a variant this map is not right for,
        tensors that are missing, misshapen or not in the map.
        """
        return lay(self, config=config, headers=headers)


def known_model_types() -> list[str]:
    """Every `model_type` that has a map file."""
    return sorted(path.stem for path in MAPS.glob("*.yaml"))


def load_map(model_type: str, config: Mapping[str, Any] | None = None) -> ArchMap:
    """The map of a `model_type`. Raises InputError for an unknown one or a bad map file.

    config  config.json, which says of a model inside another what it is
    """
    if model_type not in known_model_types():
        raise InputError(
            f"no architecture map for model_type {model_type!r}",
            hint=f"known: {', '.join(known_model_types())}; for another, "
            f"add compressor/arch/maps/{model_type}.yaml",
        )
    try:
        data = _resolved(model_type)
        if isinstance(data, dict) and "text" in data:
            data = _wrapped(data, config or {})
        if isinstance(data, dict) and isinstance(data.get("attention"), dict):
            data["attention"] = [data["attention"]]  # all blocks attend alike
        # Through JSON, since strict validation takes a list for a tuple only there.
        return ArchMap.model_validate_json(json.dumps({"model_type": model_type, **data}))
    except (OSError, yaml.YAMLError, ValidationError, TypeError, KeyError) as error:
        raise InputError(f"compressor/arch/maps/{model_type}.yaml is not a map: {error}") from error


def _resolved(model_type: str) -> Any:
    """What a map file says, with what it takes from others: all of one, or a part by its key."""
    data = _read(model_type)
    if not isinstance(data, dict):
        return data
    if "same_as" in data:
        data = {**_resolved(data.pop("same_as")), **data}
    for part in PARTS:
        if isinstance(data.get(part), str):
            data[part] = _resolved(data[part])[part]
    return data


def _wrapped(data: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The map of a text model inside another one, from that of its type."""
    place = TextModel.model_validate(data.pop("text"))
    described = config.get(place.config)
    described = described if isinstance(described, dict) else {}
    model_type = described.get("model_type", place.model_type)
    inner = load_map(str(model_type)).model_dump(exclude_unset=True, exclude={"model_type"})

    def moved(name: str, names: Mapping[str, str] = place.names) -> str:
        for old, new in names.items():
            if name == old or name.startswith(f"{old}."):
                return new + name.removeprefix(old)
        return name

    head, embedding, runtime = inner["head"], inner["embedding"], inner["runtime"]
    outside = {}
    for row, key in ((embedding, "token"), (embedding, "position"), (head["norm"], "name")):
        if row.get(key) is not None:
            memory = runtime.get("outside", {}).get(row[key], row[key])
            outside[moved(row[key])] = moved(memory, place.memory)
            row[key] = moved(row[key])
    outside[moved(head["linear"])] = moved(runtime["lm_head"], place.memory)
    head["linear"] = moved(head["linear"])
    for key in ("layers", "embedding", "norm", "lm_head"):
        runtime[key] = moved(runtime[key], place.memory)
    runtime["outside"] = {ours: theirs for ours, theirs in outside.items() if ours != theirs}
    inner["layer"] = moved(inner["layer"])
    inner["biases"] = {moved(name): said for name, said in inner.get("biases", {}).items()}
    carried = [moved(name) for name in inner.get("carried", ())]
    data["carried"] = [*carried, *data.get("carried", ())]
    data["defaults"] = {**inner.get("defaults", {}), **data.get("defaults", {})}
    return {**inner, "config": place.config, **data}


def _read(model_type: str) -> Any:
    return yaml.safe_load((MAPS / f"{model_type}.yaml").read_text(encoding="utf-8"))

"""Architectures as data: a map file for each `model_type`, and what it says of one checkpoint."""

import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from compressor.arch.bind import Headers, lay
from compressor.arch.free import FreeMap, free_map
from compressor.arch.runtime_names import RuntimeNames
from compressor.arch.schema import MapFile
from compressor.arch.sizes import computed
from compressor.errors import InputError
from compressor.foreign.bounded_yaml import load_yaml
from compressor.foreign.untrusted import read_file
from compressor.ir.frozen import messages
from compressor.ir.layout import ModelLayout

__all__ = ["ArchMap", "RuntimeNames", "find_map", "known_model_types", "load_map"]

NO_MAP = "none"
"""What a recipe says to do without a map."""

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
    """Every `model_type` that has a map file, here or in an installed package."""
    return sorted({path.stem for path in MAPS.glob("*.yaml")} | _installed().keys())


def find_map(
    config: Mapping[str, Any], names: Iterable[str] = (), *, chosen: str | None = None
) -> ArchMap | FreeMap:
    """The map of a checkpoint. Raises InputError, which names the nearest map by `names` of its
    tensors, where there is none.

    chosen  what the recipe says: none, or a map file; None: that of the config's `model_type`
    """
    model_type = config.get("model_type")
    if chosen == NO_MAP:
        named = model_type or config.get("_class_name") or "unknown"
        return free_map(str(named))
    if chosen is not None:
        return _checked(Path(chosen).expanduser(), str(model_type), config)
    if not isinstance(model_type, str):
        raise InputError(
            "config.json names no model_type",
            hint="is this a transformers model? model: {path: …, map: none} rounds any weights",
        )
    if model_type not in known_model_types():
        raise unknown(model_type, nearest_map(model_type, list(names)))
    return load_map(model_type, config)


def load_map(model_type: str, config: Mapping[str, Any] | None = None) -> ArchMap:
    """The map of a `model_type`. Raises InputError for an unknown one or a bad map file.

    config  config.json, which says of a model inside another what it is
    """
    if model_type not in known_model_types():
        raise unknown(model_type, nearest_map(str(model_type), []))
    return _checked(_place(model_type), model_type, config or {})


def unknown(model_type: str, nearest: str) -> InputError:
    """That there is no map, what is nearest, and the ways out."""
    return InputError(
        f"no architecture map for model_type {model_type!r}",
        hint=f"the nearest is {nearest}: if it is the same but for its name, write "
        f"'same_as: {nearest}' into my.yaml and say model: {{path: …, map: my.yaml}} "
        "(compress map draft MODEL writes a first one); "
        "model: {path: …, map: none} rounds weights without a map (rtn, fp8, nvfp4, mxfp4)",
    )


def nearest_map(model_type: str, names: Sequence[str]) -> str:
    """The type whose map has a place for most of these tensors; of several, or without tensors,
    the one that is called most alike."""
    paths = {name.rpartition(".")[0] for name in names}

    def likeness(known: str) -> tuple[int, float]:
        arch = load_map(known) if paths else None
        places = sum(arch.has_module(path) for path in paths) if arch is not None else 0
        return places, difflib.SequenceMatcher(None, known, model_type).ratio()

    return max(known_model_types(), key=likeness)


def _checked(path: Path, model_type: str, config: Mapping[str, Any]) -> ArchMap:
    """A map file as a map."""
    shown = path.name if path.parent == MAPS else str(path)
    try:
        data = _resolved(path)
        if isinstance(data, dict) and "text" in data:
            data = _wrapped(data, config)
        if isinstance(data, dict) and isinstance(data.get("attention"), dict):
            data["attention"] = [data["attention"]]  # all blocks attend alike
        if isinstance(data, dict) and isinstance(data.get("runtime"), dict):
            twin = data.get("twin")
            within = data.get("config") if twin is not None else None
            handed = _handed(data, config)
            beside = data.get("twin_config", {}) if config else {}
            if not isinstance(beside, dict):
                raise ValueError("twin_config is not a mapping")
            said = {
                **data.get("defaults", {}),
                **{k: v for k, v in config.items() if v is not None},
            }
            values = {key: computed(text, said) for key, text in beside.items()}
            head = data.get("head") if config else None
            scale = head.get("scale") if isinstance(head, dict) else None
            own = {"twin": twin, "within": within, "twin_config": values, "handed": handed}
            own["logit_scale"] = None if scale is None else computed(scale, said)
            if own["logit_scale"] == 0:
                raise InputError(f"config.json: {scale} is 0, and logits are multiplied with it")
            data["runtime"] = {**data["runtime"], **own}
        # Through JSON, since strict validation takes a list for a tuple only there.
        return ArchMap.model_validate_json(json.dumps({"model_type": model_type, **data}))
    except ValidationError as error:
        what = "; ".join(messages(error))
        raise InputError(f"{shown} is not a map: {what}", hint="docs/adding.md") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{shown} is not a map: {error}") from error


def _handed(data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What blocks of a model with this config are given by earlier units: argument → whence."""
    inner = config.get(data.get("config") or "")
    said = {**data.get("defaults", {}), **config, **(inner if isinstance(inner, dict) else {})}
    rows, found = data.get("handed", {}), {}
    if not isinstance(rows, dict):
        raise ValueError("handed is not a mapping")
    for argument, row in rows.items():
        if not isinstance(row, dict):
            found[argument] = row
        elif said.get(row.get("where")):
            found[argument] = row.get("by")
    return found


def _place(model_type: str) -> Path:
    """Where the map of a type is."""
    return _installed().get(model_type, MAPS / f"{model_type}.yaml")


@cache
def _installed() -> dict[str, Path]:
    """Maps that other packages bring: an entry point NAME = PACKAGE of the group compressor.maps
    has the map of the type NAME in PACKAGE/NAME.yaml."""
    found = {}
    for entry in entry_points(group="compressor.maps"):
        spec = importlib.util.find_spec(entry.module)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            found[entry.name] = Path(folder) / f"{entry.name}.yaml"
    return found


def _resolved(path: Path) -> Any:
    """What a map file says, with what it takes from others: all of one, or a part by its key."""
    data = load_yaml(read_file(path, what="map").decode("utf-8"))
    if not isinstance(data, dict):
        return data
    if "same_as" in data:
        data = {**_other(data.pop("same_as")), **data}
    for part in PARTS:
        if isinstance(data.get(part), str):
            data[part] = _other(data[part])[part]
    return data


def _other(model_type: Any) -> Any:
    if model_type not in known_model_types():
        raise ValueError(f"there is no map of {model_type!r}")
    return _resolved(_place(model_type))


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
    for name in embedding.get("beside", ()):
        outside[moved(name)] = moved(name, place.memory)
    embedding["beside"] = [moved(name) for name in embedding.get("beside", ())]
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

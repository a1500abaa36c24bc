"""A recipe as its artefact tells of it: without places of this machine."""

from pathlib import Path
from typing import Any

from compressor.checkpoint.find import name_folder
from compressor.plan.recipe import Recipe


def portable(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without where it writes; local files by their last name only."""
    data = recipe.resolved()
    data["model"] = _portable_model(data["model"])
    if recipe.map is not None:
        data["map"] = _last_name(recipe.map)
    for section in (data["calibration"], data.get("evaluate") or {}):
        for source in (section, *section.get("mix", ())):
            if "data" in source:
                source["data"] = _last_name(source["data"])
    for entry in data["passes"]:
        for params in entry.values():
            if "base" in params:
                params["base"] = _portable_model(params["base"])
    if "audit" in data:
        data["audit"]["text"] = _last_name(data["audit"]["text"])
    return data


def _portable_model(value: str) -> str:
    path = Path(value).expanduser()
    return "@".join(name_folder(path).values()) if path.is_dir() else _last_name(value)


def _last_name(value: str) -> str:
    path = Path(value).expanduser()
    return path.resolve().name if path.exists() else value

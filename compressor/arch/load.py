"""Architectures as data: a map file for each `model_type`, and what it says of one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from compressor.arch.bind import Headers, lay
from compressor.arch.schema import MapFile, RuntimeNames
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout

__all__ = ["ArchMap", "RuntimeNames", "known_model_types", "load_map"]

MAPS = Path(__file__).parent / "maps"


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


def load_map(model_type: str) -> ArchMap:
    """The map of a `model_type`. Raises InputError for an unknown one or a bad map file."""
    if model_type not in known_model_types():
        raise InputError(
            f"no architecture map for model_type {model_type!r}",
            hint=f"known: {', '.join(known_model_types())}; for another, "
            f"add compressor/arch/maps/{model_type}.yaml",
        )
    try:
        data = _read(model_type)
        if isinstance(data, dict) and "same_as" in data:
            data = {**_read(data.pop("same_as")), **data}
        if isinstance(data, dict) and isinstance(data.get("attention"), dict):
            data["attention"] = [data["attention"]]  # all blocks attend alike
        # Through JSON, since strict validation takes a list for a tuple only there.
        return ArchMap.model_validate_json(json.dumps({"model_type": model_type, **data}))
    except (OSError, yaml.YAMLError, ValidationError, TypeError) as error:
        raise InputError(f"compressor/arch/maps/{model_type}.yaml is not a map: {error}") from error


def _read(model_type: str) -> Any:
    return yaml.safe_load((MAPS / f"{model_type}.yaml").read_text(encoding="utf-8"))

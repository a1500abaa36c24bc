"""From a config.json to a model of transformers, without weights."""

import copy
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compressor.arch.load import RuntimeNames
from compressor.errors import InputError
from compressor.foreign.calls import foreign
from compressor.runner.generation_import import import_generation


def build_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config without memory for its weights, with the fused attention where it has
    one."""
    import_generation()
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    wraps = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = AutoModelForImageTextToText if wraps else AutoModelForCausalLM

    def build(attention: str) -> Any:
        with torch.device("meta"):
            return kind.from_config(config, dtype=dtype, attn_implementation=attention).eval()

    # Attention logit caps exist in the eager attention only; the fused ones drop them silently.
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return build("eager")
    try:
        return build("sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return build("eager")


def build_config(
    config: Mapping[str, Any],
    *,
    twin: str | None = None,
    within: str | None = None,
    beside: Mapping[str, float] | None = None,
) -> Any:
    """transformers' config of a config.json.

    twin    the type whose class stands for the model's own
    within  the part of the config that describes what it runs, where that is not all
    beside  what that class's config says that the model's own does not
    """
    import_generation()  # which some families' configs import
    from transformers import AutoConfig

    part = config if within is None else config[within]
    values = {k: _numbers(v) for k, v in part.items() if k != "quantization_config"}
    model_type = values.pop("model_type")
    values |= beside or {}
    return AutoConfig.for_model(twin or model_type, **copy.deepcopy(values))


def has_class(config: Mapping[str, Any]) -> bool:
    """Whether transformers knows the type of a config.json."""
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def _numbers(value: Any) -> Any:
    """A value of config.json with the numbers that JSON has no form for."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _numbers(item) for key, item in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def resolved_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers reads it: defaults filled in, old forms of keys made new ones.

    Raises InputError for one that it does not accept.
    """
    with foreign("transformers does not accept this config.json"):
        found: dict[str, Any] = build_config(config).to_dict()
    return found


def layers_of(model: nn.Module, names: RuntimeNames) -> list[nn.Module]:
    """The decoder layers. Raises InputError where the model has no module by a name of its map."""
    known = {path for path, _ in model.named_modules()}
    for key in ("layers", "embedding", "norm", "lm_head"):
        path = getattr(names, key)
        if path not in known:
            near = difflib.get_close_matches(path, known, 1)
            raise InputError(
                f"the map says runtime.{key}: {path}, {type(model).__name__} has no such module",
                hint=f"perhaps {near[0]}" if near else "compress map draft writes a first map",
            )
    return list(model.get_submodule(names.layers).children())

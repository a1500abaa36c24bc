"""What CLIP's two towers make of an image and of a text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from compressor.errors import InputError
from compressor.foreign.calls import foreign

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of red, green and blue."""


def pixels_for(image: Tensor, size: int) -> Tensor:
    """An image [3, height, width] of values from 0 to 1 as CLIP takes it: resized with bilinear
    interpolation and antialiasing, less the mean, over the deviation. [3, size, size]."""
    resized = interpolate(image[None].float(), (size, size), mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (resized - mean) / std


@torch.no_grad()
def encode_images(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], pixels: Tensor
) -> Tensor:
    """Projected vectors [images, dim] in float32 of images [images, 3, size, size].

    config   of CLIP, with `vision_config`;  tensors  the tower's and `visual_projection`
    Raises InputError where the two do not belong together.
    """
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection(_config(config).vision_config)
    _fill(model, tensors, what="the image encoder")
    with foreign("the image encoder does not run"):
        found: Tensor = model(pixel_values=pixels).image_embeds
    return found


@torch.no_grad()
def encode_text(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Text embeddings [rows, tokens, dim] in float32: last hidden states of the text tower.

    config  of CLIP, with `text_config`.  Raises InputError where the two do not belong together.
    """
    from transformers import CLIPTextModel

    model = CLIPTextModel(_config(config).text_config)
    _fill(model, tensors, what="the text encoder")
    with foreign("the text encoder does not run"):
        found: Tensor = model(input_ids=ids).last_hidden_state
    return found


def image_size(config: Mapping[str, Any]) -> int:
    """Pixels of a side that the image encoder takes."""
    return int(_config(config).vision_config.image_size)


def _config(config: Mapping[str, Any]) -> Any:
    from transformers import CLIPConfig

    parts = {key: config.get(key) for key in ("text_config", "vision_config")}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise InputError(
            "config.json describes no CLIP: it has no text_config or no vision_config",
            hint="put the config.json of the CLIP that the encoders are beside the weights",
        )
    with foreign("transformers does not accept this config.json"):
        found = CLIPConfig(**parts, projection_dim=config.get("projection_dim", 512))
        # Towers on their own take it from their own part.
        found.vision_config.projection_dim = found.projection_dim
        return found


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Give a model its weights; older versions of transformers have one more prefix."""
    own = model.state_dict()
    state, lacking = {}, []
    for name, like in own.items():
        ways = (name, f"text_model.{name}", name.removeprefix("text_model."))
        found = next((tensors[way] for way in ways if way in tensors), None)
        if found is None or found.shape != like.shape:
            lacking.append(name)
        else:
            state[name] = found.float()
    if lacking:
        raise InputError(
            f"{what}: the checkpoint has no {lacking[0]} of the shape that config.json says"
            + (f", and {len(lacking) - 1} more" if lacking[1:] else ""),
        )
    model.load_state_dict(state)
    model.eval()

"""Tiny models of the families that stream videos, and a scripted conversation about one."""

from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from compressor.attention.serve.stream import VideoStream
from compressor.attention.token_classes import StreamSizes

VIDEO, START, END = 256, 257, 258
CLIP = (1, 4, 6)  # a frame pair of 24 patches: 6 tokens
ENDLESS = StreamSizes(sink=None, window=None, text_rounds=1000, vision_rounds=1000)


def model(family: str, layers: int) -> Any:
    torch.manual_seed(7)
    text = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    shared = {
        "text_config": text,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "image_token_id": 259,
    }
    if family == "qwen2_vl":
        vision = {**vision, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, **shared)).eval()
    vision = {
        **vision,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=vision, **shared)
    ).eval()


def pixels(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(24, 3 * 2 * 4 * 4, generator=generator)


def begin(vlm: Any, sizes: StreamSizes) -> VideoStream:
    return VideoStream(vlm, sizes, before=[1, 2, 3], previous=range(10, 19), after=[4, 5])


def ask(stream: VideoStream, number: int) -> torch.Tensor:
    return stream.ask(
        head=[6, 7],
        text=[20 + number % 40, 21],
        vision=[START, *[VIDEO] * 6, END],
        pixels=pixels(number),
        grid=torch.tensor([CLIP]),
        tail=[5],
        reply_head=[8],
        query=[30, 31] if number == 0 else [],
    )


def answer(stream: VideoStream, logits: torch.Tensor) -> None:
    stream.reply(logits, most=4, stop=(5,), rest=[9], tail=[5])


@torch.no_grad()
def plainly(stream: VideoStream, clips: list[int]) -> torch.Tensor:
    """The last logits of the same model over all that is kept, as a text of its own."""
    stream.detach()
    vlm, state = stream.model, stream.state
    ids = torch.tensor([[stream.ids[token] for token in state.tokens]])
    out = vlm(
        input_ids=ids,
        pixel_values_videos=torch.cat([pixels(number) for number in clips]),
        video_grid_thw=torch.tensor([CLIP] * len(clips)),
        position_ids=state.positions(seconds=stream.seconds)[:, None],
        use_cache=False,
    )
    return out.logits[0, -1]

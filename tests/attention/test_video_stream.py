"""StreamingVLM's cache in tiny Qwen2-VL and Qwen2.5-VL models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from compressor.attention.serve.stream import VideoStream
from compressor.attention.token_classes import Round, StreamSizes, StreamState
from compressor.errors import InputError

VIDEO, START, END = 90, 91, 92
CLIP = (1, 4, 6)  # a frame pair of 24 patches: 6 tokens
ENDLESS = StreamSizes(sink=None, window=None, text_rounds=1000, vision_rounds=1000)


def model(family: str, layers: int) -> Any:
    torch.manual_seed(7)
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
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
        "image_token_id": 93,
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


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_it_is_the_plain_model_where_nothing_is_forgotten(family: str) -> None:
    stream = begin(model(family, 2), ENDLESS)
    for number in range(2):
        answer(stream, ask(stream, number))
    found = ask(stream, 2)
    torch.testing.assert_close(found, plainly(stream, [0, 1, 2]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("rounds", [(1, 2), (2, 1), (2, 2)])
def test_in_one_layer_it_is_the_plain_model_over_what_is_kept(
    family: str, rounds: tuple[int, int]
) -> None:
    sizes = StreamSizes(sink=3, window=4, text_rounds=rounds[0], vision_rounds=rounds[1])
    stream = begin(model(family, 1), sizes)
    for number in range(4):
        answer(stream, ask(stream, number))
    found = ask(stream, 4)
    # What is left: the clips of the last rounds, and the one that was just shown.
    clips = [5 - n for n in range(rounds[1] + 1, 0, -1)]
    clips = [number for number in clips if stream.state.rounds[number].vision]
    torch.testing.assert_close(found, plainly(stream, clips), atol=1e-4, rtol=1e-3)


def test_in_more_layers_what_was_forgotten_still_counts() -> None:
    sizes = StreamSizes(sink=3, window=4, text_rounds=1, vision_rounds=1)
    stream = begin(model("qwen2_5_vl", 2), sizes)
    for number in range(3):
        answer(stream, ask(stream, number))
    found = ask(stream, 3)
    clips = [n for n in range(4) if stream.state.rounds[n].vision]
    assert not torch.allclose(found, plainly(stream, clips), atol=1e-3)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_memory_is_flat(family: str) -> None:
    sizes = StreamSizes(sink=3, window=6, text_rounds=2, vision_rounds=3)
    stream = begin(model(family, 1), sizes)
    lengths = []
    for number in range(24):
        answer(stream, ask(stream, number))
        lengths.append(stream.cache.layers[0].keys.shape[2])
    assert max(lengths[10:]) <= max(lengths[:10])
    assert lengths[-1] == len(stream.state.tokens)
    stream.detach()


def test_places_stay_within_bounds_for_500_rounds() -> None:
    sizes = StreamSizes(sink=3, window=6, text_rounds=2, vision_rounds=3)
    state = StreamState(sizes, before=(0, 1), previous=tuple(range(2, 9)), after=(9,))
    kept, farthest, new = [], [], iter(range(10, 10**6))
    for number in range(500):
        if number:
            state.make_room()
        parts = {"head": 2, "text": 3, "vision": 8, "tail": 1, "reply_head": 1}
        parts |= {"reply": 1 + number % 4, "reply_rest": 1, "reply_tail": 2}
        tokens = {name: tuple(next(new) for _ in range(n)) for name, n in parts.items()}
        state.rounds.append(Round(**tokens, clip=(1, 2, 3)))
        kept.append(len(state.tokens))
        farthest.append(float(state.positions(seconds=2).max()))
        assert state.positions().shape == (3, kept[-1])
    assert max(kept[8:]) == max(kept[8:16]) and max(farthest[8:]) == max(farthest[8:16])


def test_what_does_not_fit_is_refused() -> None:
    vlm = model("qwen2_vl", 1)
    stream = begin(vlm, ENDLESS)
    with pytest.raises(InputError, match="has 5 places"):
        stream.ask(
            head=[6], text=[], vision=[START, *[VIDEO] * 5, END], pixels=pixels(0),
            grid=torch.tensor([CLIP]), tail=[5], reply_head=[8],
        )  # fmt: skip
    stream.detach()
    vlm.config.model_type = "llava"
    with pytest.raises(InputError, match="not llava"):
        begin(vlm, ENDLESS)

"""StreamingVLM's cache in tiny Qwen2-VL and Qwen2.5-VL models."""

import pytest
import torch

from compressor.attention.token_classes import Round, StreamSizes, StreamState
from compressor.errors import InputError
from tests.support.video_streams import (
    CLIP,
    END,
    ENDLESS,
    START,
    VIDEO,
    answer,
    ask,
    begin,
    model,
    pixels,
    plainly,
)


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

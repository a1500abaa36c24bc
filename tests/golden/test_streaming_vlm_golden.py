"""StreamingVLM's bookkeeping and multi-dimensional positions against scripted streams through its
code."""

import json
from itertools import groupby

import pytest
import torch

from compressor.attention.masked import OwnAttention, full
from compressor.attention.rope import rotated
from compressor.attention.token_classes import Round, StreamSizes, StreamState, kept_columns
from compressor.errors import InputError
from tests.support.golden_files import vectors_and_notes

STREAMS = ["vision_lt_text", "vision_gt_text", "equal", "one_text_round", "no_trim"]
PARTS = {
    "user_marker": ("head", "tail"),
    "time_text": ("text",),
    "vision": ("vision",),
    "query": ("query",),
    "assistant_marker": ("reply_head", "reply_tail"),
    "assistant_text": ("reply",),
    "ellipsis": ("reply_rest",),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_scripted_stream(name: str) -> None:
    golden, notes = vectors_and_notes(f"systems/streamingvlm_{name}")
    told = {key: json.loads(notes[key]) for key in notes if key not in ("provenance",)}
    sizes = StreamSizes(
        sink=told["text_sink"],
        window=told["text_sliding_window"],
        text_rounds=told["text_round"],
        vision_rounds=told["window_rounds"],
    )
    codes = {code: kind for kind, code in told["classes"].items()}
    kinds = [codes[code] for code in golden["class_by_serial"].tolist()]
    # Serials run in the order of the conversation: runs of one class are its parts.
    runs = [(k, tuple(g)) for k, g in groupby(range(len(kinds)), key=lambda i: kinds[i])]
    parts = [(kind, serials) for kind, serials in runs]
    state = StreamState(
        sizes, before=parts[0][1] + parts[1][1], previous=parts[2][1], after=parts[3][1]
    )
    merge = told["spatial_merge_size"]
    place, cached = 4, set(golden["r0.input_serials"].tolist())
    fed: list[int] = []
    for number, (frames, rows, columns) in enumerate(golden["video_grid_thw"].tolist()):
        if number:
            state.make_room()
            left = [token for token in state.tokens if token in cached]
            assert left == golden[f"r{number}.kv_serials_after_evict"].tolist()
            assert kept_columns(fed, left).tolist() == [fed.index(token) for token in left]
        question = Round(clip=(frames, rows // merge, columns // merge))
        found: dict[str, tuple[int, ...]] = {}
        while place < len(parts) and not (
            parts[place][0] == "user_marker" and "reply_tail" in found
        ):
            kind, serials = parts[place]
            field = PARTS[kind][0] if PARTS[kind][0] not in found else PARTS[kind][-1]
            found[field] = serials
            place += 1
        asked = {key: found[key] for key in found if not key.startswith("reply")}
        head = {"reply_head": found["reply_head"]}
        state.rounds.append(Round(**asked, **head, clip=question.clip))
        assert list(state.tokens) == golden[f"r{number}.input_serials"].tolist()
        seconds = 2 / told["FPS"] * told["tokens_per_second"]
        want = golden[f"r{number}.positions_thw"]
        torch.testing.assert_close(state.positions(seconds=seconds), want, atol=0, rtol=0)
        fed = list(state.tokens)
        state.rounds[-1] = Round(**found, clip=question.clip)
        # The last token of a reply was never fed; where the reply was cut short, the one before it.
        new = [t for t in state.tokens if t not in set(fed)]
        if number + 1 < len(golden["video_grid_thw"]):
            seen = set(golden[f"r{number + 1}.kv_serials_after_evict"].tolist())
            generated = [t for t in new if t in seen]
            assert len(new) - len(generated) in (2, 3)  # the end, a newline, and one more if cut
            fed += generated
        cached |= set(fed)


def test_attention_in_three_dimensions() -> None:
    golden, notes = vectors_and_notes("systems/streamingvlm_mrope_attention")
    dim, sections = int(notes["head_dim"]), json.loads(notes["mrope_section"])
    rate = float(notes["rope_theta"]) ** (-torch.arange(0, dim, 2) / dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    angle = golden["positions_thw"][axis].T * rate  # a channel turns by its section's axis
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    query, key = golden["query_pre_rope"], golden["key_pre_rope"]
    new = query.shape[2]
    query, key = rotated(query, (cos[-new:], sin[-new:])), rotated(key, (cos, sin))
    torch.testing.assert_close(query, golden["query_rotated"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(key, golden["key_rotated"], atol=1e-5, rtol=1e-4)
    out = full(query, key, golden["value"], OwnAttention(scaling=dim**-0.5))
    torch.testing.assert_close(out, golden["out"], atol=1e-5, rtol=1e-4)


def test_what_the_released_code_fails_at_is_refused() -> None:
    for sizes in ({"sink": None}, {"window": None}):
        with pytest.raises(InputError, match="go together"):
            StreamSizes(**sizes)
    with pytest.raises(InputError, match="cannot be forgotten"):
        StreamSizes(vision_rounds=0)

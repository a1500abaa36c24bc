"""Values on their way between ranks."""

import pickle
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.ranks.parcel import hollow, pack, unpack


class Found(NamedTuple):
    name: str
    weight: Tensor


def test_a_value_comes_out_as_it_went_in() -> None:
    shared = torch.arange(5)
    value = {
        "rows": [{"linear": f"experts.{i}", "error": i / 7} for i in range(3)],
        "found": Found("q", torch.randn(3, 4).bfloat16()),
        "parts": [shared, torch.empty(0, 2), torch.nn.Parameter(torch.ones(2)), shared],
        "dtype": torch.float16,
    }
    parcel, buffers = pack(value)
    back = unpack(pickle.loads(pickle.dumps(parcel)), buffers)
    assert back["rows"] == value["rows"] and back["dtype"] is torch.float16
    assert type(back["found"]) is Found and torch.equal(back["found"].weight, value["found"].weight)
    assert back["found"].weight.dtype == torch.bfloat16
    for before, after in zip(value["parts"], back["parts"], strict=True):
        assert before.shape == after.shape and torch.equal(before, after)
    assert back["parts"][0] is back["parts"][3]


def test_what_stays_at_home_is_shapes_elsewhere() -> None:
    told = hollow(Found("q", torch.ones(3, 4).half()))
    assert told.name == "q" and told.weight.is_meta
    assert told.weight.shape == (3, 4) and told.weight.dtype == torch.float16
    parcel, buffers = pack(told)
    assert not buffers and unpack(parcel, buffers).weight.is_meta

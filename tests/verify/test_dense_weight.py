"""The device's float64 weight is numpy's to the last bit."""

import numpy as np
import pytest
import torch

from compressor.checkpoint.read_ahead import read_ahead
from compressor.formats.second_reader.grids import CodedWeight
from compressor.verify.dense_weight import PlacedWeight, dense

CPU = torch.device("cpu")


@pytest.mark.parametrize("values, zeros, offsets, down", list(np.ndindex(2, 2, 2, 2)))
def test_the_device_computes_what_numpy_computes(
    values: int, zeros: int, offsets: int, down: int
) -> None:
    draw = np.random.default_rng(0)
    rows = 3 if down else 12
    each = {name: draw.normal(size=(rows, 4)) for name in ("scales", "zeros", "offsets")}
    coded = CodedWeight(
        codes=draw.integers(0, 256, (12, 32), dtype=np.uint8),
        values=draw.normal(size=256) if values else None,
        scales=each["scales"],
        zeros=each["zeros"] if zeros else None,
        offsets=each["offsets"] if offsets else None,
        across=np.arange(32) % 4,
        down=np.arange(12) // 4 if down else None,
    )
    expected = torch.from_numpy(coded.weight)
    assert torch.equal(PlacedWeight.of(coded, CPU).weight, expected)
    assert torch.equal(dense(coded, CPU), expected)
    assert expected.unique().numel() > 100


def test_one_scale_serves_all_outputs() -> None:
    codes = np.arange(8, dtype=np.uint8).reshape(2, 4)
    coded = CodedWeight(codes=codes, scales=np.array([[0.5]]), across=np.zeros(4, np.int64))
    assert np.array_equal(coded.weight, codes / 2)
    assert torch.equal(PlacedWeight.of(coded, CPU).weight, torch.from_numpy(codes / 2))


@pytest.mark.parametrize("ahead", [False, True])
def test_reading_ahead_gives_each_item_and_its_own_error(ahead: bool) -> None:
    asked: list[int] = []

    def read(number: int) -> int:
        asked.append(number)
        return 6 // number

    results = []
    for give in read_ahead(read, [3, 0, 2], ahead=ahead):
        try:
            results.append(give())
        except ZeroDivisionError:
            results.append(None)
    assert results == [2, None, 3] and asked == [3, 0, 2]

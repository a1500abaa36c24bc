"""Activations on disk: what was put is what is read, whatever the order and the dtype."""

import pytest
import torch
from compressor_calibration.store import ActivationStore, read_ahead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_as_they_were(tmp_path, dtype):
    store = ActivationStore(tmp_path / "a.bin", rows=7, length=5, width=3, dtype=dtype)
    store.create()
    assert (tmp_path / "a.bin").stat().st_size == store.nbytes == 7 * 15 * dtype.itemsize
    rows = torch.randn(7, 5, 3).to(dtype)
    with store.writing() as writer:
        for start in (4, 0, 2):
            part = rows[start : start + 2 if start < 4 else 7].clone()
            writer.put(start, part)
            part.zero_()  # what was put must not change afterwards
    assert torch.equal(store.read([3, 0, 6, 6]), rows[[3, 0, 6, 6]])
    store.create()  # of a run that goes on: nothing is lost
    assert torch.equal(store.read(range(7)), rows)


def test_reading_ahead_pairs_stores(tmp_path):
    stores = [
        ActivationStore(tmp_path / name, rows=4, length=2, width=3, dtype=torch.float32)
        for name in "ab"
    ]
    for number, store in enumerate(stores):
        store.create()
        with store.writing() as writer:
            writer.put(0, torch.arange(4.0)[:, None, None].expand(4, 2, 3) + 10 * number)
    found = [
        (list(rows), [x[:, 0, 0].tolist() for x in tensors])
        for rows, tensors in read_ahead(stores, [[2, 1], [0], [3, 3]])
    ]
    assert found == [
        ([2, 1], [[2, 1], [12, 11]]),
        ([0], [[0], [10]]),
        ([3, 3], [[3, 3], [13, 13]]),
    ]
    assert list(read_ahead(stores, [])) == []


def test_a_failing_write_is_told(tmp_path):
    store = ActivationStore(tmp_path / "a.bin", rows=2, length=2, width=2, dtype=torch.float32)
    store.create()
    with pytest.raises(OSError), store.writing() as writer:
        writer._handle = -1
        writer.put(0, torch.zeros(1, 2, 2))


def test_a_short_file_is_told(tmp_path):
    store = ActivationStore(tmp_path / "a.bin", rows=2, length=2, width=2, dtype=torch.float32)
    (tmp_path / "a.bin").write_bytes(b"\0" * 16)
    with pytest.raises(OSError, match="ends before row 1"):
        store.read([0, 1])

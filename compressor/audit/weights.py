"""What a checkpoint's tensors show by themselves: no forward pass, one tensor in memory.

Names are not needed: a table of tokens is a matrix with a row for each id of the vocabulary, and a
tensor's neighbours are those whose names differ in the layer's number alone.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from compressor.arch.sizes import vocabulary
from compressor.audit.findings import Finding, Level
from compressor.checkpoint.reader import Checkpoint
from compressor.runner.execution import Progress

ROW_RATIO = 20.0
"""How many times the median norm a token's row may have. Trained rows stay within a few times."""
LAYER_RATIO = 8.0
"""How many times its neighbours' a tensor's root mean square differs where it is told."""
WRONG_RATIO = 1000.0
"""… and where nothing that training does explains it."""
FP16_LARGEST = 65504.0
NAMED = 16
"""Rows of a finding that are listed."""
CHUNK = 1 << 24
"""Values that are converted at a time."""
FEW = 4
"""Layers that have neighbours to be compared with."""


def audit_weights(
    checkpoint: Checkpoint, *, progress: Progress = lambda name, done, total: None
) -> list[Finding]:
    """Findings on every floating-point tensor as it is stored; packed codes are passed over."""
    found: list[Finding] = []
    sizes: dict[str, dict[int, tuple[str, float]]] = defaultdict(dict)
    rows = vocabulary(checkpoint.config)
    entries = sorted(
        n for n, e in checkpoint.entries.items() if e.spec.dtype.is_floating_point and e.spec.nbytes
    )
    for done, name in enumerate(entries, 1):
        tensor = checkpoint.read([name])[name]
        largest, rms, bad = _extent(tensor)
        if bad:
            found.append(
                Finding(
                    "suspect", "finite", f"{bad} of {tensor.numel()} values are not finite", name
                )
            )
        elif largest > FP16_LARGEST:
            text = f"values up to {largest:.3g} are infinite in fp16, whose largest is 65504"
            found.append(Finding("suspect", "fp16", text, name))
        if tensor.ndim == 2 and tensor.shape[0] == rows:
            found += _table(name, tensor)
        if not bad and (layer := re.search(r"\.(\d+)\.", name)):
            group = f"{name[: layer.start(1)]}*{name[layer.end(1) :]}"
            sizes[group][int(layer[1])] = (name, rms)
        progress(name, done, len(entries))
    for members in sizes.values():
        found += _unlike(members)
    return sorted(found, key=lambda finding: finding.level != "suspect")


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's rows in float64, some at a time."""
    flat = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    for part in torch.split(flat, max(1, CHUNK // max(flat.shape[1], 1))):
        yield part.double()


def _extent(tensor: Tensor) -> tuple[float, float, int]:
    """Largest magnitude and root mean square of the finite values, and how many are not."""
    largest, squares, bad = 0.0, 0.0, 0
    for part in _chunks(tensor):
        finite = torch.isfinite(part)
        bad += int((~finite).sum())
        kept = part.where(finite, 0.0)
        largest = max(largest, float(kept.abs().max()))
        squares += float(kept.square().sum())
    return largest, math.sqrt(squares / max(tensor.numel() - bad, 1)), bad


def row_norms(table: Tensor) -> Tensor:
    """Norm of each row, float64 [rows]; of finite values."""
    return torch.cat([part.nan_to_num(0, 0, 0).norm(dim=1) for part in _chunks(table)])


def large_rows(norms: Tensor) -> Tensor:
    """Ids whose rows are more than `ROW_RATIO` times the median norm, the largest first."""
    positive = norms[norms > 0]
    if not len(positive):
        return torch.zeros(0, dtype=torch.int64)
    ratios = norms / positive.median()
    order = ratios.argsort(descending=True)
    return order[ratios[order] > ROW_RATIO]


def _table(name: str, table: Tensor) -> Iterator[Finding]:
    """Findings on the rows of an embedding or a head."""
    norms = row_norms(table)
    large = large_rows(norms)
    if len(large):
        times = float(norms[large[0]] / norms[norms > 0].median())
        text = f"{len(large)} rows are up to {times:.3g} times as long as the median"
        yield Finding("suspect", "rows", text, name, tuple(large[:NAMED].tolist()))
    zero = (norms == 0).nonzero().flatten()
    if len(zero):
        text = f"{len(zero)} rows are zero"
        yield Finding("note", "rows", text, name, tuple(zero[:NAMED].tolist()))
    same = _repeated(table, norms)
    if len(same):
        text = f"{len(same)} rows repeat another: tokens that were never trained, or copies"
        yield Finding("note", "duplicates", text, name, tuple(same[:NAMED].tolist()))


def _repeated(table: Tensor, norms: Tensor) -> Tensor:
    """Ids of rows other than zero that equal an earlier one to the bit."""
    seen: set[bytes] = set()
    found = []
    for start in range(0, table.shape[0], 4096):
        raw = table[start : start + 4096].contiguous().view(torch.uint8).numpy()
        for index, row in enumerate(raw, start):
            key = row.tobytes()
            if key in seen and norms[index] > 0:
                found.append(index)
            seen.add(key)
    return torch.tensor(found, dtype=torch.int64)


def _unlike(members: Mapping[int, tuple[str, float]]) -> Iterator[Finding]:
    """Findings on tensors whose size differs from that of the two layers before and after."""
    order = sorted(members)
    if len(order) < FEW:
        return
    for place, layer in enumerate(order):
        start = min(max(place - 2, 0), max(len(order) - 5, 0))
        around = [members[n][1] for n in order[start : start + 5] if n != layer]
        middle = float(torch.tensor(around, dtype=torch.float64).quantile(0.5))
        name, rms = members[layer]
        if middle == 0 or rms == 0:
            if (middle == 0) != (rms == 0):
                what = "is zero, its neighbours are not" if rms == 0 else "is not zero as they are"
                yield Finding("note", "neighbours", f"it {what}", name)
            continue
        ratio = max(rms / middle, middle / rms)
        if ratio > LAYER_RATIO:
            level: Level = "suspect" if ratio > WRONG_RATIO else "note"
            way = "more" if rms > middle else "less"
            text = f"its root mean square is {ratio:.3g} times {way} than in the layers around it"
            yield Finding(level, "neighbours", text, name)

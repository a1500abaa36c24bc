"""What searches have to know from their device before they go on, asked for several at once: each
answer waits until the device has done all that came before."""

from collections.abc import Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Asking = Generator[Tensor, list[float], T]
"""Work that yields each tensor of one dimension that it has to know, and is sent its values."""


def answered(works: Sequence[Asking[T]]) -> list[T]:
    """What works on one device come to, side by side: each goes on once all have asked."""
    found: dict[int, T] = {}
    answers: dict[int, list[float] | None] = dict.fromkeys(range(len(works)))
    while answers:
        asked: dict[int, Tensor] = {}
        for number, answer in answers.items():
            try:
                work = works[number]
                asked[number] = next(work) if answer is None else work.send(answer)
            except StopIteration as done:
                found[number] = done.value
        told = _told(list(asked.values()))
        answers = dict(zip(asked, told, strict=True))
    return [found[number] for number in range(len(works))]


def _told(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The values of tensors, with one wait."""
    if len(tensors) <= 1:
        return [tensor.tolist() for tensor in tensors]
    left = iter(torch.cat([tensor.float() for tensor in tensors]).tolist())
    return [[next(left) for _ in range(len(tensor))] for tensor in tensors]

"""The loss by which a shortened stack of blocks learns from the whole one (Offsite-Tuning, arXiv
2302.04870): the squared difference at the border where both end, relative to the teacher's size."""

import torch
from torch import Tensor


def teacher_rms(teacher: Tensor) -> Tensor:
    """Root of the mean square over the whole batch, in float32. A scalar."""
    return teacher.float().square().mean().sqrt()


def border_loss(student: Tensor, teacher: Tensor, rms: Tensor | None = None) -> Tensor:
    """mean(((teacher − student) / rms)²) in float32, a scalar. It does not change where both are
    scaled alike, and is 0 where they are equal.

    student, teacher  what leaves the last of the middle blocks, [rows, length, hidden]
    rms               of the teacher's whole batch, where these are only some of its rows
    """
    target = teacher.float()
    scale = teacher_rms(teacher) if rms is None else rms
    difference = (target - student.float()) / scale.clamp(min=torch.finfo(torch.float32).tiny)
    return difference.square().mean()

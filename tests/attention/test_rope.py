"""Rotary embeddings: what they keep, and how they are taken back."""

import torch

from compressor.attention.rope import Rotary, rotated, rotated_back


def tables(length: int = 20, *, factor: float = 1.0) -> Rotary:
    angle = torch.arange(length)[:, None] * torch.tensor([1.0, 0.1])
    table = torch.cat([angle, angle], dim=-1)
    return table.cos() * factor, table.sin() * factor


def test_products_depend_on_distance_alone() -> None:
    a, b = (torch.randn(1, 1, 1, 6).expand(1, 1, 20, 6) for _ in range(2))
    products = (rotated(a, tables()) @ rotated(b, tables()).transpose(-1, -2))[0, 0]
    torch.testing.assert_close(products[3, 1], products[12, 10])
    torch.testing.assert_close(products.diagonal(), products[0, 0].expand(20))


def test_rotating_back_gives_earlier_positions() -> None:
    """A factor of the tables is not put on twice, and channels beyond them stay."""
    x, rotary = torch.randn(1, 2, 20, 6), tables(factor=1.3)
    by = torch.arange(20) // 2
    earlier = tuple(table[torch.arange(20) - by] for table in rotary)
    torch.testing.assert_close(rotated_back(rotated(x, rotary), by, rotary), rotated(x, earlier))

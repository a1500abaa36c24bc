"""How far cross-attention to subjects stays in their regions, before and after weights are rounded.

    python scripts/measure/run.py localization

FastComposer's balanced score (arXiv 2305.10431) for each map: attention to a subject's token
outside its mask less inside, −1 at best. The layers are seeded and small: pixels know where they
lie, and each subject's key is made to answer to its own half. They stand for no model; images
cannot be made or judged here, so the score says what rounding does to attention and nothing of
pictures.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from variant import Bench, Figures, Variant

from compressor.ir.qtensor import QuantSpec
from compressor.numerics import fake_quantize
from compressor.numerics.localization import localization

SIDE, TOKENS, HEADS, WIDTH = 16, 8, 4, 32
SUBJECTS = (2, 5)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])


def variants(bench: Bench) -> Iterator[Variant]:
    layers = [layer(seed) for seed in range(bench.options.layers)]
    yield Variant("float", lambda: scores(layers, None), vars(bench.options))
    for bits in bench.options.bits:
        yield Variant(f"int{bits}", lambda bits=bits: scores(layers, bits), baseline="float")


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries' and keys' weights [channels, channels], pixels [pixels, channels] and tokens
    [tokens, channels]; the first two channels of a pixel are its place, and subjects are made to
    answer to opposite halves."""
    generator = torch.Generator().manual_seed(seed)
    size = HEADS * WIDTH
    q, k = (torch.randn(size, size, generator=generator) / size**0.5 for _ in range(2))
    pixels = torch.randn(SIDE * SIDE, size, generator=generator) * 0.5
    column = torch.arange(SIDE).repeat(SIDE) / (SIDE - 1) * 2 - 1
    direction = torch.randn(size, generator=generator)
    pixels += column[:, None] * direction
    tokens = torch.randn(TOKENS, size, generator=generator)
    # What its key's weight makes of it is what the queries' weight makes of the direction.
    wanted = torch.linalg.solve(k, q @ direction)
    for subject, sign in zip(SUBJECTS, (-1, 1), strict=True):
        tokens[subject] = sign * wanted / wanted.norm() * size**0.5 * 4
    return q, k, pixels, tokens


def scores(layers: list[tuple[Tensor, Tensor, Tensor, Tensor]], bits: int | None) -> Figures:
    """The score of each map, by layer and head."""
    masks = torch.zeros(1, 2, SIDE, SIDE)
    masks[0, 0, :, : SIDE // 2], masks[0, 1, :, SIDE // 2 :] = 1, 1
    found: list[float] = []
    for q, k, pixels, tokens in layers:
        if bits is not None:
            spec = QuantSpec(element="int", bits=bits, strategy="group", group_size=32)
            q, k = fake_quantize(q, spec), fake_quantize(k, spec)
        queries, keys = (
            (x @ w.T).view(len(x), HEADS, WIDTH).transpose(0, 1)
            for x, w in ((pixels, q), (tokens, k))
        )
        attention = (queries @ keys.transpose(1, 2) / WIDTH**0.5).softmax(-1)
        where = torch.tensor([SUBJECTS])
        found += localization(attention, masks, where, where >= 0)[0].tolist()
    return {"score": found, "worst": max(found)}

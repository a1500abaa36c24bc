"""A decoding step with the KV cache in host memory, with and without knowing blocks a layer early.

Each layer multiplies with weights of an 8B model's shape and attends to chosen blocks; a cache on
the device keeps the last step's. Without lookahead a layer chooses its blocks and waits for them;
with it they are chosen, and copied on a second stream, while the layer before runs. Forecasts drift
at random from step to step, so that hit rates follow from the drift.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from case import Case, Setup
from compressor_kernels.attention.block_attention import block_attention
from compressor_kernels.attention.block_cache import fetch_blocks, place_blocks
from compressor_kernels.attention.block_selection import top_blocks
from compressor_kernels.attention.block_windows import compress_keys, forecast_scores
from families.block_attention import FULL, TINY, Shape
from torch import Tensor

LAYERS, WIDTH, INNER = 4, 32, 112  # hidden size and MLP size in heads: 4096 and 14336 at 128
WARM = 8
WAYS = {
    "nothing kept": (False, False),
    "last step's blocks kept": (False, True),
    "kept, and chosen a layer early": (True, True),
}


class Layer:
    """Weights, compressed keys and device cache of one layer; its keys and values on the host."""

    def __init__(self, setup: Setup, shape: Shape) -> None:
        hidden, inner = WIDTH * shape.dim, INNER * shape.dim
        lanes, rule = shape.batch * shape.groups, shape.rule
        k, v = (setup.randn(lanes, shape.tokens, shape.dim) for _ in range(2))
        by_row = k.view(shape.batch, shape.groups, shape.tokens, shape.dim)
        self.compressed = compress_keys(by_row, shape.windows)
        self.host = tuple(
            torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x) for x in (k, v)
        )
        room = (lanes, rule.top_k * rule.block_size, shape.dim)
        self.cache = tuple(setup.randn(*room).zero_() for _ in range(2))
        self.held = torch.full((lanes, rule.top_k), -1, dtype=torch.int32, device=setup.device)
        self.missing = torch.zeros(lanes * rule.top_k, 3, dtype=torch.int32, device=setup.device)
        self.count = torch.zeros(1, dtype=torch.int32, device=setup.device)
        self.forecast = setup.randn(shape.batch, shape.groups, 1, shape.dim)
        heads = (shape.heads + 3 * shape.groups) * shape.dim  # q, k, v and forecast in one product
        self.enter = setup.randn(hidden, heads) / hidden**0.5
        self.leave = setup.randn(shape.heads * shape.dim, hidden) / hidden**0.5
        self.up = setup.randn(hidden, 2 * inner) / hidden**0.5
        self.down = setup.randn(inner, hidden) / inner**0.5


class Decoder:
    """Runs steps; `early` looks ahead, `keep` leaves the last step's blocks on the device."""

    def __init__(
        self, setup: Setup, shape: Shape, layers: list[Layer], *, drift: float, early: bool,
        keep: bool,
    ) -> None:  # fmt: skip
        self.setup, self.shape, self.layers = setup, shape, layers
        self.drift, self.early, self.keep = drift, early, keep
        self.hidden = setup.randn(shape.batch, WIDTH * shape.dim)
        self.side = None if setup.tiny else torch.cuda.Stream()
        # Blocks that were fetched, and steps: on the device, where a graph can count them.
        self.fetched, self.steps = torch.zeros(2, dtype=torch.int64, device=setup.device)
        for _ in range(2 if setup.tiny else WARM):
            self.step()
        self.fetched.zero_()
        self.steps.zero_()

    def choose(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Blocks of a layer and their slots, copied to the device."""
        shape, rule = self.shape, self.shape.rule
        scores = forecast_scores(
            layer.forecast, layer.compressed, rule, shape.windows, tokens=shape.tokens
        )
        blocks = top_blocks(scores, rule, tokens=shape.tokens)
        if not self.keep:
            layer.held.fill_(-1)
        layer.count.zero_()
        slots = place_blocks(blocks.flatten(0, 2), layer.held, layer.missing, layer.count)
        size = rule.block_size
        fetch_blocks(layer.host, layer.cache, layer.missing, layer.count, block_size=size)
        self.fetched += layer.count[0]
        return blocks, slots.view_as(blocks)

    def step(self, i: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """One token of each row; the last layer's queries, blocks and outputs."""
        shape = self.shape
        kept = []  # what the other stream reads must not be given away before the step ends
        hidden, coming = self.hidden, None
        self.steps += 1
        for layer in self.layers:
            noise = torch.randn_like(layer.forecast)
            layer.forecast.mul_(self.drift).add_(noise, alpha=(1 - self.drift**2) ** 0.5)
        for number, layer in enumerate(self.layers):
            entered = hidden @ layer.enter
            q = entered[:, : shape.heads * shape.dim].view(shape.batch, shape.heads, 1, shape.dim)
            if coming is None:
                coming = self.choose(layer)
            elif self.side is not None:
                torch.cuda.current_stream().wait_stream(self.side)
            (blocks, slots), coming = coming, None
            if self.early and number + 1 < len(self.layers):
                if self.side is not None:
                    self.side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.side) if self.side else nullcontext():
                    coming = self.choose(self.layers[number + 1])
            kept.append((blocks, slots, coming))
            k, v = (x.view(shape.batch, shape.groups, -1, shape.dim) for x in layer.cache)
            size = shape.rule.block_size
            out = block_attention(
                q, k, v, blocks, slots=slots, block_size=size, tokens=shape.tokens
            )
            hidden = hidden + out.flatten(1) @ layer.leave
            gate, up = (hidden @ layer.up).chunk(2, dim=-1)
            hidden = hidden + (torch.nn.functional.silu(gate) * up) @ layer.down
        self.hidden.copy_(hidden / hidden.square().mean().sqrt())
        return q, blocks, out

    def off(self, found: tuple[Tensor, Tensor, Tensor], _: None) -> float:
        """The last layer's output against the same over the text itself."""
        q, blocks, out = found
        shape = (self.shape.batch, self.shape.groups, self.shape.tokens, self.shape.dim)
        k, v = (x.to(self.setup.device).view(shape) for x in self.layers[-1].host)
        want = block_attention(q, k, v, blocks, block_size=self.shape.rule.block_size)
        return (out - want).abs().max().item()

    def hits(self) -> str:
        shape = self.shape
        wanted = len(self.layers) * shape.batch * shape.groups * shape.rule.top_k
        return f"{1 - int(self.fetched) / (int(self.steps) * wanted):.1%} were on the device"


def cases(setup: Setup) -> Iterator[Case]:
    shape = setup.pick(FULL, TINY)
    layers = [Layer(setup, shape) for _ in range(setup.pick(LAYERS, 2))]
    for drift in setup.pick((0.9, 0.99, 0.999), (0.9,)):
        for name, (early, keep) in WAYS.items():
            decoder = Decoder(setup, shape, layers, drift=drift, early=early, keep=keep)
            yield Case(
                f"step of {len(layers)} layers, drift {drift}, {name}",
                f"{shape.batch}x{shape.heads}/{shape.groups}x{shape.tokens}",
                decoder.step,
                lambda: None,
                limit=0.0,
                error=decoder.off,
                note=decoder.hits,
            )

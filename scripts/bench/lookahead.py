"""A decoding step with the KV cache in host memory, with and without knowing blocks a layer early.

Part of block_sparse.py. Each layer multiplies with weights of an 8B model's shape and attends
to chosen blocks; a cache on the device keeps the last step's. Without lookahead a layer chooses its
blocks and waits for them; with it they are chosen, and copied on a second stream, while the layer
before runs.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from compressor_kernels.attention.block_attention import block_attention
from compressor_kernels.attention.block_cache import fetch_blocks, place_blocks
from compressor_kernels.attention.block_selection import top_blocks
from compressor_kernels.attention.block_windows import compress_keys, forecast_scores
from timing import require
from torch import Tensor

if TYPE_CHECKING:
    from block_sparse import Shape

WIDTH, INNER = 32, 112  # hidden size and MLP size, in heads: 4096 and 14336 at 128
STEPS, WARM = 24, 8


class Layer:
    """Weights, compressed keys and device cache of one layer; its keys and values on the host."""

    def __init__(self, shape: Shape) -> None:
        hidden, inner = WIDTH * shape.dim, INNER * shape.dim
        lanes, rule = shape.batch * shape.groups, shape.rule
        k, v = (shape.randn(lanes, shape.tokens, shape.dim) for _ in range(2))
        by_row = k.view(shape.batch, shape.groups, shape.tokens, shape.dim)
        self.compressed = compress_keys(by_row, shape.windows)
        self.host = tuple(_pinned(x) for x in (k, v))
        del k, v, by_row
        room = (lanes, rule.top_k * rule.block_size, shape.dim)
        self.cache = tuple(shape.randn(*room).zero_() for _ in range(2))
        self.held = torch.full((lanes, rule.top_k), -1, dtype=torch.int32, device=shape.device)
        self.missing = torch.zeros(lanes * rule.top_k, 3, dtype=torch.int32, device=shape.device)
        self.count = torch.zeros(1, dtype=torch.int32, device=shape.device)
        self.fetched = torch.zeros(1, dtype=torch.int64, device=shape.device)
        self.forecast = shape.randn(shape.batch, shape.groups, 1, shape.dim)
        heads = (shape.heads + 3 * shape.groups) * shape.dim  # q, k, v and forecast in one product
        self.enter = shape.randn(hidden, heads) / hidden**0.5
        self.leave = shape.randn(shape.heads * shape.dim, hidden) / hidden**0.5
        self.up = shape.randn(hidden, 2 * inner) / hidden**0.5
        self.down = shape.randn(inner, hidden) / inner**0.5


def _pinned(x: Tensor) -> Tensor:
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x)


class Decoder:
    """Runs steps; `early` looks ahead, `keep` leaves the last step's blocks on the device."""

    def __init__(self, shape: Shape, layers: list[Layer], *, drift: float) -> None:
        self.shape, self.layers, self.drift = shape, layers, drift
        self.hidden = shape.randn(shape.batch, WIDTH * shape.dim)
        self.side = torch.cuda.Stream() if shape.device == "cuda" else None
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def choose(self, layer: Layer, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Blocks of a layer and their slots, copied to the device."""
        shape, rule = self.shape, self.shape.rule
        scores = forecast_scores(
            layer.forecast, layer.compressed, rule, shape.windows, tokens=shape.tokens
        )
        blocks = top_blocks(scores, rule, tokens=shape.tokens)
        if not keep:
            layer.held.fill_(-1)
        layer.count.zero_()
        slots = place_blocks(blocks.flatten(0, 2), layer.held, layer.missing, layer.count)
        fetch_blocks(
            layer.host, layer.cache, layer.missing, layer.count, block_size=rule.block_size
        )
        layer.fetched += layer.count
        return blocks, slots.view_as(blocks)

    def step(self, *, early: bool, keep: bool) -> None:
        shape = self.shape
        kept = []  # what the other stream reads must not be given away before the step ends
        hidden, coming = self.hidden, None
        for layer in self.layers:
            noise = torch.randn_like(layer.forecast)
            layer.forecast.mul_(self.drift).add_(noise, alpha=(1 - self.drift**2) ** 0.5)
        for number, layer in enumerate(self.layers):
            entered = hidden @ layer.enter
            q = entered[:, : shape.heads * shape.dim].view(shape.batch, shape.heads, 1, shape.dim)
            if coming is None:
                coming = self.choose(layer, keep=keep)
            elif self.side is not None:
                torch.cuda.current_stream().wait_stream(self.side)
            blocks, slots = coming
            coming = None
            if early and number + 1 < len(self.layers):
                if self.side is not None:
                    self.side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.side) if self.side else nullcontext():
                    coming = self.choose(self.layers[number + 1], keep=keep)
            kept.append((blocks, slots, coming))
            k, v = (x.view(shape.batch, shape.groups, -1, shape.dim) for x in layer.cache)
            out = block_attention(
                q,
                k,
                v,
                blocks,
                slots=slots,
                block_size=shape.rule.block_size,
                tokens=shape.tokens,
            )
            self.last = (q, blocks, out)
            hidden = hidden + out.flatten(1) @ layer.leave
            gate, up = (hidden @ layer.up).chunk(2, dim=-1)
            hidden = hidden + (torch.nn.functional.silu(gate) * up) @ layer.down
        self.hidden.copy_(hidden / hidden.square().mean().sqrt())

    def check(self, name: str) -> None:
        """The last layer's output, over the text itself."""
        assert self.last is not None
        q, blocks, out = self.last
        shape = (self.shape.batch, self.shape.groups, self.shape.tokens, self.shape.dim)
        k, v = (x.to(self.shape.device).view(shape) for x in self.layers[-1].host)
        want = block_attention(q, k, v, blocks, block_size=self.shape.rule.block_size)
        require(name, (out - want).abs().max().item(), 1e-9)


def lookahead(shape: Shape, results: dict[str, float], *, layers: int, drifts: list[float]) -> None:
    """Time steps in three ways at each drift."""
    stack = [Layer(shape) for _ in range(layers)]
    wanted = layers * shape.batch * shape.groups * shape.rule.top_k
    print(
        f"\nA decoding step over {layers} layers, batch {shape.batch}, {shape.tokens} tokens, "
        "KV in pinned host memory"
    )
    ways = {
        "nothing kept, no lookahead": {"early": False, "keep": False},
        "last step kept, no lookahead": {"early": False, "keep": True},
        "last step kept, lookahead": {"early": True, "keep": True},
    }
    for drift in drifts:
        decoder = Decoder(shape, stack, drift=drift)
        for name, way in ways.items():
            ms, hits = _measure(decoder, wanted, **way)
            decoder.check(f"drift {drift}: {name}")
            if shape.device == "cuda":
                print(f"    {ms:8.3f} ms a step, {hits:.1%} of blocks were on the device")
                results[f"lookahead {drift} {name} ms"] = ms
                results[f"lookahead {drift} {name} hit rate"] = hits


def _measure(decoder: Decoder, wanted: int, *, early: bool, keep: bool) -> tuple[float, float]:
    """Median milliseconds of a step, and the share of wanted blocks that were on the device."""

    def reset() -> None:
        for layer in decoder.layers:
            layer.fetched.zero_()

    def hits(steps: int) -> float:
        return 1 - sum(int(x.fetched) for x in decoder.layers) / (steps * wanted)

    if decoder.shape.device != "cuda":
        reset()
        for _ in range(2):
            decoder.step(early=early, keep=keep)
        return 0.0, hits(2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            decoder.step(early=early, keep=keep)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step(early=early, keep=keep)
    times = []
    for number in range(WARM + STEPS):
        if number == WARM:
            reset()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[WARM:]), hits(STEPS)

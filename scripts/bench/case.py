"""What a family of kernels declares of itself: cases, each with its reference and its peers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from compressor_kernels.attention.head_attention import full_decode
from torch import Tensor

Choice = TypeVar("Choice")


def relative_error(out: Tensor, want: Tensor) -> float:
    """||out - want|| / ||want|| in fp32; NaN if either holds one."""
    out, want = out.float(), want.float()
    return ((out - want).norm() / want.norm()).item()


def first_rows(out: Tensor, want: Tensor) -> float:
    """The same where the reference has the first rows of the batch alone."""
    return relative_error(out[: len(want)], want)


def last_queries(out: Tensor, want: Tensor) -> float:
    """The same where it has the last queries alone."""
    return relative_error(out[:, :, -want.shape[2] :], want)


def different(out: Any, want: Any) -> float:
    """Share of elements that are not the same, over all tensors of both."""
    pairs = [(out, want)] if isinstance(want, Tensor) else list(zip(out, want, strict=True))
    wrong = sum(int((a.float() != b.float()).sum()) for a, b in pairs)
    return wrong / sum(a.numel() for a, _ in pairs)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, eq=False)
class Peer:
    """What a kernel is timed beside: `run(i)` works on the i-th of `sets` sets of tensors."""

    run: Callable[[int], object]
    sets: int = 1


@dataclass(frozen=True, eq=False)
class Case:
    """A kernel at one shape.

    run      `run(i)` works on the i-th of `sets` sets of tensors, which together are larger than
             the L2 cache
    want     what `run(0)` is held against by `error`, which may be `limit`
    moved    bytes of a call;  ops: operations of one
    peers    timed in the same run; `targets`: how many times as fast as each of them, or what share
             of the bandwidth of a copy ("copy"), is wanted
    note     said behind the figures, asked once they are there
    """

    name: str
    run: Callable[[int], Any]
    want: Callable[[], Any]
    shape: str = ""
    limit: float = 1e-3
    error: Callable[[Any, Any], float] = relative_error
    sets: int = 1
    moved: float = 0.0
    ops: float = 0.0
    peers: Mapping[str, Peer] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    note: Callable[[], str] | None = None


@dataclass(frozen=True)
class Heads:
    """Queries [batch, heads, queries, dim] over a cache [batch, groups, tokens, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def shape(self) -> str:
        batch, heads = self.q.shape[:2]
        return f"{batch}x{heads}/{self.k.shape[1]}x{self.k.shape[2]}"

    @property
    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first row of the batch, which references take."""
        return self.q[:1], self.k[:1], self.v[:1]

    @cached_property
    def full(self) -> Peer:
        """A decoding step over all of it."""
        return Peer(lambda i: full_decode(self.q, self.k, self.v))


@dataclass(frozen=True)
class Setup:
    """Where cases run: in full on the GPU, or tiny and untimed in Triton's interpreter."""

    tiny: bool

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def bf16(self) -> torch.dtype:
        """fp16 in the interpreter, which cuts bf16 off where the GPU rounds."""
        return torch.float16 if self.tiny else torch.bfloat16

    def pick(self, full: Choice, tiny: Choice) -> Choice:
        return tiny if self.tiny else full

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.bf16)

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(*shape, device=self.device).to(dtype)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, device=self.device)

    def bits(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        info = torch.iinfo(dtype)
        return self.ints(info.min, info.max, *shape, dtype=dtype)

    def heads(
        self, batch: int, heads: int, groups: int, tokens: int, dim: int, *, queries: int = 1
    ) -> Heads:
        q, k, v = (
            self.randn(batch, many, length, dim)
            for many, length in ((heads, queries), (groups, tokens), (groups, tokens))
        )
        return Heads(q, k, v)

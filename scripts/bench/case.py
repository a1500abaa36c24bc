"""What a family of kernels declares of itself: cases, each with its reference and its peers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from compressor_kernels.attention.head_attention import full_decode, head_prefill
from torch import Tensor

Choice = TypeVar("Choice")


def relative_error(out: Tensor, want: Tensor) -> float:
    """||out - want|| / ||want|| in fp32; NaN if either holds one. A reference may have the first
    rows, the first heads and the last queries alone; where it is -inf nothing is compared."""
    if want.ndim == 4:
        out = out[: len(want), : want.shape[1], -want.shape[2] :]
    there = want != -torch.inf
    out, want = out[there].float(), want[there].float()
    return ((out - want).norm() / want.norm()).item()


def different(out: Any, want: Any) -> float:
    """Share of elements that are not the same, over all tensors of both."""
    pairs = [(out, want)] if isinstance(want, Tensor) else list(zip(out, want, strict=True))
    wrong = sum(int((a.float() != b.float()).sum()) for a, b in pairs)
    return wrong / sum(a.numel() for a, _ in pairs)


EXACT = {"error": different, "limit": 0.0}


def first(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reference on the first row of the batch: it repeats keys in float64."""

    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim > 1 else value

    return lambda *args, **how: reference(*map(cut, args), **{k: cut(v) for k, v in how.items()})


def nbytes(*values: Any) -> int:
    """Bytes of tensors, of those in tuples, too."""
    inside = [nbytes(*value) for value in values if isinstance(value, tuple)]
    return sum(inside) + sum(value.nbytes for value in values if isinstance(value, Tensor))


@dataclass(frozen=True, eq=False)
class Call:
    """A function on one after the other of sets of arguments, which together are larger than the
    L2 cache."""

    function: Callable[..., Any]
    sets: Sequence[tuple[Any, ...]] = ((),)
    how: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, i: int = 0) -> Any:
        return self.function(*self.sets[i], **self.how)


@dataclass(frozen=True, eq=False)
class Case(Call):
    """A kernel at one shape.

    reference  what the kernel is held against by `error`, which may be `limit`
    moved      bytes of a call; if not given, those of its arguments and of what comes out
    ops        operations of one
    peers      timed in the same run; `targets`: how many times as fast as each of them, or what
               share of the bandwidth of a copy ("copy"), is wanted
    note       said behind the figures
    """

    name: str = field(kw_only=True)
    reference: Callable[..., Any] = field(kw_only=True)
    shape: str = field(kw_only=True)
    limit: float = 1e-3
    error: Callable[[Any, Any], float] = relative_error
    moved: float | None = None
    ops: float = 0.0
    peers: Mapping[str, Call] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def bytes_moved(self, out: Any) -> float:
        if self.moved is None and not self.ops and self.sets[0]:
            return nbytes(self.sets[0], tuple(self.how.values()), out)
        return self.moved or 0.0


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
    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @cached_property
    def full(self) -> Call:
        """A decoding step over all of it."""
        return Call(full_decode, [self.all])

    @cached_property
    def prefill(self) -> Call:
        """The last queries of a prompt over all of it."""
        none = torch.zeros(self.k.shape[1], dtype=torch.bool, device=self.k.device)
        return Call(head_prefill, [self.all], {"streaming": none, "sink": 0, "window": 1})


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
        q = self.randn(batch, heads, queries, dim)
        return Heads(q, *(self.randn(batch, groups, tokens, dim) for _ in range(2)))

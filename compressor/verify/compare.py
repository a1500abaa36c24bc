"""How far the written weights of a unit are from the original's, and whether rounding explains it.

What rounding may do is measured, not taken from a record: the original, moved as the written
weights were by exact symmetries (`alignment`), is rounded to nearest in the written form, and a
written weight is held against that. A method that compensates its rounding, or clips, is further
from the original than rounding to nearest, but it leaves scales and means where they are.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from compressor.errors import several
from compressor.ir.floats import Floats
from compressor.ir.layout import Linear, UnitLayout, is_bias
from compressor.ir.qtensor import QuantSpec
from compressor.methods.common.rounding import fused_with
from compressor.numerics import quantize, shared_options
from compressor.numerics.bitdelta import sign_delta
from compressor.numerics.chunks import row_chunks
from compressor.numerics.int_affine import is_plain_int
from compressor.verify.alignment import Matrix, align

ERROR = 3.0
"""Error of a weight, in units of what rounding to nearest gives: GPTQ, which moves weights to save
outputs, reached 2.2 on SmolLM2's last blocks, where few inputs are very large; all else 1.2."""

LOST = 1.0
"""Error of a weight that says no more of the original than zeros do."""

ROW, LOST_ROW = 16.0, 2.0
"""The same as ERROR and LOST for one row: above 8, and near 1, was reached there."""

ROW_GAIN = 0.5
"""How much larger or smaller one row may be, beside its rounding error. A row that is another's, or
none, is smaller by all of it."""

SHRINK = 1.0
"""How much smaller than the original's a weight may be, in units of its rounding error. Clipping
made it smaller by up to 0.36 of that, grids that GPTQ searches there by 0.8."""

OFFSET, CHANCE = 0.5, 5.0
"""Mean of a row's error over its root mean square: a zero point that is off by one gives 0.95,
medians reached 0.06. The mean of n independent errors scatters by 1 / √n of that, and the worst of
many rows is a few times as far off (rows of 32 reached 0.58): CHANCE / √n is let pass, too."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor against the original's, moved like the written one.

    error     ‖written − original‖ / ‖original‖ (Frobenius)
    expected  the same for the original rounded to nearest in the written form
    gain      median over rows of ⟨written, original⟩ / ‖original‖², less that of the original, or
              of rounding where that is nearer
    offset    median over rows of |mean of the error| / its root mean square
    rows      rows that are further off than rounding explains
    """

    name: str
    error: float
    expected: float
    gain: float = 0.0
    offset: float = 0.0
    rows: tuple[int, ...] = ()

    @property
    def problem(self) -> str | None:
        """What rounding does not explain."""
        if not self.error < max(LOST, 1.5 * self.expected):
            return f"{self.name} has nothing in common with the original's (error {self.error:.3g})"
        # Nothing makes a weight larger but what correlates with rounding, by half its square.
        larger = self.expected**2 + 0.05 * self.expected + 1e-3
        if self.gain > larger or -self.gain > SHRINK * self.expected + 1e-3:
            return f"{self.name} is {1 + self.gain:.3g} times what it is in the original"
        if self.offset > OFFSET and self.error > 1.5 * self.expected:
            return f"{self.name} is shifted against the original: its zero points are off"
        if self.error > ERROR * self.expected:
            return (
                f"{self.name} is {self.error:.3g} of its own size from the original, where "
                f"rounding gives {self.expected:.3g}"
            )
        if self.rows:
            return f"{self.name}: row {several(self.rows)} differs by more than rounding"
        return None


@dataclass(slots=True)
class UnitComparison:
    """The tensors of one unit.

    written, original  every tensor by its full name, float32 on one device; the original's are
                       replaced by those that were moved
    specs              how linears are quantized
    dtype              of the written float tensors
    rotation           what the residual stream was turned by
    """

    unit: UnitLayout
    written: Floats
    original: Floats
    specs: Mapping[str, QuantSpec]
    dtype: torch.dtype
    rotation: Matrix | None = None
    deltas: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)
    _known: dict[str, tuple[list[Callable[[], object]], Difference]] = field(default_factory=dict)
    _groups: dict[Hashable, list[Linear]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for linear in self.unit.linears:
            self._groups[fused_with(linear)].append(linear)

    def differences(self) -> list[Difference]:
        """Each tensor's, once the original's are moved as the written ones were."""
        both = ((self.written[name], self.original[name]) for name in self.written)
        # As where a checkpoint went to another format.
        same = not self.deltas and self.rotation is None and all(torch.equal(*x) for x in both)
        if same:
            linears_of = {x.weight_name: x.name for x in self.unit.linears}
            return [Difference(linears_of.get(name, name), 0.0, 0.0) for name in self.written]
        if not self.deltas:  # whose linears are what a fine-tune made of its base
            self.original = align(
                self.unit,
                written=self.written,
                original=self.original,
                agrees=lambda linear, tensors: self._linear(linear, tensors).problem is None,
                rotation=self.rotation,
            )
        linears = {x.weight_name: x for x in self.unit.linears}
        found = []
        for name in self.written:
            if name in linears:
                found.append(self._linear(linears[name], self.original))
            elif name in self.original:
                found.append(self._plain(name, self.written[name], self.original[name]))
        return found

    def nearest(self) -> Floats:
        """The original's tensors, its linears rounded to nearest, which replace them where they are
        there in float32; others are rounded when they are read."""
        linears = {x.weight_name: x for x in self.unit.linears}
        later = {n: partial(self.rounded, x) for n, x in linears.items()}
        for name, linear in linears.items():
            if self.original.holds(name):
                del later[name]
                rounded = self.rounded(linear, self.original[name])
                self.original = self.original.replaced({name: rounded})
        return self.original.changed(later)

    def rounded(self, linear: Linear, weight: Tensor) -> Tensor:
        """An original weight as rounding to nearest in the written form leaves it."""
        spec = self.specs.get(linear.name)
        if linear.name in self.deltas:
            base, bits = self.deltas[linear.name]
            return sign_delta(weight - base, bits=bits).merged(base, self.dtype).float()
        if spec is None:
            return weight.to(self.dtype).float()
        return quantize(weight, spec, **self._options(linear, weight, spec)).dequantize()

    def _options(self, linear: Linear, weight: Tensor, spec: QuantSpec) -> dict[str, Any]:
        """Options of the rounding: grids of ranges, which the bounds above are of, and what scale
        fused linears share."""
        if is_plain_int(spec):
            return {"from_range": True}
        weights = [weight, *(self.original[x.weight_name] for x in self._fused(linear))]
        group = fused_with(linear) or 0
        return shared_options(weights, [spec] * len(weights), [group] * len(weights))[0]

    def _fused(self, linear: Linear) -> list[Linear]:
        """Those that a runtime makes one matrix of with a linear."""
        group = fused_with(linear)
        return [x for x in self._groups[group] if x is not linear] if group else []

    def _linear(self, linear: Linear, tensors: Floats) -> Difference:
        """Worked out once for each tensor that is tried as the original's, beside those that it
        shares a scale with."""
        made_of = [*tensors.made_of(linear.weight_name)]
        for other in self._fused(linear):
            made_of += self.original.made_of(other.weight_name)
        known = self._known.get(linear.name)
        tried = [] if known is None else [each() for each in known[0]]
        if known and len(tried) == len(made_of) and all(map(operator.is_, tried, made_of)):
            return known[1]
        found = self._compared(linear, tensors[linear.weight_name])
        self._known[linear.name] = [_held(x) for x in made_of], found
        return found

    def _compared(self, linear: Linear, old: Tensor) -> Difference:
        name = linear.weight_name
        coded = linear.name in self.specs
        floor = 0.0 if coded else float_floor(self.dtype, moved=True)
        found = _Sums()
        new, near = self.written[name], self.rounded(linear, old)
        base = self.deltas[linear.name][0] if linear.name in self.deltas else None
        if base is not None and float((old - base).norm()) > floor * float(old.norm()):
            # What a delta holds is the difference: that is what must be whole.
            new, old, near, floor = new - base, old - base, near - base, 0.0
        for rows in row_chunks(old):
            found.add(new[rows], old[rows], near[rows])
        return found.difference(linear.name, floor)

    def _plain(self, name: str, new: Tensor, old: Tensor) -> Difference:
        """A norm's weight, a bias: what a move made of it is known as well as the move is."""
        error = float((new - old).norm() / old.norm().clamp(min=1e-12))
        if not bool(old.any()) and not bool(new.any()):
            error = 0.0
        expected = float_floor(self.dtype, moved=True) / ERROR
        if is_bias(name) and (spec := self.specs.get(name.rpartition(".")[0])):
            # Rows of a rounded weight say what the bias was multiplied by only roughly.
            expected += 2.0**-spec.bits / 4
        return Difference(name, error, expected)


def _held(x: object) -> Callable[[], object]:
    """What gives an object back, a tensor only while others need it."""
    return ref(x) if isinstance(x, Tensor) else lambda: x


class _Sums:
    """What a difference is made of, added up over chunks of rows."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.columns = 1

    def add(self, new: Tensor, old: Tensor, near: Tensor) -> None:
        off, size = new - old, old.square().sum(1)
        self.columns = off.shape[1]
        error = off.square().sum(1)
        ratio = 1 / size.clamp(min=1e-30)
        # Codes that were converted lie on grids that rounding to nearest would not choose: there
        # rounding gains, and what was written does not.
        gains = torch.stack([((new - x) * old).sum(1) * ratio for x in (near, old)])
        gain = gains.gather(0, gains.abs().argmin(0, keepdim=True))[0]
        self.parts.append(
            torch.stack(
                [
                    size,
                    error,
                    (near - old).square().sum(1),
                    gain,
                    off.mean(1).abs() / (error / off.shape[1]).sqrt().clamp(min=1e-30),
                ]
            )
        )

    def difference(self, name: str, floor: float) -> Difference:
        size, error, near, gain, offset = torch.cat(self.parts, dim=1).cpu()
        total = float(size.sum().clamp(min=1e-30))
        expected = max((float(near.sum()) / total) ** 0.5, floor)
        rows = (error / size.clamp(min=float(size.mean()) * 1e-6 + 1e-30)).sqrt()
        own = (near / size.clamp(min=1e-30)).sqrt()
        allowed = (ROW * own.clamp(min=expected)).clamp(max=LOST_ROW).maximum(1.5 * own)
        alive = size > 0
        # What two zero points or scales of one row do is smaller than what GPTQ may do to it.
        shifted = max(OFFSET, CHANCE / self.columns**0.5)
        moved = (gain.abs() > ROW_GAIN + expected) | ((offset > shifted) & (rows > 1.5 * own))
        sound = (rows <= allowed) & ~(moved & alive)
        return Difference(
            name=name,
            error=(float(error.sum()) / total) ** 0.5,
            expected=expected,
            gain=float(gain[alive].median()) if bool(alive.any()) else 0.0,
            offset=float(offset.median()),
            rows=tuple(int(i) for i in (~sound).nonzero()[:, 0]),
        )


def float_floor(dtype: torch.dtype, *, moved: bool) -> float:
    """Relative error that casts to a dtype may leave in a tensor, those of a few moves if `moved`.

    float32 has the arithmetic of the comparison itself in it."""
    eps = torch.finfo(dtype).eps
    return max(eps if moved else eps / 2, 1e-4)


def comparable(written: Floats, original: Floats) -> list[str]:
    """What stands in one of the two only, or in another shape."""
    lonely = sorted(set(written) ^ set(original))
    problems = [f"{name} is in one of the two only" for name in lonely]
    problems += [
        f"{name} is {list(written.shape(name))}, in the original {list(original.shape(name))}"
        for name in written
        if name in original and written.shape(name) != original.shape(name)
    ]
    return problems

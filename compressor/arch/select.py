"""Which linears a pattern means.

A pattern is `linear` (every linear but routers), a role ("attn.q", "mlp.*", "lm_head"), a glob over
module paths ("model.layers.0.*", "*down_proj") or a regular expression after "re:". A glob means no
router, which lies among what it gates ("mlp.*"): its role, its path or an expression does. Linears
beside the text model are meant by their role ("tower.*", "mtp.linear") or their whole path alone.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from compressor.foreign.patterns import Names
from compressor.ir.layout import Linear


def matches(pattern: str, linear: Linear) -> bool:
    """Whether a pattern means this linear. Raises InputError for a bad regular expression."""
    if linear.beside and pattern != linear.name:
        kind = linear.role.partition(".")[0]
        return pattern.startswith(kind) and fnmatch.fnmatchcase(linear.role, pattern)
    return _means(pattern, linear)


def _means(pattern: str, linear: Linear) -> bool:
    if pattern == "linear":
        return linear.role != "router"
    if pattern.startswith("re:"):
        return linear.name in Names((pattern,), where="the recipe")
    if linear.role == "router" and any(sign in pattern for sign in "*?["):
        return False
    roles = [linear.role, *(part.role for part in linear.rows)]
    return (
        any(fnmatch.fnmatchcase(role, pattern) for role in roles)
        or fnmatch.fnmatchcase(linear.name, pattern)
        or fnmatch.fnmatchcase(linear.name, f"*.{pattern}")
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """Targets minus what is ignored."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...] = ()

    def pick(self, linears: Iterable[Linear]) -> tuple[Linear, ...]:
        """The selected linears, in order."""
        return tuple(
            linear
            for linear in linears
            if any(matches(p, linear) for p in self.targets)
            and not any(_means(p, linear) for p in self.ignore)
        )

    def counts(self, linears: Iterable[Linear]) -> dict[str, int]:
        """How many linears each target pattern matches."""
        found = list(linears)
        return {p: sum(matches(p, linear) for linear in found) for p in self.targets}

    def ignored_counts(self, linears: Iterable[Linear]) -> dict[str, int]:
        """How many linears each ignore pattern matches."""
        found = list(linears)
        return {p: sum(_means(p, linear) for linear in found) for p in self.ignore}

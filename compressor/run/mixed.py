"""A recipe with as many bits as somebody asked for, on average: what each group of linears costs at
each number of bits is measured, and bits go where they lower the error most."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.durable import write_atomically
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.foreign.untrusted import read_file
from compressor.plan.choose import LENGTH, QUALITIES, Choice, Wish, choose
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.allocate import Sensitivity, allocate, mixed_recipe, parse_sensitivity
from compressor.run.sensitivity import bits_per_weight, groups_of, measure_sensitivity
from compressor.run.tokens import calibration_tokens
from compressor.runner.execution import Progress
from compressor.runner.tokenizer import load_tokenizer

SCHEME = "w4a16"
"""Of which the bits are chosen: integers in groups, inputs in float."""
BITS = (2, 3, 4, 5, 6, 8)
SAMPLES, SAMPLES_ON_CPU = 16, 4


@dataclass(frozen=True, slots=True)
class Mixed:
    """A number of bits that can be had, and the recipe with which it is measured.

    asked  mean bits of a weight, scales included;  tried  bits that the format and runtime take
    """

    wish: Wish
    asked: float
    tried: tuple[int, ...]
    measured: dict[str, Any]

    def sensitivity(
        self, source: Source, file: Path, *, device: torch.device, progress: Progress
    ) -> Sensitivity:
        """What each group costs: as it was measured before, or measured now and kept in `file`."""
        if file.is_file():
            found = parse_sensitivity(read_file(file, what="sensitivities"), where=str(file))
            if found.recipe == self.measured:
                return found
        recipe = make_recipe(self.measured)
        tokenizer = load_tokenizer(source.checkpoint.folder)
        tokens = calibration_tokens(tokenizer, recipe.calibration, seed=recipe.seed)
        found = measure_sensitivity(
            self.measured, source, self.tried, tokens.ids, device=device, batch=4, progress=progress
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (found.model_dump_json(indent=1) + "\n").encode())
        return found

    def choice(self, found: Sensitivity, source: Source) -> Choice:
        """The recipe of the best quality that takes several widths side by side."""
        chosen = allocate(found, self.asked)
        options = [g.options[i] for g, i in zip(found.groups, chosen, strict=True)]
        counts = Counter("in float" if o.bits is None else f"{o.bits} bits" for o in options)
        shares = ", ".join(f"{count} groups {what}" for what, count in sorted(counts.items()))
        why = f"{found.bits_per_weight(chosen):.3f} bits per weight, scales included: {shares}"
        for quality in QUALITIES[QUALITIES.index(self.wish.quality) :]:
            plain = choose(replace(self.wish, quality=quality), source)
            data = mixed_recipe(found.model_copy(update={"recipe": plain.data}), chosen)
            try:
                make_plan(make_recipe(data), source)
            except InputError as error:
                refused = error
                continue
            return Choice(data, (why, *plain.reasons))
        raise refused


def prepare_mixed(wish: Wish, asked: float, source: Source) -> Mixed:
    """Find out from headers whether so few bits can be had, and by which widths.

    wish  of the scheme `SCHEME`. Raises InputError where a format, runtime or model takes no two
    widths, or more bits than were asked for.
    """
    data = choose(replace(wish, quality="fast"), source).data
    samples = SAMPLES if wish.gpu else SAMPLES_ON_CPU
    length = min(LENGTH, source.layout.sizes.positions or LENGTH)
    data = {**data, "calibration": {"data": "bundled", "samples": samples, "length": length}}
    least, tried = float("inf"), []
    for bits in BITS:
        try:
            plan = make_plan(make_recipe(_with_bits(data, bits)), source)
        except InputError:
            continue
        tried.append(bits)
        sizes = [
            (bits_per_weight(unit, group), sum(x.out_features * x.in_features for x in group))
            for unit in plan.units
            for group in groups_of(unit.layout, plan.passes[-1].names)
        ]
        least = min(least, sum(b * n for b, n in sizes) / sum(n for _, n in sizes))
    where = f" for {wish.runtime}" if wish.runtime else ""
    if len(tried) < 2:
        raise InputError(
            f"one width alone can be written{where}: {tried or 'none'} bits",
            hint="--scheme w4a16 without --bits-per-weight",
        )
    if asked < least:
        raise InputError(
            f"{asked:g} bits per weight are fewer than {tried[0]} bits take{where}",
            hint=f"at least {least:.3f}, scales included",
        )
    return Mixed(wish, asked, tuple(tried), data)


def _with_bits(data: dict[str, Any], bits: int) -> dict[str, Any]:
    """A recipe with its quantizer at so many bits."""
    *before, last = data["passes"]
    ((name, params),) = last.items()
    return {**data, "passes": [*before, {name: {**params, "bits": bits}}]}

"""How much of attention LServe's pages keep: physical ones with logical ones in them, beside flat
pages of both sizes at the same budget, which are read for their score alone.

Shares are of full attention on held-out text, with a choice in each step. The exit code is 1 where
pages with logical ones keep less than flat ones of the physical size, or are more than two points
behind flat ones of the logical size.

    python scripts/measure/run.py pages MODEL --length 1024 --budgets 256 384 512
"""

import argparse
from collections.abc import Iterator

import torch
from compressor_calibration.bundled import bundled_text
from models import token_rows, whole_model
from variant import Bench, Figures, Variant

from compressor.attention.policy import rule_policy
from compressor.attention.quality import measure_policies
from compressor.attention.rules.lserve import LServePages

BEHIND = 0.02
"""Share of attention by which flat logical pages may keep more."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, GGUF file or Hub id")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=2, help="rows of held-out text")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 384, 512], metavar="KEYS")
    parser.add_argument("--page", type=int, default=64)
    parser.add_argument("--logical", type=int, default=16)


def variants(bench: Bench) -> Iterator[Variant]:
    """All budgets of all kinds are measured in one walk over the text, with the first row."""
    asked = bench.options
    page, logical = asked.page, asked.logical
    model = whole_model(bench, asked.model)
    ids = token_rows(model, bundled_text("held_out", "prose"), asked.windows, asked.length)
    kinds: dict[str, LServePages] = {
        name: LServePages(
            block_size=size, logical=inner, weigh=weigh, per="query_head", reuse=1, top_k=3,
            init_blocks=first, local_blocks=0,
        )
        for name, (size, inner, weigh, first) in {
            "logical, sum": (page, logical, "sum", 0),
            "logical, max": (page, logical, "max", 0),
            "logical and first, sum": (page, logical, "sum", 1),
            "logical and first, max": (page, logical, "max", 1),
            "flat, page": (page, page, "max", 0),
            "flat, logical": (logical, logical, "max", 0),
        }.items()
    }  # fmt: skip
    cases = {
        (name, budget): rule.model_copy(update={"top_k": budget // rule.block_size})
        for name, rule in kinds.items()
        for budget in asked.budgets
    }
    policies = [rule_policy(model.layout, rule, made_by={}) for rule in cases.values()]
    with torch.inference_mode():
        found = dict(zip(cases, measure_policies(model, policies, ids), strict=True))
    for name in kinds:
        figures: Figures = {}
        for budget in asked.budgets:
            one = found[name, budget]
            figures[f"kept at {budget}"] = float(one.mass.mean())
            figures[f"worst head at {budget}"] = float(one.mass.min())
            figures[f"seen at {budget}"] = float(one.seen.mean())
        yield Variant(name, lambda figures=figures: figures)


def judge(rows: dict[str, Figures]) -> list[str]:
    """Budgets at which the better way of weighing does not keep what is wanted."""
    wrong: list[str] = []
    if len(rows) < 6:
        return wrong
    for column in [name for name in rows["flat, page"] if name.startswith("kept")]:
        own = max(row[column] for name, row in rows.items() if name.startswith("logical"))
        if own < rows["flat, page"][column] or own < rows["flat, logical"][column] - BEHIND:
            wrong.append(f"{column}: {own:.4f}")
    return wrong

"""Passkeys and perplexity of rules of sparse attention at one density, beside full attention.

Of each rule the budget or threshold is searched at which queries see the wanted share of keys on
calibration text, which the model runs over once: what layers' queries and keys are does not depend
on the rule, and runs of queries all over the text stand for the rest. Then passkeys and windows of
held-out text are scored as evaluations do. A row is searched when it is its turn.
XAttention is there with one threshold for all heads and with calibrated ones, scaled alike.
BLASST's share is of the tokens in kept tiles, as masks count it; tiles are of one query by 16 keys,
because on small models no threshold skips much of larger ones in prompts.

    python scripts/measure/run.py sparse_attention MODEL --density 0.25 --length 1024
    python scripts/measure/run.py sparse_attention SMOLLM2 --density 0.2 --length 4096 --device cuda
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from compressor_calibration.bundled import bundled_text
from compressor_kernels.attention.antidiagonal import antidiagonal_sums_ref
from models import token_rows, whole_model
from torch import Tensor
from variant import Bench, Figures, Variant

from compressor.attention.evaluation import policy_attention, rule_call
from compressor.attention.policy import AttentionPolicy, LayerPolicy, attention_shape, rule_policy
from compressor.attention.quality import Quality, measure_policies, watch_attention
from compressor.attention.rule import Rule, RuleCall
from compressor.attention.rules.blasst import Blasst, SkipPhase
from compressor.attention.rules.infllm import InfLLMBlocks
from compressor.attention.rules.lserve import LServePages
from compressor.attention.rules.quest import QuestPages
from compressor.attention.rules.streaming import StreamingHeads
from compressor.attention.rules.xattention import XAttention
from compressor.evaluate.passkey import Passkey, passkey
from compressor.numerics.attention_thresholds import block_mass, mass_threshold
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import StreamedModel, run_blocks

Family = Callable[[float], AttentionPolicy]
"""A policy from a knob between 0 and 1, which sees more the larger that is."""

NEAR = 0.003
"""Share of keys by which a searched policy may miss what is wanted."""

TRIES, RUNS = 12, 16
"""Policies that are tried of a family at most; runs of queries whose keys are counted."""

CLAIMS = [("XAttention, calibrated", "XAttention, one threshold")]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, GGUF file or Hub id")
    parser.add_argument("--density", type=float, default=0.25, help="share of keys that are seen")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8, help="rows of held-out text")
    parser.add_argument("--rows", type=int, default=4, help="passkeys at each of five depths")
    parser.add_argument(
        "--block", type=int, default=32, help="tiles of XAttention and LServe's pages"
    )
    parser.add_argument("--coverage", type=float, default=0.9, help="of XAttention's calibration")


def thresholds(calls: Sequence[RuleCall], block: int, coverage: float) -> Tensor:
    """XAttention's of every layer and query head, from one row."""
    found = []
    for call in calls:
        mass = block_mass(call.query, call.key, block_size=block, scale=call.scaling)
        sums = antidiagonal_sums_ref(
            call.query, call.key, block_size=block, stride=8, scale=call.scaling
        )
        found.append(mass_threshold(mass, sums, coverage=coverage).amax(0).cpu())
    return torch.stack(found)


def share_seen(policy: AttentionPolicy, calls: Sequence[RuleCall]) -> float:
    """Share of the keys before them that queries see in a text, from runs of queries that lie
    evenly in it; every layer has one rule for all heads."""
    length = calls[0].key.shape[2]
    many = max(1, length // (8 * RUNS))
    # A run's place within a block differs from run to run.
    starts = [length * i // RUNS + i * (length // RUNS - many) // RUNS for i in range(RUNS)]
    seen = past = 0.0
    for layer, call in zip(policy.layers, calls, strict=True):
        mask_of = layer.rules[0].seen(call)
        for start in starts:
            part = slice(start, start + many)
            before = call.positions <= call.positions[part, None]
            seen += float((mask_of(part) & before).float().mean((0, 1)).sum())
            past += float(before.sum())
    return seen / past


def search(family: Family, calls: Sequence[RuleCall], wanted: float) -> AttentionPolicy:
    """The policy of a family that sees the wanted share of keys, or a little more."""
    low, high = (0.0, 0.0), (1.0, 1.0)  # knob and share
    knob = 1 - (1 - wanted) ** 0.5  # a window of that share of a text sees the wanted share of keys
    best = 1.0
    for _ in range(TRIES):
        seen = share_seen(family(knob), calls)
        if abs(seen - wanted) <= NEAR:
            return family(knob)
        if seen < wanted:
            low = (knob, seen)
        else:
            high, best = (knob, seen), knob
        # Between policies that were tried a line is a guess; before, the middle is.
        tried = low[0] > 0 and high[0] < 1
        slope = (wanted - low[1]) / (high[1] - low[1]) if tried else 0.5
        knob = low[0] + (high[0] - low[0]) * min(0.75, max(0.25, slope))
    return family(best)


def families(
    model: SourceModel, calls: Callable[[], Sequence[Sequence[RuleCall]]], bench: Bench
) -> dict[str, Family]:
    length, block = bench.options.length, bench.options.block
    shape = attention_shape(model.layout)

    @cache
    def tau() -> Tensor:
        rows = [thresholds(row, block, bench.options.coverage) for row in calls()]
        return torch.stack(rows).amax(0)

    def all_layers(rule: Rule) -> AttentionPolicy:
        return rule_policy(model.layout, rule, made_by={})

    def tiles(values: Tensor) -> AttentionPolicy:
        layers = tuple(
            LayerPolicy(
                rules=(
                    XAttention(
                        threshold=tuple(min(1.0, float(x)) for x in line),
                        block_size=block,
                        stride=8,
                    ),
                )
            )
            for line in values
        )
        return AttentionPolicy(heads=shape.heads, kv_heads=shape.kv_heads, layers=layers)

    def blocks(knob: float, size: int, least: int) -> int:
        return max(least, round(knob * length / size))

    every = tuple(range(shape.kv_heads))
    plain = {"init_blocks": 0, "local_blocks": 0, "per": "query_head"}
    return {
        "XAttention, one threshold": lambda x: tiles(torch.full_like(tau(), x)),
        "XAttention, calibrated": lambda x: tiles(tau() * x),
        "BLASST, tiles of one query": lambda x: all_layers(
            Blasst(
                prefill=SkipPhase(
                    a=length * max(1e-6, 1 - x) ** 2, b=0.0, sparsity=0.5, lengths=(length, length)
                ),
                rows=1,
                keys=16,
            )
        ),
        "InfLLM-V2": lambda x: all_layers(
            InfLLMBlocks(
                block_size=block, kernel_size=16, stride=8, init_blocks=1, local_blocks=1,
                top_k=blocks(x, block, 3),
            )
        ),
        "LServe": lambda x: all_layers(
            LServePages(block_size=block, logical=8, top_k=blocks(x, block, 1), **plain)
        ),
        "Quest": lambda x: all_layers(QuestPages(block_size=16, top_k=blocks(x, 16, 1), **plain)),
        "recency": lambda x: all_layers(
            StreamingHeads(heads=every, sinks=4, window=max(5, round(x * length)))
        ),
    }  # fmt: skip


def variants(bench: Bench) -> Iterator[Variant]:
    wanted, length = bench.options.density, bench.options.length
    model = whole_model(bench, bench.options.model)
    calibration = token_rows(model, bundled_text("calibration", "prose"), 2, length)
    held_out = token_rows(model, bundled_text("held_out", "prose"), bench.options.windows, length)
    haystack = bundled_text("held_out", "prose")
    task = Passkey(lengths=(length,), rows=bench.options.rows)
    source = model.source

    @cache
    def calls() -> list[list[RuleCall]]:
        """Of every row of calibration text, of every layer."""
        noted: list[list[RuleCall]] = [[] for _ in calibration]
        watch_attention(
            model,
            calibration,
            lambda unit, call: noted[call.first_row].append(rule_call(call)),
            batch=1,
        )
        return noted

    def measure(policy: AttentionPolicy | None, worth: Quality | None) -> Figures:
        attention = None if policy is None else policy_attention(policy)
        dtype = model.dtype
        (stream,) = run_blocks(
            [StreamedModel(source, attention)], held_out, device=bench.device, dtype=dtype
        )
        with stream.logits() as logits:
            nll = [
                float(
                    torch.nn.functional.cross_entropy(
                        logits(hidden)[:-1].float(), row[1:].to(bench.device)
                    )
                )
                for hidden, row in zip(stream.hidden, held_out, strict=True)
            ]
        attention = None if policy is None else policy_attention(policy)
        keys = passkey(
            source, model.tokenizer(), haystack=haystack, task=task, device=bench.device,
            dtype=dtype, attention=attention,
        )  # fmt: skip
        figures: Figures = {
            "nll": nll,
            "passkey": keys.accuracy.value,
            "passkey error": keys.accuracy.error,
        }
        if worth is not None:
            figures |= {"seen": float(worth.seen.mean()), "mass": float(worth.mass.mean())}
        return figures

    yield Variant("full attention", lambda: measure(None, None))
    only = bench.options.only
    for name, family in families(model, calls, bench).items():
        if only and not any(part in name for part in only):
            continue

        def row(family: Family = family) -> Figures:
            policy = search(family, calls()[0], wanted)
            (worth,) = measure_policies(model, [policy], held_out[:1])
            return measure(policy, worth)

        yield Variant(name, row, baseline="full attention")

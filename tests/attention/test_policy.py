"""The attention policy: its values, its files, its mask, and evaluation under it."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.attention.policy import (
    AttentionPolicy,
    LayerPolicy,
    check_policy,
    combine,
    describe,
    make_policy,
    policy_files,
    read_policy,
    read_policy_tensors,
)
from compressor.attention.rule import Phase, make_rule
from compressor.attention.rules.forecast import ForecastBlocks
from compressor.attention.rules.infllm import InfLLMBlocks
from compressor.attention.rules.quest import QuestPages
from compressor.attention.rules.streaming import (
    StreamingHeads,
    head_layers,
    streaming_heads,
    token_mask,
)
from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.evaluate.perplexity import evaluate
from compressor.ir.layout import UnitLayout

CPU = torch.device("cpu")
PHASES: tuple[Phase, ...] = ("prefill", "decode", "draft")


def some_policy(layers: int = 2, *, heads: int = 4, kv_heads: int = 2) -> AttentionPolicy:
    streaming = [[(i + g) % 2 == 0 for g in range(kv_heads)] for i in range(layers)]
    return AttentionPolicy(
        heads=heads,
        kv_heads=kv_heads,
        layers=head_layers(streaming, sinks=2, window=5),
        made_by={"duo_attention": {"share": 0.5}},
    )


def every_head(layers: int, *, heads: int, kv_heads: int, **window: int) -> AttentionPolicy:
    rows = torch.ones(layers, kv_heads, dtype=torch.bool)
    return AttentionPolicy(heads=heads, kv_heads=kv_heads, layers=head_layers(rows, **window))


def carrying(folder: Path, to: Path, policy: AttentionPolicy, **tensors: Tensor) -> Path:
    shutil.copytree(folder, to)
    for name, data in policy_files(policy, tensors).items():
        (to / name).write_bytes(data)
    return to


def test_the_mask_is_its_definition() -> None:
    queries, keys = torch.arange(7, 23), torch.arange(23)
    mask = token_mask(queries, keys, sinks=3, window=5)
    for row, i in enumerate(queries.tolist()):
        for j in keys.tolist():
            assert bool(mask[row, j]) == ((j < 3 or i - j < 5) and j <= i)


def test_files_give_the_policy_back(tmp_path: Path) -> None:
    policy = some_policy()
    layer = LayerPolicy(rules=(*policy.layers[0].rules, QuestPages()))
    policy = policy.model_copy(update={"layers": (layer, policy.layers[1])})
    gates = torch.rand(2, 2)
    for name, data in policy_files(policy, {"duo_attention.gates": gates}).items():
        (tmp_path / name).write_bytes(data)
    assert read_policy(tmp_path) == policy
    assert torch.equal(read_policy_tensors(tmp_path)["duo_attention.gates"], gates)
    assert policy_files(policy) == policy_files(policy)
    assert read_policy(tmp_path / "..") is None
    assert any("2 of 4 KV heads streaming (2 sinks + 5 recent" in x for x in describe(policy))


def test_the_cache_is_as_small_as_the_policy_says() -> None:
    policy = some_policy()
    assert streaming_heads(policy).float().mean() == 0.5
    assert policy.cached_tokens(100) == 2 * 100 + 2 * 6
    assert policy.cached_tokens(6) == 4 * 6


FIT = {"a": 1.0, "b": 5.0, "sparsity": 0.5, "lengths": [16, 64], "shares": [0.1, 0.8]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"kv_heads": 3}, "do not divide"),
        ({"positions": "slot"}, "slot positions need every head"),
        ({"layers": [{"streaming": {"heads": [0], "sinks": 5, "window": 5}}]}, "5 sinks are not"),
        ({"layers": [{"streaming": {"heads": [2], "sinks": 1, "window": 5}}]}, "no 2"),
        ({"layers": [{"streaming": {"heads": [1, 0], "sinks": 1, "window": 5}}]}, "ascending"),
        ({"layers": [{"streaming": {"heads": [0], "sinks": 1, "windov": 5}}]}, "windov"),
        ({"layers": [{"blocks": {"scorer": "quest", "top_k": 4}}]}, "cannot hold"),
        ({"layers": [{"blocks": {"scorer": "infllm", "stride": 24}}]}, "does not divide"),
        ({"layers": [{"blocks": {"scorer": "none"}}]}, "unknown attention rule 'none'"),
        ({"layers": [{"blocks": {"scorer": "streaming"}}]}, "stands under 'streaming'"),
        ({"layers": [{"infllm": {}}]}, "stands under 'blocks'"),
        ({"layers": [{"blocks": 1}]}, "not a mapping"),
        ({"layers": [[]]}, "layers.0 is not a mapping"),
        (
            {"layers": [{"blasst": {"decode": {**FIT, "sparsity": 0.85}}}]},
            "outside the 10.0% to 80",
        ),
        ({"layers": [{"blasst": {"decode": {**FIT, "a": math.inf}}}]}, "finite"),
        ({"layers": [{"blasst": {"prefill": {**FIT, "b": 900.0}}}]}, "give no threshold"),
        ({"layers": [{"xattention": {"threshold": [0.9] * 3}}]}, "3 thresholds for 4 query heads"),
        ({"layers": [{"infllm_memory": {"heads": [1]}}]}, "infllm_memory needs slot positions"),
        ({"layers": 1}, "layers"),
        ({"layers": []}, "layers"),
        ({"heads": "4"}, "heads"),
    ],
)
def test_bad_policies_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = {**some_policy().to_json(), **change}
    (tmp_path / "attention_policy.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        read_policy(tmp_path)


def test_a_policy_of_another_model_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    layout = open_source(tiny_model("llama")).layout
    check_policy(some_policy(), layout)
    with pytest.raises(InputError, match="for 3 layers, the model has 2"):
        check_policy(some_policy(3), layout)
    with pytest.raises(InputError, match=r"for 4/4 heads.*has 4/2"):
        check_policy(some_policy(kv_heads=4), layout)
    slot = every_head(2, heads=4, kv_heads=4, sinks=1, window=4)
    slot = slot.model_copy(update={"positions": "slot"})
    with pytest.raises(InputError, match="rotary"):
        check_policy(slot, open_source(tiny_model("opt")).layout)
    with pytest.raises(InputError, match="for 3 layers"):
        folder = carrying(tiny_model("llama"), tmp_path / "bad", some_policy(3))
        evaluate(open_source(folder), torch.ones(1, 9, dtype=torch.long), device=CPU,
                 dtype=torch.float32)  # fmt: skip


def test_policies_of_two_passes_combine() -> None:
    heads = some_policy()
    blocks = AttentionPolicy(
        heads=4,
        kv_heads=2,
        layers=(LayerPolicy(), LayerPolicy(rules=(InfLLMBlocks(),))),
        made_by={"sparda": {}},
    )
    both = combine(combine(None, heads), blocks)
    assert both.layers[0] == heads.layers[0]
    assert both.layers[1].rules == (*heads.layers[1].rules, InfLLMBlocks())
    assert list(both.made_by) == ["duo_attention", "sparda"]
    with pytest.raises(InputError, match="both decide `streaming` of layer 0"):
        combine(heads, heads)
    with pytest.raises(InputError, match="sorts heads"):
        combine(heads, blocks.model_copy(update={"reordered": True}))


@pytest.mark.parametrize("model_type", ["llama", "opt", "mistral", "gemma2", "phi3"])
def test_evaluation_masks_as_the_policy_says(
    model_type: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Against a whole transformers model under the same mask, its own sliding window included."""
    plain = tiny_model(model_type)
    source = open_source(plain)
    shape = source.layout.units[1].attention
    assert shape is not None
    policy = every_head(2, heads=shape.heads, kv_heads=shape.kv_heads, sinks=2, window=7)
    folder = carrying(plain, tmp_path / "policy", policy)
    ids = torch.randint(2, 256, (2, 48), generator=torch.Generator().manual_seed(1))
    found = evaluate(open_source(folder), ids, device=CPU, dtype=torch.float32)

    place = torch.arange(48)
    mask = token_mask(place, place, sinks=2, window=7)
    window = source.checkpoint.config.get("sliding_window")
    own = place[:, None] - place < (window or 48)
    kinds = {"full_attention": mask, "sliding_attention": mask & own}
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    eager = model.config._attn_implementation == "eager"

    def ready(mask: Tensor) -> Tensor:
        # Eager attention adds its mask, the fused one takes booleans.
        added = torch.zeros(48, 48).masked_fill(~mask, torch.finfo(torch.float32).min)
        return (added if eager else mask).expand(2, 1, 48, 48)

    given: Any = {k: ready(m) for k, m in kinds.items()}
    if model_type != "gemma2":
        given = given["full_attention" if window is None else "sliding_attention"]
    with torch.no_grad():
        logits = model(ids, attention_mask=given, position_ids=place.expand(2, -1)).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 256), ids[:, 1:].ravel()
        )
        full = model(ids).logits
        other = torch.nn.functional.cross_entropy(full[:, :-1].reshape(-1, 256), ids[:, 1:].ravel())
    assert found.nll.value == pytest.approx(float(loss), abs=2e-5)
    assert abs(float(loss) - float(other)) > 1e-3


def test_a_window_as_long_as_the_text_changes_nothing(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    ids = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    plain = open_source(tiny_model("llama"))
    before = evaluate(plain, ids, device=CPU, dtype=torch.float32).nll.value
    for positions in ("text", "slot"):
        policy = every_head(2, heads=4, kv_heads=2, sinks=4, window=40)
        policy = policy.model_copy(update={"positions": positions})
        folder = carrying(tiny_model("llama"), tmp_path / positions, policy)
        after = evaluate(open_source(folder), ids, device=CPU, dtype=torch.float32)
        assert after.nll.value == pytest.approx(before, abs=1e-6)
        around = evaluate(
            open_source(folder), ids, device=CPU, dtype=torch.float32, attention=lambda unit: None
        )
        assert around.nll.value == before


def test_heads_differ(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """One streaming head of four gives something between none and all."""
    ids = torch.randint(2, 256, (2, 60), generator=torch.Generator().manual_seed(1))
    losses = []
    for number, rows in enumerate(([[0, 0], [0, 0]], [[0, 0], [1, 0]], [[1, 1], [1, 1]])):
        layers = head_layers(torch.tensor(rows), sinks=1, window=4)
        policy = AttentionPolicy(heads=4, kv_heads=2, layers=layers)
        folder = carrying(tiny_model("llama"), tmp_path / str(number), policy)
        losses.append(evaluate(open_source(folder), ids, device=CPU, dtype=torch.float32).nll.value)
    assert len(set(losses)) == 3


def test_one_head_and_window_are_what_make_a_layer() -> None:
    (first, second) = head_layers([[True, False], [False, False]], sinks=1, window=3)
    assert first.rules == (StreamingHeads(heads=(0,), sinks=1, window=3),)
    assert second.rules == ()
    assert make_policy(some_policy().to_json()) == some_policy()


FILE = """{
 "version": 1,
 "heads": 4,
 "kv_heads": 2,
 "positions": "text",
 "reordered": false,
 "layers": [
  {
   "streaming": {
    "heads": [
     0
    ],
    "sinks": 1,
    "window": 3
   },
   "blocks": {
    "scorer": "quest",
    "block_size": 16,
    "kernel_size": 32,
    "stride": 16,
    "init_blocks": 0,
    "local_blocks": 0,
    "top_k": 4,
    "per": "query_head",
    "dense_below": 0
   }
  },
  {
   "blocks": {
    "scorer": "forecast",
    "block_size": 64,
    "kernel_size": 32,
    "stride": 16,
    "init_blocks": 1,
    "local_blocks": 32,
    "top_k": 96,
    "per": "kv_head",
    "dense_below": 8192
   }
  },
  {}
 ],
 "made_by": {
  "quest": {}
 }
}
"""
"""A file of version 1, as it was written before rules had files of their own."""


def test_files_of_version_1_are_read_and_written_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "attention_policy.json").write_text(FILE)
    policy = read_policy(tmp_path)
    assert policy is not None
    quest = QuestPages(
        block_size=16, init_blocks=0, local_blocks=0, top_k=4, per="query_head"
    )  # fmt: skip
    assert policy.layers[0].rules == (StreamingHeads(heads=(0,), sinks=1, window=3), quest)
    assert policy.layers[1].rules == (ForecastBlocks(dense_below=8192),)
    assert policy_files(policy) == {"attention_policy.json": FILE.encode()}
    turned = LayerPolicy(rules=policy.layers[0].rules[::-1])
    assert turned == policy.layers[0]


class Prefill(StreamingHeads):
    """Streaming in prompts alone."""

    part: ClassVar[str] = "prefill"
    phases: ClassVar[frozenset[Phase]] = frozenset(("prefill",))


class Draft(StreamingHeads):
    """Streaming for drafts alone."""

    part: ClassVar[str] = "draft"
    phases: ClassVar[frozenset[Phase]] = frozenset(("draft",))


class Narrow(StreamingHeads):
    """For heads of eight channels alone."""

    def check(self, unit: UnitLayout) -> None:
        if unit.attention is not None and unit.attention.head_dim != 8:
            raise InputError(f"{unit.name} has heads of {unit.attention.head_dim} channels, not 8")


def test_a_rule_refuses_a_model_that_it_is_not_for(tiny_model: Callable[..., Path]) -> None:
    layout = open_source(tiny_model("llama")).layout
    layers = (LayerPolicy(), LayerPolicy(rules=(Narrow(heads=(0,), sinks=1, window=4),)))
    with pytest.raises(InputError, match=r"layers\.1 has heads of 16 channels, not 8"):
        check_policy(AttentionPolicy(heads=4, kv_heads=2, layers=layers), layout)


def test_a_phase_has_its_own_rule() -> None:
    window = {"heads": (1,), "sinks": 1, "window": 4}
    prefill, draft = Prefill(**window), Draft(**window)
    full, some = LayerPolicy(rules=(draft, prefill, InfLLMBlocks())).groups(2)
    assert full.heads == [0] and {full.acting(p) for p in PHASES} == {InfLLMBlocks()}
    assert some.heads == [1] and [some.acting(p) for p in PHASES] == [prefill, None, draft]
    assert some.kept(torch.arange(9), 9) is None, "a decoding step sees everything"
    both = StreamingHeads(**window)
    with pytest.raises(ValueError, match="for the same heads"):
        LayerPolicy(rules=(both, prefill))
    with pytest.raises(ValueError, match="for the same heads"):
        LayerPolicy(rules=(InfLLMBlocks(), QuestPages()))
    (_, alone) = LayerPolicy(rules=(both,)).groups(2)
    kept = alone.kept(torch.arange(9), 9)
    assert kept is not None and kept.tolist() == [0, 6, 7, 8]


def test_every_rule_is_said_in_plain_words() -> None:
    """No name of a field, of a phase or of a value."""
    phase = {"a": 1.0, "b": 1.0, "sparsity": 0.5, "lengths": [64, 128]}
    entries: dict[str, dict[str, Any]] = {
        "streaming": {"heads": [0], "sinks": 2, "window": 5},
        "infllm_memory": {"local": 64, "piece": 8},
        "xattention": {"threshold": [0.5, 0.7]},
        "blasst": {"prefill": phase, "decode": phase},
        "pillar": {},
    }
    for scorer in ("infllm", "quest", "lserve", "moba", "forecast"):
        for per in ("query_head", "kv_head"):
            if scorer != "moba" or per == "query_head":
                entries[f"{scorer} {per}"] = {"scorer": scorer, "per": per}
    said = {}
    policy = AttentionPolicy(heads=4, kv_heads=2, layers=(LayerPolicy(),) * 4)
    for name, values in entries.items():
        rule = make_rule("blocks" if "scorer" in values else name, values)
        (said[name],) = type(rule).describe([rule], policy)
        assert not {*said[name]} & {*"_[]{}="} and any(n in said[name] for n in "124"), said[name]
    assert said["moba query_head"].startswith("1 of 4 layers read 96 blocks of 64 keys in prompts")
    assert "the query heads of each KV head together" in said["lserve kv_head"]

"""Stacked experts, computed one at a time, are what their family's own module computes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_calibration.stats import SiteStats, StatNeeds
from torch import Tensor, nn

from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.ir.layout import Linear, UnitLayout
from compressor.runner import watches
from compressor.runner.experts import experts_of
from compressor.runner.observe import observe
from compressor.runner.source_model import SourceModel
from compressor.runner.stream import Stream

FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
)
IDS = torch.randint(2, 256, (5, 24), generator=torch.Generator().manual_seed(7))
NEEDS = StatNeeds(gram=True, absmax=True, absmean=True)


class Bench:
    """The last block of a tiny model, loaded, and rows that enter it."""

    def __init__(self, folder: Path) -> None:
        source = open_source(folder)
        self.model = SourceModel(source, device=torch.device("cpu"), dtype=torch.float32)
        self.unit: UnitLayout = source.layout.blocks[-1]
        self.tensors = self.model.tensors(self.unit.index + 1)
        self.hidden = self.model.runner.embed(self.model.tensors(0), IDS)
        (self.stack, *_) = (x for x in self.unit.linears if x.expert is not None)
        for linear in self.unit.linears:
            if linear.role in ("expert.gate", "expert.up"):
                self.tensors[linear.weight_name] *= 10.0  # so that a gate that clamps does clamp

    def call(self) -> tuple[Any, ...]:
        """How the block calls the module of all experts."""
        calls = []
        with self.model.runner.loaded(self.unit, self.tensors) as block:
            module = block.module(self.stack)
            handle = module.register_forward_pre_hook(lambda m, args: calls.append(args))
            block.forward(self.hidden)
            handle.remove()
        return calls[0]

    def routed(self) -> tuple[list[Tensor], int]:
        """The tokens of each expert, and how many are routed."""
        call = self.call()
        experts = range(len({x.expert for x in self.unit.linears} - {None}))
        if len(call) == 1:
            tokens = [part[part.any(-1)] for part in call[0].view(len(experts), -1, 64)]
            return tokens, IDS.numel() * self.model.config["num_experts_per_tok"]
        hidden, chosen, _ = call
        return [hidden[(chosen == e).any(-1)] for e in experts], chosen.numel()


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Bench:
    return Bench(tiny_model(request.param))


def gated(bench: Bench, gate: Tensor, up: Tensor) -> Tensor:
    """The gate of a family, written once more."""
    if bench.model.config["model_type"] != "gpt_oss":
        return nn.functional.silu(gate) * up
    assert bool((gate > 7).any()) and bool((up.abs() > 7).any())
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def several(stats: Any, linears: Sequence[Linear]) -> list[SiteStats]:
    """Statistics of several sites, made together, a few tokens at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watches, "AT_ONCE", 64 * 24)
        found: list[SiteStats] = stats.several([x.site for x in linears])
    return found


class Unfused(nn.Module):
    """One expert as three linears, made of the checkpoint's own tensors."""

    def __init__(self, bench: Bench, expert: int) -> None:
        super().__init__()
        self.bench = bench
        for linear in bench.unit.linears:
            if linear.expert == expert:
                module = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias)
                module.weight.data = bench.tensors[linear.weight_name]
                if linear.bias:
                    module.bias.data = bench.tensors[linear.bias_name]
                setattr(self, linear.role.rpartition(".")[2], module)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = gated(self.bench, self.gate(x), self.up(x))
        return inner, self.down(inner)


@torch.no_grad()
def test_statistics_of_fused_experts_are_those_of_an_unfused_copy(bench: Bench) -> None:
    tokens, routed = bench.routed()
    downs = [x for x in bench.unit.linears if x.role == "expert.down"]
    with bench.model.runner.loaded(bench.unit, bench.tensors) as block:
        # In batches that do not divide the rows.
        found = observe(
            block,
            Stream(bench.hidden),
            needs=dict.fromkeys(bench.unit.sites, NEEDS),
            batch=2,
        )
        seen = 0
        for down in downs:
            assert down.expert is not None
            mine = tokens[down.expert]
            inner, _ = Unfused(bench, down.expert)(mine)
            expected = SiteStats(down.in_features, NEEDS, device=torch.device("cpu"))
            expected.update(inner)
            stats = found.stats[down.site]
            assert stats.tokens == expected.tokens == len(mine)
            for name in ("gram", "absmax", "absmean"):
                ours, theirs = getattr(stats, name), getattr(expected, name)
                assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max(), name
            seen += len(mine)
        assert seen == routed
        for down, stats in zip(downs, several(found.stats, downs), strict=True):
            for name in ("tokens", "bad_tokens"):
                assert getattr(stats, name) == getattr(found.stats[down.site], name), name
            for name in ("gram", "absmax", "absmean"):
                alone = getattr(found.stats[down.site], name)
                assert torch.equal(getattr(stats, name), alone), name
        # What every token enters has seen every token, be it computed before the experts or after.
        for site in {x.site for x in bench.unit.linears if x.expert is None} | {"expert.in"}:
            assert found.stats[site].tokens == IDS.numel(), site
            assert float(found.stats[site].absmax.max()) > 0, site


@torch.no_grad()
def test_every_expert_may_be_watched_on_all_tokens_while_the_router_decides(bench: Bench) -> None:
    (first, *_), (mine, _) = bench.call(), bench.routed()
    alone = len(bench.call()) == 1  # each expert's tokens apart, one expert for a token
    every = first.view(len(mine), -1, 64).sum(0) if alone else first.reshape(-1, 64)
    downs = {x.site: x for x in bench.unit.linears if x.role == "expert.down"}
    with bench.model.runner.loaded(bench.unit, bench.tensors) as block:
        before = block.forward(bench.hidden)
        found = observe(
            block,
            Stream(bench.hidden),
            needs=dict.fromkeys(downs, NEEDS),
            batch=2,
            all_experts=True,
        )
        for site, down in downs.items():
            assert down.expert is not None
            inner, _ = Unfused(bench, down.expert)(every)
            expected = SiteStats(down.in_features, NEEDS, device=torch.device("cpu"))
            expected.update(inner)
            stats = found.stats[site]
            assert stats.tokens == IDS.numel()
            assert (stats.gram - expected.gram).abs().max() < 1e-5 * expected.gram.abs().max()
        assert torch.equal(block.forward(bench.hidden), before)
    assert found.routed == {expert: len(tokens) for expert, tokens in enumerate(mine)}


@torch.no_grad()
def test_an_expert_is_the_family_s_own(bench: Bench) -> None:
    call, tokens = bench.call(), 40 * bench.hidden.flatten(0, 1)
    with bench.model.runner.loaded(bench.unit, bench.tensors) as block:
        module = block.module(bench.stack)
        experts = experts_of(module)
        together = module(*call)
        one_by_one = experts.forward(lambda expert, part, x: x)(*call)
        torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)
        for expert in range(len(experts)):
            _, expected = Unfused(bench, expert)(tokens)
            torch.testing.assert_close(
                experts.output(expert, tokens), expected, rtol=1e-4, atol=1e-5
            )


@torch.no_grad()
def test_gate_and_up_may_see_inputs_of_their_own(bench: Bench) -> None:
    tokens = 40 * bench.hidden.flatten(0, 1)
    apart = bench.model.config["model_type"] != "llama4_text"  # which multiplies with one input

    def enter(expert: int, part: str, x: Tensor) -> Tensor:
        return {"gate": x, "up": 2 * x if apart else x, "down": 3 * x}[part]

    with bench.model.runner.loaded(bench.unit, bench.tensors) as block:
        experts = experts_of(block.module(bench.stack))
        copy = Unfused(bench, 1)
        inner = gated(bench, copy.gate(tokens), copy.up(2 * tokens if apart else tokens))
        torch.testing.assert_close(
            experts.output(1, tokens, enter), copy.down(3 * inner), rtol=1e-4, atol=1e-5
        )


def test_experts_in_another_form_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"Sequential.*gate_up_proj"):
        experts_of(nn.Sequential())


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
def test_groups_of_experts_make_the_same_bits_and_statistics_as_all_beside_each_other(
    bench: Bench, size: int
) -> None:
    runner, needs = bench.model.runner, dict.fromkeys(bench.unit.sites, NEEDS)
    down = [x for x in bench.unit.linears if x.role == "expert.down"][-1]
    with runner.loaded(bench.unit, bench.tensors) as block:
        made = block.forward(bench.hidden)
        gram = observe(block, Stream(bench.hidden), needs=needs, batch=2).stats[down.site].gram
    runner.experts = lambda unit: size
    try:
        with runner.loaded(bench.unit, bench.tensors) as block:
            (groups,) = block.groups.values()
            assert all(parameter.is_meta for parameter in groups.module.parameters())
            assert torch.equal(block.forward(bench.hidden), made)
            found = observe(block, Stream(bench.hidden), needs=needs, batch=2)
            assert torch.equal(found.stats[down.site].gram, gram)
    finally:
        runner.experts = None
    with runner.loaded(bench.unit, bench.tensors) as block:
        assert not block.groups and torch.equal(block.forward(bench.hidden), made)

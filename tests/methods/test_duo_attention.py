"""Which heads stream: passkey rows, gates through two streams, copy scores, sorted heads."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.attention.evaluation import policy_attention
from compressor.attention.policy import check_policy, make_policy
from compressor.attention.rules.streaming import streaming_heads, streaming_policy
from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Interrupted
from compressor.evaluate.perplexity import evaluate
from compressor.methods.common.context import PassContext
from compressor.methods.common.needles import Needles, make_row
from compressor.methods.duo_attention.gate_training import Penalty, start_gates
from compressor.methods.duo_attention.method import DuoAttention, Gates
from compressor.methods.duo_attention.two_stream import TwoStream
from compressor.methods.retrieval_heads import RetrievalHeads
from compressor.methods.streaming.method import Streaming
from compressor.numerics.head_gates import (
    gap_at,
    hoyer_square,
    hoyer_threshold,
    keep_full,
    schedule,
)
from compressor.ranks.ranks import Ranks
from compressor.runner.source_model import SourceModel
from tests.support.head_bench import CPU, TINY, context, frozen
from tests.support.planned import planned


def random_ids(rows: int = 4, length: int = 100) -> Tensor:
    return torch.randint(2, 256, (rows, length), generator=torch.Generator().manual_seed(2))


def test_rows_hold_their_keys_twice(tiny_models: ModuleType) -> None:
    tokenizer = tiny_models.tokenizer()
    haystack = tokenizer("It was a bright day. " * 60)["input_ids"]
    row = make_row(tokenizer, haystack, data=TINY, length=200, draw=random.Random(1))
    assert row.ids.shape == (200,)
    text = tokenizer.decode(row.ids)
    for ordinal, answer in zip(("first", "second"), row.answers, strict=True):
        hidden, given = (row.ids[slice(*span)] for span in (answer.hidden, answer.given))
        assert torch.equal(hidden, given)
        word = tokenizer.decode(given)
        assert f" {ordinal} key:{word}." in text and f" {ordinal}?{word}" in text
        assert answer.hidden[1] < 200 - int(row.scored.sum()) <= answer.given[0]
    answers = TINY.model_copy(update={"supervise": "answers"})
    same = make_row(tokenizer, haystack, data=answers, length=200, draw=random.Random(1))
    assert torch.equal(same.ids, row.ids)
    marked = same.scored.nonzero()[:, 0].tolist()
    assert marked == [i - 1 for a in same.answers for i in range(*a.given)]
    with pytest.raises(InputError, match="no room"):
        make_row(tokenizer, haystack, data=TINY, length=40, draw=random.Random(1))
    with pytest.raises(InputError, match="haystack has 50 tokens"):
        make_row(tokenizer, haystack[:50], data=TINY, length=200, draw=random.Random(1))
    for needle in ("nothing", "{ordinal}", "{} {ordinal} {passkey}", "{ordinal} {passkey!r}"):
        with pytest.raises(ValidationError, match=r"must contain \{ordinal\} and \{passkey\} once"):
            Needles(needle=needle)
    with pytest.raises(ValidationError, match=r"must end with \{passkey\}"):
        Needles(question="{passkey} is the {ordinal} one")


def test_hoyer_square_is_the_number_of_active_gates() -> None:
    assert float(hoyer_square(torch.tensor([0.0, 3.0, 0.0]))) == pytest.approx(1)
    assert float(hoyer_square(torch.full((5,), 0.2))) == pytest.approx(5)
    assert float(hoyer_square(torch.tensor([1.0, 1, 0, 0]))) == pytest.approx(2)
    gates = torch.rand(20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(hoyer_square(7 * gates), hoyer_square(gates))
    (grad,) = torch.autograd.grad(hoyer_square(gates), gates)
    # Gates below the threshold are pushed down, those above it up.
    assert torch.equal(grad > 0, gates < hoyer_threshold(gates.detach()))
    assert torch.isfinite(hoyer_square(torch.zeros(3)))


def test_penalties_and_schedule_are_the_published_ones() -> None:
    gates = torch.tensor([[0.5, -0.1], [1.0, 0.0]])
    assert float(Penalty("l1", 0.05)(gates)) == pytest.approx(0.05 * 0.4)
    even = torch.ones(2, 2)
    assert float(Penalty("hoyer2", 0.1)(even)) == pytest.approx(0.1)
    assert float(Penalty("hoyer2", 0.1, budget=0.75)(even)) == pytest.approx(0.1 * 1.25)
    factors = [schedule(step, 2000) for step in range(2000)]
    assert factors[0] == factors[20] == 0.1 and factors[399] == 1 and factors[1000] == 1
    assert factors[1800] == pytest.approx(0.5) and factors[-1] == pytest.approx(0.1)


def test_heads_are_chosen_by_share_or_threshold() -> None:
    gates = torch.tensor([[0.9, 0.1], [0.4, 0.4]])
    assert keep_full(gates, 0).all() and not keep_full(gates, 1).any()
    # Of equal heads the later one stays.
    assert keep_full(gates, 0.5).tolist() == [[True, False], [False, True]]
    assert gap_at(gates, 0.4) == pytest.approx(0.3)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "mistral", "phi3"])
def test_gates_at_their_ends_are_full_and_streaming(
    family: str, tiny_model: Callable[..., Path]
) -> None:
    """Open gates change nothing; shut gates give what evaluation under the policy gives."""
    model: Any = frozen(tiny_model(family))
    shape = model.layout.units[1].attention
    ids = random_ids(2, 48)
    with TwoStream(model, sinks=2, window=6).loaded() as streams:
        opened = streams.run(ids, torch.ones(2, shape.kv_heads))
        torch.testing.assert_close(opened.gated, opened.full)
        shut = streams.run(ids, torch.zeros(2, shape.kv_heads))
    rows = torch.ones(2, shape.kv_heads, dtype=torch.bool)
    attending = policy_attention(streaming_policy(model.layout, rows, sinks=2, window=6))
    hidden = model.runner.embed(model.tensors(0), ids)
    for number, unit in enumerate(model.layout.units[1:-1], 1):
        with (
            model.runner.loaded(unit, model.tensors(number)) as block,
            model.runner.attention(attending(model.source.read_unit(unit))),
        ):
            hidden = block.forward(hidden)
    tensors = model.tensors(3)
    with model.runner.head(tensors, torch.empty(0)):
        norm = model.runner.model.get_submodule(model.runner.names.norm)
        torch.testing.assert_close(shut.gated, norm(hidden), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(shut.gated, shut.full, atol=1e-2)


def test_gradients_are_those_of_finite_differences(tiny_model: Callable[..., Path]) -> None:
    model: Any = frozen(tiny_model("llama"))
    model.dtype = model.runner.dtype = torch.float64
    gates = torch.tensor([[0.3, 0.8], [0.6, 0.2]], dtype=torch.float64, requires_grad=True)

    def loss(gates: Tensor) -> Tensor:
        pair = streams.run(random_ids(1, 40), gates)
        return (pair.full - pair.gated).square().mean()

    with TwoStream(model, sinks=2, window=6).loaded() as streams:
        for layer in streams.layers:
            layer.double()
        (grad,) = torch.autograd.grad(loss(gates), gates)
        for index in ((0, 0), (1, 1)):
            step = torch.zeros_like(gates)
            step[index] = 1e-4
            with torch.no_grad():
                slope = (loss(gates + step) - loss(gates - step)) / 2e-4
            assert float(slope) == pytest.approx(float(grad[index]), rel=2e-2)


def duo(**options: Any) -> DuoAttention:
    values = {"data": TINY, "sinks": 2, "window": 8, "num_steps": 6, **options}
    return DuoAttention(**values)


def test_training_resumes_to_the_same_gates(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.methods.duo_attention.gate_training.SAVE_EVERY", 2)
    model: Any = frozen(tiny_model("llama"))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = duo().learn(model, context(random_ids(), tmp_path / "one"))
    done = 0

    def progress(name: str, step: int, steps: int) -> None:
        nonlocal done
        done = step

    broken = context(random_ids(), tmp_path / "two", stopping=lambda: done == 3, progress=progress)
    with pytest.raises(Interrupted):
        duo().learn(model, broken)
    assert done == 3
    again = duo().learn(model, context(random_ids(), tmp_path / "two"))
    assert torch.equal(again.value.gates, whole.value.gates)
    assert again.rows == whole.rows
    assert not torch.equal(whole.value.gates, torch.ones(2, 2)), "nothing was learned"


def test_training_that_died_goes_on_from_its_last_saved_step(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any step, also one after which nothing was saved."""
    monkeypatch.setattr("compressor.methods.duo_attention.gate_training.SAVE_EVERY", 2)
    model: Any = frozen(tiny_model("llama"))
    (tmp_path / "whole").mkdir()
    whole = duo(regularizer="hoyer2").learn(model, context(random_ids(), tmp_path / "whole"))

    class Died(BaseException):
        pass

    for last in (1, 2, 5):
        scratch = tmp_path / str(last)
        scratch.mkdir()
        steps: list[int] = []

        def progress(name: str, step: int, total: int, last: int = last) -> None:
            steps.append(step)  # noqa: B023
            if step == last and steps.count(last) == 1:  # noqa: B023
                raise Died

        for _ in range(2):
            try:
                again = duo(regularizer="hoyer2").learn(
                    model, context(random_ids(), scratch, progress=progress)
                )
            except Died:
                continue
        # The first step that is done twice is the one after the last that was saved.
        assert steps == [*range(1, last + 1), *range(last // 2 * 2 + 1, 7)]
        assert torch.equal(again.value.gates, whole.value.gates)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gates_of_a_model_in_bf16(
    device: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Gates and losses stay float32, and go where those of the float32 model go."""
    found = []
    for number, (place, dtype) in enumerate((("cpu", torch.float32), (device, torch.bfloat16))):
        model: Any = SourceModel(
            open_source(tiny_model("llama")), device=torch.device(place), dtype=dtype
        )
        (tmp_path / str(number)).mkdir()
        given = duo(lr=0.05, reg_weight=0.0, num_steps=8)
        learned = given.learn(model, context(random_ids(), tmp_path / str(number)))
        found.append(learned.value.gates)
    exact, half = found
    assert half.dtype == torch.float32 and half.device.type == "cpu"
    torch.testing.assert_close(half, exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("options", [{"regularizer": "hoyer2", "share": None}, {"share": 0.5}])
def test_what_is_learned_is_a_policy(
    options: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model: Any = frozen(tiny_model("llama"))
    given = duo(deploy_sinks=1, deploy_window=5, num_steps=3, **options)
    found = given.learn(model, context(random_ids(), tmp_path))
    policy = given.policy(model.layout, found.value)
    assert policy is not None and make_policy(policy.to_json()) == policy
    gates, about = found.value.gates, policy.made_by["duo_attention"]
    assert torch.equal(~streaming_heads(policy), gates >= about["threshold"])
    assert {(rule.sinks, rule.window) for layer in policy.layers for rule in layer.rules} == {
        (1, 5)
    }
    if options.get("share"):
        assert streaming_heads(policy).float().mean() == 0.5
    else:
        assert about["threshold"] == pytest.approx(hoyer_threshold(gates))
    assert found.plots["duo_attention_gates.png"].startswith(b"\x89PNG")


def test_one_rank_alone_draws(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    class Second(Ranks):
        leads = False  # type: ignore[assignment]

    model: Any = frozen(tiny_model("llama"))
    alone = replace(context(random_ids(), tmp_path), ranks=Second())
    assert not duo(num_steps=3).learn(model, alone).plots


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "opt", "gemma2"])
def test_sorted_heads_are_the_same_function(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(family)
    source = open_source(folder)
    shape = source.layout.units[1].attention
    assert shape is not None
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(shape.kv_heads, generator=generator) for _ in range(2)])
    order[0] = order[0].flip(0) if torch.equal(order[0].sort().values, order[0]) else order[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = model(random_ids()).logits
    state = {}
    for unit in source.layout.units[1:-1]:
        ready = PassContext(
            stats={}, schemes={}, selected=(), module_loss=lambda site, weights: 0.0, seed=0
        )
        learned = Gates(gates=order.float(), order=order)
        state |= duo(reorder=True).apply(source.read_unit(unit), ready, learned).unit.tensors
    moved = [n for n, t in state.items() if not torch.equal(t, model.state_dict()[n])]
    assert any("attn" in name for name in moved)
    model.load_state_dict({**model.state_dict(), **state})
    torch.testing.assert_close(model(random_ids()).logits, before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("afmoe", "self_attn.gate_proj"),
        ("gpt_oss", "self_attn.sinks"),
        ("olmo2", "self_attn.q_norm"),
        ("gemma4_text shared", "which other blocks read"),
        ("qwen3", None),
        ("qwen3_moe", None),
    ],
)
def test_heads_are_sorted_where_all_that_is_by_head_goes_with_them(
    family: str, what: str | None, tiny_model: Callable[..., Path]
) -> None:
    plan = planned(open_source(tiny_model(family)).layout)
    assert not list(duo().check(plan))
    found = [problem.message for problem in duo(reorder=True).check(plan)]
    assert [what in message for message in found] == [True] if what else not found


def test_bad_parameters_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    for wrong in (
        {"sinks": 8}, {"share": 0.5, "threshold": 0.5}, {"budget": 0.5}, {"deploy_window": 2},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            duo(**wrong)
    model: Any = frozen(tiny_model("llama"))
    long = duo(data=TINY.model_copy(update={"max_length": 300}))
    (refused,) = long.check(planned(model.layout))
    assert "300 tokens are longer than the model's 256 positions" in refused.message
    learned_positions = open_source(tiny_model("opt")).layout
    with pytest.raises(InputError, match="rotary"):
        check_policy(Streaming().policy(learned_positions, None), learned_positions)
    with pytest.raises(ValidationError, match="not fewer"):
        Streaming(sinks=9, window=9)
    (refused,) = Streaming(sinks="measured", window=60).check(planned(model.layout))
    assert "too short to see a window of 60" in refused.message
    with pytest.raises(InputError, match="answers none of the 16 passkeys"):
        RetrievalHeads(data=TINY).learn(model, context(random_ids(), tmp_path))


@pytest.mark.parametrize("positions", ["slot", "text"])
def test_measured_sinks_are_those_of_evaluation(
    positions: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    model: Any = frozen(folder)
    ids = random_ids(2, 90)
    given = Streaming(sinks="measured", window=12, candidates=(0, 3), positions=positions)
    found = given.learn(model, context(ids, tmp_path))
    policy = given.policy(model.layout, found.value)
    measured = policy.made_by["streaming"]["perplexity"]
    assert streaming_heads(policy).float().mean() == 1 and policy.positions == positions
    scored = torch.zeros(2, 89, dtype=torch.bool)
    scored[:, 12:] = True
    for sinks in (0, 3):
        fixed = Streaming(sinks=sinks, window=12, positions=positions)
        every = fixed.policy(model.layout, None)
        result = evaluate(
            open_source(folder), ids, device=CPU, dtype=torch.float32, scored=scored,
            attention=policy_attention(every),
        )  # fmt: skip
        assert measured[str(sinks)] == pytest.approx(result.perplexity.value, rel=1e-4)


def test_first_gates() -> None:
    assert torch.equal(start_gates((2, 3), spread=0, seed=0), torch.ones(2, 3))
    spread = start_gates((2, 3), spread=0.1, seed=0)
    assert 0.9 <= float(spread.min()) < float(spread.max()) <= 1
    scores = torch.tensor([[0.1, 0.4]])
    assert torch.allclose(
        start_gates((1, 2), spread=0, seed=0, scores=scores), torch.tensor([[0.25, 1.0]])
    )

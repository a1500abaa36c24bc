"""Forecasts trained block by block: the weights that training all blocks at once gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressor_kernels.attention.block_windows import WindowRule

from compressor.attention.evaluation import under_masks
from compressor.attention.rules.forecast import ForecastBlocks, forecast_of
from compressor.checkpoint.records import Records
from compressor.checkpoint.source import open_source
from compressor.errors import Interrupted
from compressor.methods.sparda.optimizer import ForecastOptimizer
from compressor.methods.sparda.start import LeastSquares, initial_forecast, mean_queries
from compressor.methods.sparda.teacher import Teacher, attention_inputs, norms
from compressor.methods.sparda.training import Trainer, Training
from compressor.runner.activations import Activations
from compressor.runner.attention_call import AttentionCall
from compressor.runner.source_model import SourceModel
from tests.support.block_cases import FINE, SMALL
from tests.support.tiny_models import build

SELECTION = ForecastBlocks(block_size=8, **SMALL)
TEACHER = Teacher(selection=SELECTION, fine=FINE)
TRAINING = Training(teacher=TEACHER, steps=4, rows_per_step=3, learning_rate=0.01, warmup=2)
LAYERS, ROWS, LENGTH, SEED = 3, 5, 57, 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    folder = build("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)
    return SourceModel(open_source(folder), device=torch.device("cpu"), dtype=torch.float32)


def ids() -> torch.Tensor:
    return torch.randint(2, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def sweep(model: SourceModel, scratch: Path, training: Training = TRAINING, **options: object):
    kept = Records(scratch, "test")
    return Trainer(model, ids(), training, seed=SEED, batch=2, scratch=kept, **options)


def all_at_once(model: SourceModel, training: Training) -> list[torch.Tensor]:
    """The whole model in memory, every step one forward pass that trains all forecasts; gradients
    are clipped block by block."""
    runner = model._new_runner()
    runner.embed(model.tensors(0), ids()[:1])
    runner.fill((unit, model.tensors(i)) for i, unit in enumerate(model.layout.units))
    forecasts = [
        ForecastOptimizer(initial_forecast(32, 64, seed=SEED + 1 + i), training)
        for i in range(LAYERS)
    ]
    for step, rows in enumerate(training.order(ROWS, seed=SEED)):
        calls: list[AttentionCall] = []

        def hook(call: AttentionCall) -> torch.Tensor:
            calls.append(call)  # noqa: B023
            if not training.chosen_states:
                return call.plain(call.query, call.key, call.value)
            blocks = training.teacher.blocks(call)
            return under_masks(call, [(range(2), SELECTION.seen_in(blocks, call.key.shape[2]))])

        with torch.no_grad(), runner.attention(hook):
            runner.model(input_ids=ids()[rows], use_cache=False)
        for layer, call in enumerate(calls):
            reads = calls[max(0, layer - 1)]
            _, (gradient,) = training.teacher_at(step).gradient(
                forecasts[layer].weight, reads.hidden, call, reads.rotary, rows=len(rows)
            )
            forecasts[layer].step(gradient)
    return [forecast.weight.detach() for forecast in forecasts]


@pytest.mark.parametrize("change", [{}, {"chosen_states": False}, {"progressive": True}])
def test_one_sweep_trains_what_all_blocks_at_once_do(model, tmp_path, change):
    training = Training(**{**{k: getattr(TRAINING, k) for k in TRAINING.__slots__}, **change})
    found = sweep(model, tmp_path / "scratch", training).run()
    whole = all_at_once(model, training)
    assert len(found.future) == LAYERS
    for ours, theirs in zip([found.current, *found.future], whole, strict=False):
        assert not torch.allclose(ours, initial_forecast(32, 64, seed=SEED + 1), atol=1e-3)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert found.future[-1].abs().max() <= 1 / 8  # never trained


@pytest.mark.parametrize("chosen_states", [True, False])
def test_forecasts_are_the_same_where_hidden_states_are_read(model, tmp_path, chosen_states):
    """A second training reads every state that the first one kept; other teachers see others."""
    plain = replace(TRAINING, chosen_states=chosen_states)
    wanted = sweep(model, tmp_path / "without", plain).run()
    kept = Activations.open(tmp_path / "acts", 10**8, {})
    keeping = SourceModel(model.source, device=model.device, dtype=model.dtype, activations=kept)
    for number in range(2):
        found = sweep(keeping, tmp_path / str(number), plain).run()
        assert torch.equal(found.current, wanted.current)
        assert all(map(torch.equal, found.future, wanted.future))
        assert (kept.ran, kept.read) == ((LAYERS - 1) * ROWS, number * (LAYERS - 1) * ROWS)
    sweep(keeping, tmp_path / "other", replace(plain, chosen_states=not chosen_states)).run()
    assert kept.ran == 2 * (LAYERS - 1) * ROWS


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3_moe"])
def test_mean_queries_are_what_the_block_itself_asks(tmp_path, family):
    """Read by the block's own attention, they give the mean of its queries before any norm."""
    folder = build(family, tmp_path)
    source = SourceModel(open_source(folder), device=torch.device("cpu"), dtype=torch.float32)
    unit, tensors = source.layout.units[2], source.tensors(2)
    linear = next(x for x in unit.linears if x.role in ("attn.q", "attn.qkv"))
    shape = unit.attention
    source.runner.embed(source.tensors(0), ids()[:1, :5])
    with attention_inputs(source.runner, unit, norms(unit, tensors)) as inputs:
        mine = inputs(torch.randn(1, 5, 64))
    rows = shape.heads * shape.head_dim
    queries = mine @ tensors[f"{linear.name}.weight"][:rows].T
    want = queries.view(1, 5, 2, -1, shape.head_dim).mean(3).flatten(2)
    torch.testing.assert_close(
        mine @ mean_queries(unit, unit.attention, tensors).T, want, atol=1e-4, rtol=1e-4
    )


def test_least_squares_is_that_of_all_pairs_at_once():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 50, n, generator=generator) for n in (6, 4))
    y = x @ torch.randn(6, 4, generator=generator) + 0.1 * noise
    fit = LeastSquares()
    for part in range(3):
        fit.add(x[part : part + 1], y[part : part + 1])
    want = torch.linalg.lstsq(x.flatten(0, 1).double(), y.flatten(0, 1).double()).solution
    torch.testing.assert_close(fit.solve(), want.T.float(), atol=1e-3, rtol=1e-3)


def test_forecasts_that_start_from_queries(model, tmp_path):
    """Block 0's are its own mean queries; the others' come close to them before any step."""
    still = Training(
        teacher=TEACHER, steps=1, rows_per_step=1, learning_rate=1e-12, initial="queries"
    )
    found = sweep(model, tmp_path / "scratch", still).run()
    blocks = model.layout.units[1:-1]
    own = [
        mean_queries(unit, unit.attention, model.tensors(i + 1)) for i, unit in enumerate(blocks)
    ]
    torch.testing.assert_close(found.current, own[0])
    runner = model._new_runner()
    runner.embed(model.tensors(0), ids()[:1])
    runner.fill((unit, model.tensors(i)) for i, unit in enumerate(model.layout.units))
    entered: list[torch.Tensor] = []

    def hook(call: AttentionCall) -> torch.Tensor:
        entered.append(call.hidden)
        blocks = TEACHER.blocks(call)
        return under_masks(call, [(range(2), SELECTION.seen_in(blocks, call.key.shape[2]))])

    with torch.no_grad(), runner.attention(hook):
        runner.model(input_ids=ids(), use_cache=False)
    for layer in (1, 2):
        want = entered[layer] @ own[layer].T
        got = entered[layer - 1] @ found.future[layer - 1].T
        guess = entered[layer - 1] @ own[layer].T
        assert (got - want).square().sum() < 0.5 * (guess - want).square().sum()


def test_two_buffers_are_all_that_lies_on_disk(model, tmp_path):
    sweep(model, tmp_path / "scratch").run()
    states = list((tmp_path / "scratch").glob("states.*"))
    size = sum(path.stat().st_size for path in states)
    assert len(states) == 2
    assert size == 2 * ROWS * LENGTH * 64 * 4


@pytest.mark.parametrize("after", [0, 1, 2, 5, 6, 9, 13, 17, 18])
def test_a_stopped_sweep_goes_on_to_the_same_bits(model, tmp_path, after, whole_sweep):
    asked = 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    with pytest.raises(Interrupted):
        sweep(model, tmp_path / "scratch", stops=stopping).run()
    found = sweep(model, tmp_path / "scratch").run()
    assert torch.equal(found.current, whole_sweep.current)
    assert all(torch.equal(a, b) for a, b in zip(found.future, whole_sweep.future, strict=True))
    assert found.losses == whole_sweep.losses


@pytest.fixture(scope="module")
def whole_sweep(model, tmp_path_factory):
    return sweep(model, tmp_path_factory.mktemp("whole") / "scratch").run()


def test_the_gradient_is_the_loss_s(model):
    """In pieces and by hand-carried gradients as from one graph, against finite differences."""
    runner = model._new_runner()
    runner.embed(model.tensors(0), ids()[:1])
    runner.fill((unit, model.tensors(i)) for i, unit in enumerate(model.layout.units))
    calls: list[AttentionCall] = []

    def hook(call: AttentionCall) -> torch.Tensor:
        calls.append(call)
        return call.plain(call.query, call.key, call.value)

    with torch.no_grad(), runner.attention(hook):
        runner.model(input_ids=ids()[:2], use_cache=False)
    weight = initial_forecast(32, 64, seed=1).requires_grad_()
    direction = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))

    def loss(at: torch.Tensor) -> float:
        at = at.detach().requires_grad_()
        read, call = calls[:2]
        return float(TEACHER.gradient(at, read.hidden, call, read.rotary, rows=2)[0])

    _, (gradient,) = TEACHER.gradient(weight, calls[0].hidden, calls[1], calls[0].rotary, rows=2)
    slope = (loss(weight + 1e-2 * direction) - loss(weight - 1e-2 * direction)) / 2e-2
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02)


def test_training_lowers_the_loss(model, tmp_path):
    longer = Training(teacher=TEACHER, steps=40, rows_per_step=5, learning_rate=0.02)
    found = sweep(model, tmp_path / "scratch", longer).run()
    assert all(last < 0.9 * first for first, last in found.losses)


def test_progressive_teachers_halve():
    wide = SELECTION.model_copy(update={"kernel_size": 8, "stride": 4})
    training = Training(
        teacher=Teacher(selection=wide, fine=WindowRule(kernel_size=2, stride=1)),
        steps=9,
        progressive=True,
    )
    kernels = [training.teacher_at(step).fine.kernel_size for step in range(9)]
    assert kernels == [8, 8, 8, 4, 4, 4, 2, 2, 2]


def test_forecasts_are_turned_where_keys_are():
    hidden, weight = torch.randn(1, 6, 8), torch.randn(8, 8)
    plain = forecast_of(hidden, weight, kv_heads=2, rotary=None)
    torch.testing.assert_close(plain[0, 1, 3], weight[4:] @ hidden[0, 3])

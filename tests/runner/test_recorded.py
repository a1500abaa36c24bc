"""Steps of a block recorded once, and run again from the same addresses."""

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ranks.ranks import ALONE
from compressor.runner.block_runner import BlockRunner
from compressor.runner.recorded import Recorded, Recorder
from compressor.runner.stream import Stream
from compressor.runner.sweep import Execution
from compressor.runner.tunable_block import TunableBlock


class Again:
    """A graph as far as a CPU has one: the work that was recorded, run into the same outputs."""

    def __init__(self, work):
        self._work, self.made = work, [x.clone() for x in work()]

    def replay(self):
        for place, value in zip(self.made, self._work(), strict=True):
            place.copy_(value)


class OnCpu(Recorder):
    """Records on a CPU; `recorded` counts."""

    def __init__(self):
        super().__init__(torch.device("cuda"))
        self.recorded = 0

    def record(self, work):
        self.recorded += 1
        graph = Again(work)
        return graph, graph.made


def test_work_runs_once_as_it_is_and_then_from_its_recording():
    recorder, place, calls = OnCpu(), torch.zeros(3), []

    def work():
        calls.append(1)
        return [place * 2]

    piece = Recorded(recorder)
    for value in (1.0, 2.0, 3.0, 4.0):
        place.fill_(value)
        assert piece.run(work)[0].tolist() == [2 * value] * 3
        assert piece.replays == (value > 1)
    assert recorder.recorded == 1


def test_what_cannot_be_recorded_runs_as_it_is_every_time():
    class Refuses(OnCpu):
        def record(self, work):
            self.recorded += 1
            raise RuntimeError("operation not permitted when stream is capturing")

    for recorder, recordable, tried in ((Refuses(), True, 1), (OnCpu(), False, 0)):
        piece = Recorded(recorder, recordable=recordable)
        assert [piece.run(lambda: [torch.ones(1)])[0].item() for _ in range(4)] == [1.0] * 4
        assert not piece.replays and recorder.recorded == tried
    assert not Recorded(Recorder(torch.device("cpu"))).replays


ROWS, LENGTH = 12, 24


def blocks(folder, *, recorder=None, device="cpu", dtype=torch.float32, inputs=None):
    """A block that may be tuned towards noise beside its outputs, on rows of its own."""
    source = open_source(folder)
    device = torch.device(device)
    runner = BlockRunner(source.checkpoint.config, source.arch.runtime, device=device, dtype=dtype)
    if recorder is not None:
        runner.recorder = recorder
    first, _, layout, _ = source.layout.units
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 256, (ROWS, LENGTH), generator=draw)
    hidden = runner.embed(source.read_unit(first).dequantized(), ids)
    unit = source.read_unit(layout)
    scheme = Scheme(input=inputs)
    with runner.loaded(layout, unit.dequantized()) as block:
        targets = block.forward(hidden)
        targets += 0.1 * torch.randn(targets.shape, generator=draw).to(targets)
        yield (
            TunableBlock(
                block,
                unit,
                inputs=Stream(hidden),
                targets=Stream(targets),
                execution=Execution(4),
                schemes={x.name: scheme for x in layout.linears},
            ),
            {x.name: unit.weight(x).to(device) for x in layout.linears if x.role != "router"},
        )


def steps(block, weights, count=4):
    """Losses and gradients of steps whose rows and weights differ."""
    draw, found = torch.Generator().manual_seed(1), []
    for number in range(count):
        rows = torch.randperm(ROWS, generator=draw)[:8].tolist()
        scaled = {name: w * (1 + 0.01 * number) for name, w in weights.items()}
        found.append(block.loss_and_gradients(scaled, rows, [ALONE.rank] * len(weights)))
    return found


def assert_same(ours, theirs):
    for (loss, gradients), (wanted, expected) in zip(ours, theirs, strict=True):
        assert loss == wanted
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert len({loss for loss, _ in ours}) == len(ours)


@pytest.mark.parametrize("inputs", [None, ActivationSpec(element="int8", mode="token")])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_step_reads_all_that_differs_from_its_places(model_type, inputs, tiny_model):
    folder, recorder = tiny_model(model_type), OnCpu()
    for block, weights in blocks(folder, inputs=inputs):
        plain = steps(block, weights)
    for block, weights in blocks(folder, recorder=recorder, inputs=inputs):
        assert_same(steps(block, weights), plain)
    assert recorder.recorded == 1  # the pieces of all steps are alike


def test_experts_are_never_recorded(tiny_model):
    recorder = OnCpu()
    for block, weights in blocks(tiny_model("mixtral"), recorder=recorder):
        assert len(steps(block, weights, 2)) == 2
    assert recorder.recorded == 0


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", [None, ActivationSpec(element="int8", mode="token")])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_graph_gives_what_its_kernels_give(model_type, inputs, tiny_model):
    folder = tiny_model(model_type)
    never = Recorder(torch.device("cuda"))
    never.record = lambda work: (_ for _ in ()).throw(RuntimeError("not here"))
    kind = {"device": "cuda", "dtype": torch.bfloat16, "inputs": inputs}
    for block, weights in blocks(folder, recorder=never, **kind):
        plain = steps(block, weights)
    for block, weights in blocks(folder, **kind):
        assert_same(steps(block, weights), plain)
        assert block.replays


@pytest.mark.gpu
def test_memory_does_not_grow_with_what_was_recorded():
    recorder, device = Recorder(torch.device("cuda")), torch.device("cuda")
    weight = torch.randn(256, 256, device=device, requires_grad=True)
    place, taken = torch.randn(64, 256, device=device), []

    def work():
        return torch.autograd.grad((place @ weight).square().sum(), [weight])

    for _ in range(6):
        piece = Recorded(recorder)
        for _ in range(3):
            piece.run(work)
        assert piece.replays
        del piece
        taken.append(torch.cuda.memory_allocated(device))
    assert len(set(taken[2:])) == 1

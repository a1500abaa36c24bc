"""The comparison with the original in a process of its own finds what it finds in this one."""

import pickle
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.checkpoint.find import locate
from compressor.checkpoint.source import Source, open_source
from compressor.plan.recipe import make_recipe
from compressor.run.convert import convert
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.kept_blocks import with_blocks
from compressor.verify import apart as apart_module
from compressor.verify import verify as verifying
from compressor.verify.apart import Apart, beside_gpu
from compressor.verify.elsewhere import ROOM, has_room
from compressor.verify.findings import VerifyReport
from compressor.verify.kernels import check as kernel_checks
from compressor.verify.subject import Subject
from compressor.verify.verify import verify
from tests.checkpoint import test_low_precision
from tests.support import gguf_files
from tests.support.damages import in_tensors, scaled, sign
from tests.support.delta_pairs import pairs
from tests.support.delta_pairs import run as run_delta

CPU = choose_device("cpu")
GRID = {"bits": 4, "group_size": 32, "symmetric": False}


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "interpreter_runs", lambda: False)


@pytest.fixture(scope="module")
def made(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a checkpoint that was made from it."""
    folder = tmp_path_factory.mktemp("made")
    model = Path(tiny_models.build("llama", folder / "model"))
    recipe = {"model": str(model), "output": str(folder / "out"), "passes": [{"rtn": GRID}]}
    return model, compile_checkpoint(prepare(make_recipe(recipe), device=CPU)).output


@pytest.fixture
def apart() -> Iterator[Apart]:
    with Apart("cpu") as process:
        yield process


def both(folder: Path, apart: Apart, **options: Any) -> VerifyReport:
    """The report of both ways, which are held to be one but for the order of complaints."""
    there = verify(folder, device=CPU, apart=apart, **options)
    assert apart._process.wait() == 0
    here = verify(folder, device=CPU, **options)
    assert sorted(there.damage) == sorted(here.damage)
    assert [(c.name, c.ok) for c in there.checks] == [(c.name, c.ok) for c in here.checks]
    assert [c for c in there.checks if c.ok] == [c for c in here.checks if c.ok]
    assert (there.layers, there.blocks) == (here.layers, here.blocks)
    return there


def test_a_checkpoint(made: tuple[Path, Path], apart: Apart) -> None:
    report = both(made[1], apart, against=made[0])
    assert report.ok and report.blocks and all(x.error is not None for x in report.layers)


def test_a_damaged_one(made: tuple[Path, Path], tmp_path: Path, apart: Apart) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(made[1], folder)
    for change in (
        scaled("model.layers.1.self_attn.q_proj.weight_scale", 4.0),
        scaled("model.norm.weight", 1.5),
        in_tensors(lambda x: x["model.layers.0.mlp.up_proj.weight_scale"].fill_(float("nan"))),
    ):
        change(folder)
    sign(folder)
    report = both(folder, apart, against=made[0])
    assert {c.name for c in report.checks if not c.ok} >= {"finite", "error to the original"}


def test_an_original_that_cannot_be_read(
    made: tuple[Path, Path], tmp_path: Path, apart: Apart
) -> None:
    original = tmp_path / "packed"
    shutil.copytree(made[1], original)
    in_tensors(lambda x: x["model.layers.0.mlp.up_proj.weight_scale"].fill_(float("nan")))(original)
    report = both(made[1], apart, against=original)
    assert not report.ok and any("weight_scale" in text for text in report.damage)


def test_another_model(
    made: tuple[Path, Path], tiny_model: Callable[..., Path], apart: Apart
) -> None:
    report = both(made[1], apart, against=tiny_model("llama", seed=5))
    assert not report.ok and report.checks[-1].name == "the original" and not report.layers


def test_a_delta(tiny_model: Callable[..., Path], tmp_path: Path, apart: Apart) -> None:
    base, fine = pairs(tiny_model, tmp_path)("llama")
    delta = run_delta(base, fine, tmp_path / "delta")
    assert both(delta, apart, base=str(base), against=fine).ok


def test_a_conversion(made: tuple[Path, Path], tmp_path: Path, apart: Apart) -> None:
    """The process also takes which kernels to compile, which are none for a CPU."""
    located = locate(str(made[1]), fetch=False)
    asked: dict[str, Any] = {"format": "dense", "verifying": True}
    done = convert(located, tmp_path / "there", apart=apart, **asked).verified
    here = convert(located, tmp_path / "here", **asked).verified
    assert done is not None and here is not None and done.ok
    assert (done.checks, done.layers, done.blocks) == (here.checks, here.layers, here.blocks)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_a_process_does_not_get_to_is_done_here(
    when: str, made: tuple[Path, Path], apart: Apart
) -> None:
    process = apart._process
    if when == "before":
        process.kill()
        process.wait()
    stopped: list[str] = []

    def progress(name: str, done: int, total: int) -> None:
        if not stopped:
            process.send_signal(signal.SIGKILL)
        stopped.append(name)

    report = verify(made[1], against=made[0], device=CPU, apart=apart, progress=progress)
    assert report == verify(made[1], against=made[0], device=CPU)


def test_a_device_without_room_has_one_process(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    asked: dict[str, Any] = {"manifest": None, "original": None, "seed": 0}
    subject = Subject.open(made[1], None, device=gpu, **asked)
    most = max(sum(x.shape[0] * x.shape[1] for x in u.linears) for u in subject.source.layout.units)
    for free, fits in ((ROOM * most, True), (ROOM * most - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert has_room(subject) == fits
    assert has_room(Subject.open(made[1], None, device=CPU, **asked))


def test_without_room_it_ends(
    made: tuple[Path, Path], apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "has_room", lambda subject: False)
    assert verify(made[1], against=made[0], device=CPU, apart=apart).ok
    assert apart._process.poll() == -signal.SIGKILL


def test_what_cannot_be_handed_over_is_done_here(apart: Apart) -> None:
    subject: Any = lambda: None  # noqa: E731
    apart.compare(subject)
    assert apart.compared() is None


def test_the_gpu_is_its_starter_s_first(monkeypatch: pytest.MonkeyPatch) -> None:
    (sender, pipe), said = Pipe(), queue.SimpleQueue[Any]()
    with sender:
        for value in ("kernels", "subject"):
            sender.send(value)
    monkeypatch.setattr(apart_module, "start_driver", said.put)
    monkeypatch.setattr(apart_module.os, "_exit", said.put)
    apart_module._listen(pipe, said, "cuda")
    heard = [said.get() for _ in range(said.qsize())]
    assert [pickle.loads(x) if isinstance(x, bytes) else x for x in heard] == [
        *("kernels", "cuda", "subject"),
        0,
    ]


def test_it_ends_with_its_starter() -> None:
    text = "import os\nfrom compressor.verify.apart import Apart\n"
    text += "print(Apart('cpu')._process.pid, flush=True)\nos._exit(0)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=True, text=True)
    pid = int(done.stdout)
    for _ in range(600):
        if not Path(f"/proc/{pid}").exists() or _defunct(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"{pid} is still there")


def _defunct(pid: int) -> bool:
    """Whether it has ended, and nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_none_is_started_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: Any, **options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(apart_module.subprocess, "Popen", started)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for device in ("cpu", "auto", "cuda"):
        with beside_gpu(device) as process:
            assert process is None


@pytest.mark.gpu
def test_kernels_and_comparison_on_a_gpu(made: tuple[Path, Path]) -> None:
    with Apart("cuda") as process:
        there = verify(made[1], against=made[0], device=torch.device("cuda", 0), apart=process)
        assert process._process.wait() == 0
    here = verify(made[1], against=made[0], device=torch.device("cuda", 0))
    assert there.ok and there.damage == here.damage
    assert [c.name for c in there.checks] == [c.name for c in here.checks]


def gguf(tiny_model: Callable[..., Path], folder: Path) -> Source:
    tokenizer = gguf_files.byte_level_tokenizer()
    model = gguf_files.tiny_model("llama")
    file = gguf_files.write_gguf(folder / "model.gguf", model, tokenizer, kind="Q8_0")
    return locate(str(file), fetch=False).source


def in_activation_order(tiny_model: Callable[..., Path], folder: Path) -> Source:
    model = Path(shutil.copytree(tiny_model("llama"), folder / "model"))
    stored, _ = test_low_precision.packed(load_file(model / "model.safetensors"))
    declared = test_low_precision.in_groups(symmetric=False, actorder="group")
    test_low_precision.rewrite(model, lambda tensors: stored, declared)
    return open_source(model)


def stacked(tiny_model: Callable[..., Path], folder: Path) -> Source:
    return open_source(tiny_model("gpt_oss"))


def some_blocks(tiny_model: Callable[..., Path], folder: Path) -> Source:
    return with_blocks(open_source(tiny_model("llama")), [1])


@pytest.mark.parametrize("kind", [gguf, in_activation_order, stacked, some_blocks])
def test_an_original_of_every_kind_can_be_handed_over(
    kind: Callable[..., Source], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = kind(tiny_model, tmp_path)
    sent = Subject(
        folder=tmp_path, source=source, manifest=None, original=source, device=CPU, seed=0
    )
    received = pickle.loads(pickle.dumps(sent)).original
    assert received.layout == source.layout and received.schemes == source.schemes
    for unit in source.layout.units:
        one, other = source.read_unit(unit).tensors, received.read_unit(unit).tensors
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

"""What users take for granted, one test each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.safetensors import read_header
from compressor.checkpoint.source import open_source
from compressor.errors import InputError, MachineError, Problems
from compressor.plan.recipe import make_recipe
from compressor.run.session import Prepared, choose_device, compile_checkpoint, prepare
from compressor.runner import block_runner as runner

CPU = choose_device("cpu")
RTN = [{"rtn": {"bits": 4, "group_size": 32}}]
TEXT = "A few words, again and again, which take no time to read. " * 40


def prepared(
    model: Path, output: Path, passes: list[Any], *, device_memory: int | None = None, **top: Any
) -> Prepared:
    text = output.parent / "text.txt"
    text.write_text(TEXT)
    recipe = {
        "model": str(model),
        "output": str(output),
        "calibration": {"data": str(text), "samples": 8, "length": 32},
        "passes": passes,
        **top,
    }
    return prepare(make_recipe(recipe), device=CPU, device_memory=device_memory)


def run(model: Path, output: Path, passes: list[Any], **top: Any) -> Path:
    return compile_checkpoint(prepared(model, output, passes, **top)).output


def test_tokenizer_template_generation_config_and_licence_travel(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (model / "generation_config.json").write_text('{"temperature": 0.6}')
    (model / "LICENSE").write_text("Do what you like.")
    (model / "notes.txt").write_text("not part of the model")
    (model / "modeling_own.py").write_text("raise SystemExit")
    output = run(model, tmp_path / "out", RTN)
    for name in ("chat_template.jinja", "generation_config.json", "LICENSE", "tokenizer.json"):
        assert (output / name).read_bytes() == (model / name).read_bytes()
    assert not (output / "notes.txt").exists() and not (output / "modeling_own.py").exists()


@pytest.mark.parametrize("format", ["compressed-tensors", "autoawq", "gptq"])
def test_tensors_of_a_linear_lie_in_one_shard_of_the_asked_size(
    format: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=torch.float16)
    output = run(model, tmp_path / "out", RTN, format=format, max_shard_size="40KB")
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) >= 3
    homes: dict[str, set[str]] = {}
    for shard in shards:
        entries = read_header(shard)
        assert sum(entry.spec.nbytes for entry in entries.values()) <= 40_000
        for name in entries:
            homes.setdefault(name.rpartition(".")[0], set()).add(shard.name)
    assert all(len(files) == 1 for files in homes.values())
    with pytest.raises(InputError, match="more than one shard"):
        prepared(model, tmp_path / "small", RTN, format=format, max_shard_size="1KB")


def test_fused_siblings_get_one_scheme(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    passes = [{"rtn": {"targets": ["attn.q", "attn.o"], "group_size": 32}}]
    with pytest.raises(Problems, match="runtimes fuse them"):
        prepared(tiny_model("llama"), tmp_path / "out", passes)
    passes = [{"rtn": {"targets": "mlp.up", "group_size": 32}}]
    with pytest.raises(Problems, match=r"gate_proj.*would get different schemes"):
        prepared(tiny_model("llama"), tmp_path / "out", passes)


def test_a_quantized_source_is_refused_or_dequantized_when_told(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    first = run(tiny_model("llama"), tmp_path / "first", RTN)
    again = [{"rtn": {"bits": 8, "group_size": 32}}]
    with pytest.raises(Problems, match="already quantized") as caught:
        prepared(first, tmp_path / "second", again)
    assert "dequantize_source: true" in str(caught.value.hint)
    second = run(first, tmp_path / "second", again, dequantize_source=True)
    one, two = open_source(first), open_source(second)
    for unit, other in zip(one.layout.units, two.layout.units, strict=True):
        before, after = one.read_unit(unit).dequantized(), two.read_unit(other).dequantized()
        for name, tensor in before.items():
            assert (after[name].float() - tensor.float()).abs().max() < 0.02, name


def test_device_memory_bounds_the_batch(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    passes = [{"awq": {"bits": 4, "group_size": 32}}]
    whole = prepared(tiny_model("llama"), tmp_path / "a", passes)
    little = prepared(tiny_model("llama"), tmp_path / "b", passes, device_memory=600_000)
    least = prepared(tiny_model("llama"), tmp_path / "c", passes, device_memory=1)
    assert whole.batch == 8 and 1 <= little.batch < 8 and least.batch == 1
    assert little.estimates.batch == little.batch


def test_running_out_of_memory_halves_the_batch_and_goes_on(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = runner.Block.forward, []

    def cramped(self: Any, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(rows.shape[0])
        if rows.shape[0] > limit:
            raise torch.OutOfMemoryError("too many rows")
        return real(self, rows, *args, **kwargs)

    limit, passes = 2, [{"awq": {"bits": 4, "group_size": 32}}]
    monkeypatch.setattr(runner.Block, "forward", cramped)
    output = run(tiny_model("llama"), tmp_path / "out", passes)
    assert 8 in sizes and 4 in sizes and sizes.count(8) == 1  # it stays small once it was halved
    assert json.loads((output / "manifest.json").read_text())["tensors"]
    limit = 0
    with pytest.raises(MachineError, match="one row at a time") as caught:
        run(tiny_model("llama"), tmp_path / "never", passes)
    assert "same command continues" in str(caught.value.hint)
    assert not (tmp_path / "never" / "manifest.json").exists()


def test_a_full_disk_is_seen_beforehand(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr("compressor.checkpoint.workspace.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match=r"has 0\.00 MB left"):
        prepared(tiny_model("llama"), tmp_path / "out", RTN)


def test_a_disk_that_fills_up_is_a_machine_error(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(MachineError, match="No space left") as caught:
            run(tiny_model("llama"), tmp_path / "out", RTN)
    assert "same command continues" in str(caught.value.hint)
    assert not (tmp_path / "out" / "manifest.json").exists()
    run(tiny_model("llama"), tmp_path / "out", RTN)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_what_is_written_is_readable_as_the_umask_says(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    output = run(tiny_model("llama"), tmp_path / "out", RTN)
    plain = tmp_path / "plain"
    plain.write_text("")
    for path in output.iterdir():
        assert path.stat().st_mode == plain.stat().st_mode, path.name

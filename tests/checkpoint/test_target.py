"""What is written: the tensors of a unit on disk and back, and a target that wraps another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.checkpoint import hashed_reads, safetensors
from compressor.checkpoint.container import Container, Safetensors, lay_out
from compressor.checkpoint.reader import digests_of, open_checkpoint
from compressor.checkpoint.source import Source, open_source
from compressor.checkpoint.target import ModelTarget
from compressor.checkpoint.transaction import write
from compressor.ir.layout import UnitLayout
from compressor.ir.tensor import TensorShape
from compressor.ir.unit import Unit
from compressor.numerics import quantize
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe

RTN = {"bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("family", "targets", "format"),
    [
        ("many experts", "linear", "compressed-tensors"),
        ("llama", "linear", "compressed-tensors"),
        ("llama", "linear", "dense"),
        ("mixtral", "linear", "compressed-tensors"),
        ("gpt_oss", "linear", "compressed-tensors"),
        ("gpt_oss", "linear", "dense"),
        ("gpt_oss", "attn.*", "compressed-tensors"),
        ("gpt2", "linear", "compressed-tensors"),
        ("gpt2", "linear", "dense"),
    ],
)
def test_units_are_read_back_as_they_were_written(
    family: str, targets: str, format: str, tiny_model: Callable[..., Path]
) -> None:
    """Packed linears, floats that codes stand for, experts one by one, packed several at a time or
    in a stack, and linears of which files of floats hold the transposed weight."""
    many = {"num_local_experts": 34, "num_hidden_layers": 1}
    model = tiny_model("mixtral", **many) if family == "many experts" else tiny_model(family)
    source = open_source(model)
    symmetric = family != "many experts"
    passes = [{"rtn": {**RTN, "targets": targets, "symmetric": symmetric}}]
    recipe = {"model": "m", "output": "o", "passes": passes, "format": format}
    target = make_plan(make_recipe(recipe), source).target
    if format == "dense":
        written = {name for unit in target.units for name in target.shapes(unit)}
        assert written == set(open_checkpoint(model).entries)
    for layout in target.units:
        unit = source.read_unit(layout)
        for linear in layout.linears:
            spec = target.schemes.linears[linear.name].weight
            if spec is not None:
                unit = unit.with_quantized(linear, quantize(unit.weight(linear), spec))
        made = target.encode(unit)
        shapes = {name: TensorShape(t.dtype, tuple(t.shape)) for name, t in made.items()}
        assert shapes == target.shapes(layout)
        back = target.decode(layout, made)
        assert set(back.quantized) == (set() if format == "dense" else set(unit.quantized))
        before = {**unit.dequantized(), **unit.extra}
        after = {**back.dequantized(), **back.extra}
        assert set(before) == set(after)
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_what_is_hashed_while_it_is_read_is_what_is_read(
    model_type: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of files piece by piece or several at once, and those that a checkpoint makes."""
    monkeypatch.setattr(safetensors, "PIECE", 1000)
    monkeypatch.setattr(hashed_reads, "RUN", 100_000)
    runs: list[int] = []
    whole = hashed_reads.read_run

    def read_run(entries: Sequence[safetensors.Entry], *, pin: bool = False) -> list[torch.Tensor]:
        runs.append(sum(entry.spec.nbytes for entry in entries))
        return whole(entries, pin=pin)

    monkeypatch.setattr(hashed_reads, "read_run", read_run)
    source = open_source(tiny_model(model_type))
    for unit in source.layout.units[:2]:
        names = source.names(unit)
        found, digests = source.checkpoint.read_hashed(names)
        expected = source.checkpoint.read(names)
        assert list(found) == list(expected) and digests == digests_of(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        taken = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found.values()
        }
        assert sorted(source.checkpoint.pieces(names)) == sorted(taken.values())
    assert runs and max(runs) <= 100_000


def plain(source: Source, container: Container) -> ModelTarget:
    """The source as it is."""
    return ModelTarget(
        source=source,
        format=source.format,
        schemes=source.schemes,
        dtype=source.checkpoint.dtype,
        container=container,
    )


@dataclass(frozen=True)
class KeptBlocks:
    """A target with some of another's blocks, renumbered."""

    inner: ModelTarget
    kept: tuple[int, ...]

    @property
    def container(self) -> Container:
        return self.inner.container

    @property
    def units(self) -> Sequence[UnitLayout]:
        layout = self.inner.source.layout
        return (layout.embedding, *(layout.blocks[i] for i in self.kept), layout.head)

    def shapes(self, unit: UnitLayout) -> dict[str, TensorShape]:
        return {self._there(unit, n): spec for n, spec in self.inner.shapes(unit).items()}

    def encode(self, unit: Unit) -> dict[str, Tensor]:
        return {self._there(unit.layout, n): t for n, t in self.inner.encode(unit).items()}

    def decode(self, unit: UnitLayout, tensors: Mapping[str, Tensor]) -> Unit:
        names = {self._there(unit, name): name for name in self.inner.shapes(unit)}
        return self.inner.decode(unit, {names[name]: t for name, t in tensors.items()})

    def config(self) -> dict[str, Any]:
        config = self.inner.config()
        count = config["num_hidden_layers"]
        lists = {k: v for k, v in config.items() if isinstance(v, list) and len(v) == count}
        kept = {key: [value[i] for i in self.kept] for key, value in lists.items()}
        return {**config, **kept, "num_hidden_layers": len(self.kept)}

    def files(self) -> dict[str, Any]:
        return self.inner.files()

    def _there(self, unit: UnitLayout, name: str) -> str:
        if unit.kind != "block":
            return name
        path, _, _ = unit.name.rpartition(".")
        return f"{path}.{self.kept.index(unit.index)}{name.removeprefix(unit.name)}"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_with_fewer_blocks_is_a_target(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Per-layer lists of its config go with the blocks: gemma2 has two kinds of attention."""
    folder = tiny_model(family, num_hidden_layers=4)
    source = open_source(folder)
    kept = (0, 2, 3)
    target = KeptBlocks(plain(source, Safetensors()), kept)
    write(target, tmp_path / "out", source.read_unit, about={}, beside=folder)
    ids = torch.arange(3, 51).reshape(2, 24)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    model.config.num_hidden_layers = len(kept)
    types = getattr(model.config, "layer_types", None)
    if types:
        model.config.layer_types = [types[i] for i in kept]
    shorter, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert torch.equal(shorter(ids, use_cache=False).logits, expected)
    unit = source.read_unit(source.layout.blocks[2])
    back = target.decode(unit.layout, target.encode(unit))
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in unit.tensors.items())


def test_a_module_lies_in_one_file(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("qwen2"))
    target = plain(source, Safetensors(70_000))
    shards = lay_out(target.container, map(target.shapes, target.units)).shards
    assert len(shards) > 2
    homes: dict[str, set[str]] = {}
    for shard in shards:
        for name in shard.tensors:
            homes.setdefault(name.rpartition(".")[0], set()).add(shard.file)
    assert all(len(files) == 1 for files in homes.values())

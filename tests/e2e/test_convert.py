"""Whole checkpoints between formats: no code changes, nothing is rounded in silence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compressor.checkpoint.find import locate
from compressor.checkpoint.safetensors import read_header
from compressor.checkpoint.source import open_source
from compressor.checkpoint.target import ModelTarget
from compressor.cli.main import cli
from compressor.errors import InputError, Problems
from compressor.ir.qtensor import QTensor
from compressor.ir.unit import Unit
from compressor.plan.recipe import make_recipe
from compressor.run.convert import Converted, convert
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.verify import verify

CPU = choose_device("cpu")
INT4 = ("compressed-tensors", "autoawq", "gptq", "gptq-v2")


@pytest.fixture(scope="module")
def model(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 model, whose floats every int4 format holds as they are."""
    return Path(tiny_models.build("llama", tmp_path_factory.mktemp("m"), dtype=torch.float16))


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """packed(format, symmetric) → checkpoint, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def get(name: str, symmetric: bool) -> Path:
        if (name, symmetric) not in made:
            output = tmp_path_factory.mktemp("packed") / "out"
            run(model, output, format=name, symmetric=symmetric)
            made[name, symmetric] = output
        return made[name, symmetric]

    return get


def run(model: Path, output: Path, *, format: str, symmetric: bool, **top: Any) -> None:
    passes = [{"rtn": {"bits": 4, "group_size": 32, "symmetric": symmetric}}]
    recipe = {"model": str(model), "output": str(output), "passes": passes, "format": format}
    compile_checkpoint(prepare(make_recipe({**recipe, **top}), device=CPU))


def to(source: Path, output: Path, name: str, **options: Any) -> Converted:
    return convert(locate(str(source), fetch=True), output, format=name, **options)


def weights(folder: Path) -> dict[str, QTensor]:
    source = open_source(folder)
    found: dict[str, QTensor] = {}
    for unit in source.layout.units:
        found |= source.read_unit(unit).quantized
    return found


def floats(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source(folder)
    found: dict[str, torch.Tensor] = {}
    for unit in source.layout.units:
        found |= source.read_unit(unit).tensors
    return found


def assert_same_weights(one: Path, two: Path) -> None:
    before, after = weights(one), weights(two)
    assert set(before) == set(after) and before
    for name, q in before.items():
        assert torch.equal(q.codes, after[name].codes), name
        expected, found = q.dequantize(torch.float64), after[name].dequantize(torch.float64)
        assert torch.equal(expected, found), name
    before_floats, after_floats = floats(one), floats(two)
    assert set(before_floats) == set(after_floats)
    for name, tensor in before_floats.items():
        assert torch.equal(tensor, after_floats[name]), name


@pytest.mark.parametrize("target", INT4)
@pytest.mark.parametrize("source", INT4)
def test_int4_there_and_back_to_the_same_bytes(
    source: str, target: str, packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    origin = packed(source, True)
    there = tmp_path / "there"
    done = to(origin, there, target, max_shard_size=90_000)
    assert not done.rounded and done.target_format == target
    assert not (there / ".compress-work").exists()
    assert_same_weights(origin, there)
    assert (there / "tokenizer.json").read_bytes() == (origin / "tokenizer.json").read_bytes()
    back = tmp_path / "back"
    to(there, back, source)
    for path in sorted(origin.glob("*.safetensors")):
        assert path.read_bytes() == (back / path.name).read_bytes()
    one, two = (json.loads((f / "config.json").read_text()) for f in (origin, back))
    assert one == two


@pytest.mark.parametrize(
    ("family", "targets"),
    [("gpt_oss", "attn.*"), ("gpt_oss", "linear"), ("gemma3", "attn.*"), ("gpt2", "attn.*")],
)
def test_a_conversion_writes_what_a_run_writes(
    family: str, targets: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Plain experts lie in stacks, plain weights [in, out] where files have them so, and linears of
    a vision tower are named as plain; dense again, it has the names that loaders know."""
    made, again, dense = (tmp_path / name for name in ("made", "again", "dense"))
    passes = [{"rtn": {"bits": 4, "group_size": 32, "targets": targets}}]
    model = tiny_model(family, num_hidden_layers=1)
    run(model, made, format="compressed-tensors", symmetric=True, passes=passes)
    to(made, again, "compressed-tensors")
    for name in ("model.safetensors", "config.json"):
        assert (made / name).read_bytes() == (again / name).read_bytes()
    to(made, dense, "dense")
    assert set(read_header(dense / "model.safetensors")) == set(
        read_header(model / "model.safetensors")
    )
    for folder in (made, dense):
        report = verify(folder, device=CPU)
        assert report.ok, report.damage


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("compressed-tensors", "autoawq"),
        ("autoawq", "gptq-v2"),
        ("gptq-v2", "gptq"),
        ("gptq-v2", "compressed-tensors"),
    ],
)
def test_asymmetric_weights_keep_their_zero_points(
    source: str, target: str, packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    to(packed(source, False), tmp_path / "out", target)
    assert_same_weights(packed(source, False), tmp_path / "out")
    assert any(q.zeros is not None for q in weights(tmp_path / "out").values())
    assert verify(tmp_path / "out", device=CPU).ok


def test_what_the_target_cannot_hold_is_named_before_anything_is_written(
    packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(packed("gptq-v2", False), tmp_path / "source"))
    (source / "manifest.json").unlink()
    (shard,) = source.glob("*.safetensors")
    tensors = load_file(shard)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        tensors[f"{name}.qzeros"][0, 0] &= ~0xF
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(Problems) as caught:
        to(source, tmp_path / "out", "gptq", allow_rounding=True)
    problems = [problem.message for problem in caught.value.problems]
    assert len(problems) == 2 and all("gptq-v2" in text for text in problems)
    assert "model.layers.1.mlp.down_proj" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_rounding_is_refused_by_name_or_reported(tiny_models: Any, tmp_path: Path) -> None:
    """bfloat16 reaches further than float16, for scales and for what is not quantized."""
    model = tiny_models.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 1 + 2.0**-7
    tensors["model.embed_tokens.weight"] = torch.randint(-8, 8, (256, 64)).bfloat16() / 16
    tensors["lm_head.weight"] = torch.randint(-8, 8, (256, 64)).bfloat16() / 16
    tensors["model.embed_tokens.weight"][5, 7] = 2.0**-24 * 1.25
    save_file(tensors, file, metadata={"format": "pt"})
    run(model, tmp_path / "packed", format="compressed-tensors", symmetric=True)
    with pytest.raises(
        Problems, match=r"model\.embed_tokens\.weight: 1 of 16384 bfloat16"
    ) as lossy:
        to(tmp_path / "packed", tmp_path / "out", "autoawq")
    assert len(lossy.value.problems) == 1 and "--allow-rounding" in (lossy.value.hint or "")
    with pytest.raises(Problems, match="and 13 more") as other:
        to(tmp_path / "packed", tmp_path / "out", "modelopt-nvfp4")
    assert all(name in (other.value.hint or "") for name in ("compressed-tensors, gptq", "dense"))
    done = to(tmp_path / "packed", tmp_path / "out", "autoawq", allow_rounding=True)
    (report,) = done.rounded
    assert report.max_relative_error == pytest.approx(0.2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    tensors["model.embed_tokens.weight"][5, 7] = 1e38
    save_file(tensors, file, metadata={"format": "pt"})
    run(model, tmp_path / "large", format="compressed-tensors", symmetric=True)
    with pytest.raises(InputError, match=r"embed_tokens\.weight holds values beyond the range"):
        to(tmp_path / "large", tmp_path / "never", "autoawq", allow_rounding=True)


@pytest.mark.parametrize("source", INT4)
def test_dequantized_weights_are_what_the_codes_stand_for(
    source: str, packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    origin = packed(source, True)
    to(origin, tmp_path / "dense", "dense")
    dense = floats(tmp_path / "dense")
    for name, q in weights(origin).items():
        assert torch.equal(dense[f"{name}.weight"], q.dequantize(torch.float16)), name
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert loaded(torch.arange(8)[None]).logits.isfinite().all()
    assert verify(tmp_path / "dense", device=CPU).ok


def test_mxfp4_becomes_nvfp4_without_a_change(model: Path, tmp_path: Path) -> None:
    recipe = {"model": str(model), "output": str(tmp_path / "mx"), "passes": ["mxfp4"]}
    compile_checkpoint(prepare(make_recipe(recipe), device=CPU))
    assert not to(tmp_path / "mx", tmp_path / "nv", "modelopt-nvfp4").rounded
    before, after = weights(tmp_path / "mx"), weights(tmp_path / "nv")
    assert before.keys() == after.keys()
    for name, q in before.items():
        assert torch.equal(after[name].codes, q.codes)
        assert torch.equal(after[name].dequantize(), q.dequantize())
    inputs = {"passes": [{"mxfp4": {"activations": "dynamic"}}], "output": str(tmp_path / "w4a4")}
    compile_checkpoint(prepare(make_recipe({**recipe, **inputs}), device=CPU))
    with pytest.raises((InputError, Problems), match="its inputs are MXFP4"):
        to(tmp_path / "w4a4", tmp_path / "no", "modelopt-nvfp4")
    attention = [after[f"model.layers.0.self_attn.{x}_proj"].second for x in "qkv"]
    assert len({float(second) for second in attention if second is not None}) == 1
    report = verify(tmp_path / "nv", against=open_source(model), device=CPU)
    assert report.ok, report.damage


def test_mxfp4_that_nvfp4_does_not_reach_is_refused_by_name(
    tiny_models: Any, tmp_path: Path
) -> None:
    model = tiny_models.build("llama", tmp_path / "model", dtype=torch.float32)
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj"
    tensors[f"{name}.weight"][0, :32] *= 2.0**-20
    save_file(tensors, file, {"format": "pt"})
    recipe = {"model": str(model), "output": str(tmp_path / "mx"), "passes": ["mxfp4"]}
    compile_checkpoint(prepare(make_recipe(recipe), device=CPU))
    with pytest.raises((InputError, Problems), match=rf"{name}.*1 of .* groups have a scale"):
        to(tmp_path / "mx", tmp_path / "nv", "modelopt-nvfp4")
    assert not (tmp_path / "nv").exists()


def test_float_weights_get_no_codes(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chooses no codes"):
        to(model, tmp_path / "out", "gptq")
    to(model, tmp_path / "copy", "dense")
    assert all(torch.equal(t, floats(model)[n]) for n, t in floats(tmp_path / "copy").items())


def test_an_input_order_is_refused_by_name(
    packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packed("gptq", True), tmp_path / "copy"))
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj.*g_idx"):
        to(folder, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_folders_of_others_and_other_conversions_are_refused(
    packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        to(packed("gptq", True), tmp_path, "dense")
    output = tmp_path / "out"
    to(packed("gptq", True), output, "dense")
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert to(packed("gptq", True), output, "dense").already
    assert before == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(InputError, match=r"convert\.format"):
        to(packed("gptq", True), output, "autoawq")
    with pytest.raises(InputError, match=r"source\.format"):
        to(packed("autoawq", True), output, "dense")


def test_an_interrupted_conversion_continues(
    packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    origin, output = packed("autoawq", False), tmp_path / "out"
    seen: list[str] = []

    def stop(name: str, done: int, total: int) -> None:
        seen.append(name)
        if done == total - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to(origin, output, "gptq-v2", progress=stop)
    assert not (output / "manifest.json").exists()
    assert len(list((output / ".compress-work" / "units").glob("*.json"))) == 2
    to(origin, output, "gptq-v2")
    to(origin, tmp_path / "whole", "gptq-v2")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (output / path.name).read_bytes()


@pytest.mark.parametrize("damaged", ["shards", "units"])
def test_a_conversion_whose_work_was_damaged_continues_to_the_same_bytes(
    damaged: str, packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    origin, output = packed("autoawq", False), tmp_path / "out"

    def stop(name: str, done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to(origin, output, "gptq-v2", progress=stop)
    for path in (output / ".compress-work" / damaged).iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    to(origin, output, "gptq-v2")
    to(origin, tmp_path / "whole", "gptq-v2")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (output / path.name).read_bytes()


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("model.embed_tokens.weight", r"source\.beside_codes: "),
        ("model.layers.0.mlp.up_proj.qweight", r"layers\.0 of the source is not what was read"),
    ],
)
def test_a_conversion_of_a_source_that_changed_is_refused(
    tensor: str, said: str, packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """Also where the changed unit is committed, or all are; manifest and headers stay."""
    origin, output = tmp_path / "origin", tmp_path / "out"
    shutil.copytree(packed("autoawq", False), origin)

    def stop(name: str, done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    def flip() -> None:
        weights = sorted(origin.glob("*.safetensors"))[0]
        with weights.open("r+b") as file:
            file.seek(read_header(weights)[tensor].begin)
            first = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([first[0] ^ 1]))

    with pytest.raises(KeyboardInterrupt):
        to(origin, output, "gptq-v2", progress=stop)
    flip()
    with pytest.raises(InputError, match=said):
        to(origin, output, "gptq-v2")
    flip()
    assert not to(origin, output, "gptq-v2").already
    flip()
    with pytest.raises(InputError, match=r"source\.(beside_codes|content): "):
        to(origin, output, "gptq-v2")


def test_the_command_says_what_it_did(packed: Callable[[str, bool], Path], tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = ["convert", str(packed("gptq", True)), str(tmp_path / "a"), "--format", "autoawq"]
    done = runner.invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rounded"] == []
    text = runner.invoke(cli, arguments)
    assert "left as it is" in text.stdout and "nothing was rounded" in text.stdout


@pytest.mark.parametrize("target", ["compressed-tensors", "dense"])
def test_what_was_written_is_held_against_the_source(
    target: str,
    packed: Callable[[str, bool], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    origin = packed("gptq-v2", False)
    good = to(origin, tmp_path / "good", target, verifying=True)
    assert good.ok and good.verified is not None
    assert {"error to the original", "outputs to the original"} <= {
        check.name for check in good.verified.checks
    }
    encode = ModelTarget.encode

    def wrong(self: ModelTarget, unit: Unit) -> dict[str, torch.Tensor]:
        made = encode(self, unit)
        name = next((n for n in made if "up_proj." in n and "scale" not in n), None)
        return made if name is None else {**made, name: made[name].flip(0).contiguous()}

    monkeypatch.setattr(ModelTarget, "encode", wrong)
    bad = to(origin, tmp_path / "bad", target, verifying=True)
    assert not bad.ok and bad.verified is not None
    assert any("up_proj" in problem for problem in bad.verified.damage)


def test_a_dense_model_is_held_against_a_source_without_quantized_inputs(
    model: Path, tmp_path: Path
) -> None:
    passes = [{"rtn": {"bits": 8, "group_size": None, "activations": "token"}}]
    recipe = {"model": str(model), "output": str(tmp_path / "w8a8"), "passes": passes}
    compile_checkpoint(prepare(make_recipe(recipe), device=CPU))
    assert to(
        tmp_path / "w8a8", tmp_path / "dense", "dense", allow_rounding=True, verifying=True
    ).ok


@pytest.mark.interop
@pytest.mark.parametrize("source", ["autoawq", "gptq", "gptq-v2"])
def test_what_was_converted_loads_in_transformers(
    source: str, packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """compressed-tensors computes with the converted codes what the source's codes stand for."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    origin = packed(source, True)
    to(origin, tmp_path / "packed", "compressed-tensors")
    to(origin, tmp_path / "dense", "dense")
    ids = torch.arange(2, 34)[None]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)(ids)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    exact = {f"{name}.weight": q.dequantize() for name, q in weights(origin).items()}
    reference.load_state_dict(exact, strict=False)
    torch.testing.assert_close(found.logits, reference(ids).logits, atol=2e-4, rtol=2e-4)
    original = tmp_path / "packed" / "config.json"
    entry = json.loads(original.read_text())["quantization_config"]
    assert entry["config_groups"]["group_0"]["weights"]["symmetric"] is True


@pytest.mark.interop
def test_a_package_of_others_makes_the_same_conversion(
    packed: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """compressed-tensors' own converter of AutoAWQ files, tensor by tensor."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    origin = packed("autoawq", False)
    config = json.loads((origin / "config.json").read_text())["quantization_config"]
    theirs = AutoAWQConverter.from_autoawq_config(config).process(
        load_file(origin / "model.safetensors")
    )
    to(origin, tmp_path / "out", "compressed-tensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name

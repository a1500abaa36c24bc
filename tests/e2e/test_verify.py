"""A verdict on files: whole ones pass, and every kind of damage is found and named."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compressor.checkpoint import reader
from compressor.checkpoint.safetensors import read_header
from compressor.cli.main import cli
from compressor.errors import InputError
from compressor.ir.layout import Linear
from compressor.numerics import chunks
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner import expert_groups
from compressor.runner.expert_groups import ExpertGroups
from compressor.verify import subject as verify_subject
from compressor.verify.checks.kernels import Kernels
from compressor.verify.findings import VerifyReport
from compressor.verify.kernels import check as kernel_checks
from compressor.verify.subject import Subject
from compressor.verify.verify import verify

CPU = choose_device("cpu")
TRITON = not torch.cuda.is_available()  # a process with a GPU leaves Triton to it
Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def run(model: Path, output: Path, passes: list[Any], **top: Any) -> Path:
    recipe = {"model": str(model), "output": str(output), "passes": passes, **top}
    recipe["calibration"] = {"samples": 4, "length": 32}
    return compile_checkpoint(prepare(make_recipe(recipe), device=CPU)).output


@pytest.fixture(scope="module")
def model(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_models.build("llama", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AWQ checkpoint in several shards."""
    folder = tmp_path_factory.mktemp("whole")
    passes = [{"awq": {"bits": 4, "group_size": 32, "symmetric": False}}]
    return run(model, folder / "out", passes, max_shard_size="60KB")


@pytest.fixture
def copy(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, whose kernels run as their plain references, which is quick."""
    monkeypatch.setattr(kernel_checks, "interpreter_runs", lambda: False)
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def home(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][tensor])


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Save a shard again, changed, as a tool that knows nothing of a manifest would."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def failed(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if not check.ok}


def test_a_whole_checkpoint_passes_every_check(whole: Path, model: Path) -> None:
    report = verify(whole, against=model, device=CPU)
    assert report.ok and not report.damage
    assert [check.name for check in report.checks] == [
        "file hashes",
        "config as written",
        "headers and tensors",
        "config to the original",
        "files to the original",
        "tensor hashes",
        "finite",
        "codes and scales",
        "kernels",
        "error to the original",
        "outputs to the original",
    ]
    assert len(report.layers) == 15  # seven of each block, and the head that was left alone
    for layer in report.layers:
        if layer.linear == "lm_head":
            assert layer.kernel == "" and layer.error == 0
            continue
        assert layer.kernel == "w4a16" and layer.triton == TRITON
        assert layer.kernel_error is not None and layer.kernel_error < 0.01
        # What awq moved into norms and other layers is taken back before it is compared.
        assert layer.error is not None and 0.02 < layer.error < 0.2
    kernels = next(check.detail for check in report.checks if check.name == "kernels")
    assert ("one seeded tile of each of 14 layers" in kernels) == TRITON
    assert "14 whole layers through the plain reference" in kernels


@pytest.mark.parametrize(
    "tensor", [f"{Q}.weight_packed", f"{DOWN}.weight_scale", "model.norm.weight"]
)
def test_a_flipped_byte_is_found_wherever_it_is(copy: Path, tensor: str) -> None:
    file = home(copy, tensor)
    entry = read_header(file)[tensor]
    data = bytearray(file.read_bytes())
    data[(entry.begin + entry.end) // 2] ^= 1
    file.write_bytes(data)
    report = verify(copy, device=CPU)
    found = failed(report)
    assert f"{tensor} is not what was written" in found["tensor hashes"]
    assert file.name in found["file hashes"]
    # Nothing else is blamed.
    assert found["tensor hashes"].count("is not what was written") == 1


def test_swapped_scales_are_found(copy: Path) -> None:
    one, two = f"{Q}.weight_scale", "model.layers.1.self_attn.o_proj.weight_scale"

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()

    assert home(copy, one) == home(copy, two)
    rewrite(home(copy, one), swap)
    found = failed(verify(copy, device=CPU))
    assert one in found["tensor hashes"] and two in found["tensor hashes"]


def test_scales_of_another_size_are_found_against_the_original_without_a_manifest(
    copy: Path, model: Path
) -> None:
    name = f"{Q}.weight_scale"

    def swap_halves(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name] * 1.5

    rewrite(home(copy, name), swap_halves)
    (copy / "manifest.json").unlink()
    assert verify(copy, device=CPU).ok  # by itself the file is as good as any
    found = failed(verify(copy, against=model, device=CPU))
    assert "error to the original" in found and Q in found["error to the original"]


def test_a_truncated_shard_names_its_tensors(copy: Path) -> None:
    file = home(copy, f"{DOWN}.weight_packed")
    last = max(read_header(file).items(), key=lambda item: item[1].end)[0]
    file.write_bytes(file.read_bytes()[:-100])
    found = failed(verify(copy, device=CPU))
    assert file.name in found["file hashes"] and "bytes, not" in found["file hashes"]
    assert last in found["headers and tensors"]


@pytest.mark.parametrize("manifest", [True, False])
def test_a_missing_shard_names_its_tensors(copy: Path, manifest: bool) -> None:
    file = home(copy, f"{DOWN}.weight_packed")
    file.unlink()
    if not manifest:
        (copy / "manifest.json").unlink()
    report = verify(copy, device=CPU)
    assert not report.ok
    assert any(file.name in line and "missing" in line for line in report.damage)
    if manifest:
        assert any("(holds model." in line for line in report.damage)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_missing_index_is_damage(copy: Path, manifest: bool) -> None:
    (copy / "model.safetensors.index.json").unlink()
    if not manifest:
        (copy / "manifest.json").unlink()
    report = verify(copy, device=CPU)
    assert not report.ok
    assert any("model.safetensors.index.json" in line for line in report.damage)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    name = f"{Q}.weight_scale"
    rewrite(home(copy, name), lambda tensors: tensors.__delitem__(name))
    (copy / "manifest.json").unlink()
    report = verify(copy, device=CPU)
    assert not report.ok and any(name in line for line in report.damage)


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("model.norm.weight", lambda t: torch.full_like(t, float("nan")), "finite"),
        (f"{Q}.weight_scale", lambda t: torch.full_like(t, float("inf")), "finite"),
        (f"{Q}.weight_packed", lambda t: t[:, :-1].contiguous(), "headers and tensors"),
        (f"{Q}.weight_scale", lambda t: t.double(), "headers and tensors"),
        (f"{Q}.weight_shape", lambda t: torch.tensor([64, 72]), "codes and scales"),
        (f"{Q}.weight_packed", lambda t: t.float(), "headers and tensors"),
    ],
)
def test_without_a_manifest_nonsense_is_still_found(
    copy: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], check: str
) -> None:
    (copy / "manifest.json").unlink()
    rewrite(home(copy, name), lambda tensors: tensors.update({name: change(tensors[name])}))
    found = failed(verify(copy, device=CPU))
    assert check in found and name.rpartition(".")[0] in found[check]


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "config.json", "recipe.yaml", "generation_config.json"]
)
def test_every_file_of_the_artefact_counts(copy: Path, file: str) -> None:
    path = copy / file
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b" ")
    assert file in failed(verify(copy, device=CPU))["file hashes"]
    path.unlink()
    assert f"{file} is missing" in failed(verify(copy, device=CPU))["file hashes"]


def test_a_damaged_manifest_is_damage(copy: Path) -> None:
    (copy / "manifest.json").write_text("{}")
    assert "manifest.json" in failed(verify(copy, device=CPU))["file hashes"]


def test_what_stands_beside_the_artefact_does_not_count(copy: Path) -> None:
    (copy / "report.html").write_text("<p>fine</p>")
    assert verify(copy, device=CPU).ok
    (copy / "adapter.safetensors").write_bytes(b"")
    assert "adapter.safetensors does not belong" in failed(verify(copy, device=CPU))["file hashes"]
    for name in ("chat_template.jinja", "attention_policy.json", "quantize_config.json"):
        (copy / name).write_text("{}")
    named = failed(verify(copy, device=CPU))["file hashes"]
    assert "chat_template.jinja does not belong" in named and "policy.json does" in named


@pytest.mark.skipif(not TRITON, reason="the interpreter is for machines without a GPU")
def test_a_kernel_that_computes_something_else_is_found(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernel_checks.w4a16
    monkeypatch.setattr(kernel_checks, "w4a16", lambda *a, **k: right(*a, **k) * 1.05)
    monkeypatch.setattr(kernel_checks, "interpreter_runs", lambda: True)
    found = failed(verify(copy, device=CPU))
    assert list(found) == ["kernels"] and f"{Q}: w4a16 gives" in found["kernels"]


@pytest.mark.parametrize("name", ["autoawq", "gptq-v2"])
def test_other_int4_layouts_run_through_the_same_kernel(
    model: Path, tmp_path: Path, name: str
) -> None:
    passes = [{"rtn": {"bits": 4, "group_size": 32, "symmetric": name != "autoawq"}}]
    output = run(model, tmp_path / "out", passes, format=name)
    report = verify(output, device=CPU)
    assert report.ok
    assert sum(layer.kernel == "w4a16" and layer.triton == TRITON for layer in report.layers) == 14


def test_a_dense_checkpoint_of_others_is_checked_too(model: Path) -> None:
    report = verify(model, device=CPU)
    assert report.ok and "written by others" in report.checks[0].detail
    kernels = next(check for check in report.checks if check.name == "kernels")
    assert kernels.detail == "no packed layers"


@pytest.mark.parametrize("room, most", [(0, 2), (2**30, 1 + chunks.DECODERS)])
def test_few_layers_are_decoded_ahead_of_the_one_that_is_checked(
    copy: Path, room: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer in float64 is the largest thing that `verify` holds."""
    decoded: set[str] = set()
    checked: list[int] = []
    decode, layer = verify_subject.decode_linear, Kernels.layer

    def counted(config: Any, name: str, arrays: Any) -> Any:
        decoded.add(name)
        return decode(config, name, arrays)

    def slow(self: Kernels, linear: Linear, *rest: Any) -> None:
        time.sleep(0.02)  # the others have time to run ahead
        checked.append(len(decoded))
        layer(self, linear, *rest)

    monkeypatch.setattr(chunks, "AHEAD_ELEMENTS", room)
    monkeypatch.setattr(verify_subject.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(verify_subject, "decode_linear", counted)
    monkeypatch.setattr(Kernels, "layer", slow)
    assert verify(copy, device=CPU).ok
    assert len(checked) == 14
    beside = [n - i for i, n in enumerate(checked)]
    assert max(beside) == most and min(beside) >= 1


@pytest.mark.parametrize("damaged", [False, True])
def test_reading_and_decoding_ahead_as_beside_a_gpu_changes_no_verdict(
    damaged: bool, copy: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damaged:
        file = home(copy, f"{Q}.weight_packed")
        data = bytearray(file.read_bytes())
        data[-1] ^= 128
        file.write_bytes(data)
    expected = verify(copy, against=model, device=CPU)
    read = reader.read_tensor
    monkeypatch.setattr(Subject, "on_gpu", property(lambda self: True))
    monkeypatch.setattr(reader, "read_tensor", lambda entry, pin=False: read(entry))
    assert verify(copy, against=model, device=CPU) == expected
    assert expected.ok is not damaged and expected.layers


def test_experts_that_are_verified_some_at_a_time_get_the_same_verdict(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3_moe")
    whole = run(model, tmp_path / "out", [{"awq": {"bits": 4, "group_size": 32}}])
    beside = verify(whole, against=model, device=CPU)
    sizes: set[int] = set()
    holding = ExpertGroups.holding

    def counted(self: ExpertGroups, expert: int) -> Any:
        sizes.add(self.size)
        return holding(self, expert)

    monkeypatch.setattr(ExpertGroups, "holding", counted)
    monkeypatch.setattr(expert_groups, "WEIGHTS", 1)
    apart = verify(whole, against=model, device=CPU)
    assert apart.ok and apart.to_json() == beside.to_json()
    assert sizes == {1}


def test_nothing_to_read_is_an_input_error(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError):
            verify(folder, device=CPU)


def test_exit_codes_and_json_of_the_command(copy: Path, model: Path) -> None:
    runner = CliRunner()
    arguments = ["verify", str(copy), "--against", str(model), "--device", "cpu", "--json"]
    good = runner.invoke(cli, arguments)
    assert good.exit_code == 0
    assert json.loads(good.stdout)["ok"] is True
    file = home(copy, f"{Q}.weight_packed")
    data = bytearray(file.read_bytes())
    data[-1] ^= 128
    file.write_bytes(data)
    bad = runner.invoke(cli, arguments)
    assert bad.exit_code == 1
    verdict = json.loads(bad.stdout)
    assert verdict["ok"] is False and verdict["damage"]
    text = runner.invoke(cli, ["verify", str(copy), "--device", "cpu"])
    assert text.exit_code == 1 and "DAMAGED" in text.stdout


def test_an_unrelated_model_is_told_at_once(whole: Path, model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    generator = torch.Generator().manual_seed(5)

    def redraw(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            tensors[name] = noise.to(tensor.dtype)

    rewrite(other / "model.safetensors", redraw)
    report = verify(whole, against=other, device=CPU)
    assert list(failed(report)) == ["the original"]
    assert "embeddings have nothing in common" in failed(report)["the original"]
    assert not report.layers or all(layer.error is None for layer in report.layers)


@pytest.mark.parametrize(
    "file, change, said",
    [
        ("config.json", {"rms_norm_eps": 0.1}, "rms_norm_eps 0.1, the original"),
        ("config.json", {"eos_token_id": 7}, "eos_token_id 7, the original"),
        ("tokenizer_config.json", {"add_bos_token": True}, "add_bos_token"),
        ("generation_config.json", {"eos_token_id": 7}, "eos_token_id"),
    ],
)
def test_what_stands_beside_the_weights_is_the_originals(
    copy: Path, model: Path, file: str, change: dict[str, Any], said: str
) -> None:
    (copy / "manifest.json").unlink()
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert verify(copy, device=CPU).ok  # by itself it is as good as any
    found = failed(verify(copy, against=model, device=CPU))
    assert any(said in detail for detail in found.values())


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "attention_policy.json", "additional_chat_templates/t.jinja"]
)
def test_a_file_that_loaders_would_take_is_no_part_of_the_artefact(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("{}")
    assert f"{name} does not belong" in failed(verify(copy, device=CPU))["file hashes"]


def test_the_command_says_what_it_has_proved(copy: Path, model: Path) -> None:
    runner = CliRunner()
    alone = runner.invoke(cli, ["verify", str(copy), "--device", "cpu"])
    assert "not that they are the model they are named after" in alone.stdout
    held = runner.invoke(cli, ["verify", str(copy), "--against", str(model), "--device", "cpu"])
    assert "compute what the original computes" in held.stdout

"""Hundreds of broken recipes, configs, indexes and shards: one clear error each, exit code 2.

What a random change leaves valid may pass; nothing may end in a traceback, an internal error or a
large allocation. Seeds are fixed, so a failure repeats.
"""

import json
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compressor.cli import main as cli_main
from tests.support.fuzzing import assert_clear, changed, refused, spoiled


@pytest.fixture
def compress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """compress(*arguments) → exit code and what it wrote on stderr, through the entry point."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["compress", *arguments])
        with pytest.raises(SystemExit) as left:
            cli_main.main()
        return int(left.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def model(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    built = tiny_models.build("llama", folder, dtype=torch.bfloat16, num_hidden_layers=1)
    return Path(built)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def base_recipe(model: Path, output: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "output": str(output),
        "seed": 1,
        "calibration": {"data": "bundled", "samples": 2, "length": 16, "sampling": "random"},
        "passes": [
            {"awq": {"targets": ["attn.o"], "ignore": ["lm_head"], "group_size": 32, "bits": 4}},
            {"rtn": {"targets": "mlp.down", "bits": 8, "group_size": 32}},
        ],
        "format": "compressed-tensors",
        "max_shard_size": "1GB",
        "evaluate": {"data": "bundled", "windows": 2, "length": 32},
    }


def test_the_base_recipe_is_right(
    compress: Callable[..., tuple[int, str]], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(base_recipe(model, tmp_path / "out")))
    code, errors = compress("plan", str(tmp_path / "r.yaml"), "--device", "cpu")
    assert code == 0, errors


def test_recipes_with_wrong_values(
    compress: Callable[..., tuple[int, str]], model: Path, tmp_path: Path
) -> None:
    rng, file, results = random.Random(1), tmp_path / "r.yaml", []
    for _ in range(220):
        recipe = changed(base_recipe(model, tmp_path / "out"), rng)
        file.write_text(yaml.safe_dump(recipe, allow_unicode=True))
        results.append((*compress("plan", str(file), "--device", "cpu"), recipe))
    assert refused(results) > 130


def test_recipes_that_are_hardly_yaml(
    compress: Callable[..., tuple[int, str]], model: Path, tmp_path: Path
) -> None:
    rng, file, results = random.Random(2), tmp_path / "r.yaml", []
    text = yaml.safe_dump(base_recipe(model, tmp_path / "out")).encode()
    for _ in range(120):
        data = spoiled(text, rng)
        file.write_bytes(data)
        results.append((*compress("plan", str(file), "--device", "cpu"), data))
    assert refused(results) > 80


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a",
        "model",
        "{}",
        "model: [",
        "a: &a [*a]",
        "\t",
        "\x00",
        "!!python/object/apply:os.system ['touch owned']",
        "model: !!python/name:os.system x",
        "model: !!binary AAAA\noutput: x\npasses: [rtn]",
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "model: a\nmodel: b",
        "[" * 20_000,
        "a: " * 500,
        "passes: [rtn]\nmodel: x\noutput: y\nseed: 2024-01-01",
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]",
        "<<: 3",
        "<<: [1]",
    ],
)
def test_texts_that_are_no_recipe(
    compress: Callable[..., tuple[int, str]],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(text)
    assert_clear(*compress("plan", "r.yaml"), text)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "override",
    ["a", "=", "passes.9.bits=3", "passes=[", "seed.x=1", "passes.awq=3", ".=1", "a.b=1"],
)
def test_overrides_that_lead_nowhere(
    compress: Callable[..., tuple[int, str]], override: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(base_recipe(model, tmp_path / "out")))
    result = compress("plan", str(tmp_path / "r.yaml"), "--set", override)
    assert_clear(*result, override)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan"],
        ["plan", "no-such-file.yaml"],
        ["plan", "/"],
        ["run", "no-such-file.yaml"],
        ["nonsense"],
        ["verify", "no-such-folder"],
        ["verify", "/"],
        ["inspect", "./no-such-folder"],
        ["convert", "./nowhere", "out", "--format", "gptq"],
        ["eval", "./nowhere"],
        ["plan", "--device", "tpu", "x.yaml"],
    ],
)
def test_usage(compress: Callable[..., tuple[int, str]], arguments: list[str]) -> None:
    assert_clear(*compress(*arguments), arguments)


def test_configs_with_wrong_values(compress: Callable[..., tuple[int, str]], copy: Path) -> None:
    rng, results = random.Random(3), []
    config = json.loads((copy / "config.json").read_text())
    for _ in range(200):
        broken = changed(config, rng)
        (copy / "config.json").write_text(json.dumps(broken))
        results.append((*compress("inspect", str(copy)), broken))
    assert refused(results) > 30


def test_configs_that_are_hardly_json(compress: Callable[..., tuple[int, str]], copy: Path) -> None:
    rng, results = random.Random(4), []
    data = (copy / "config.json").read_bytes()
    for _ in range(80):
        broken = spoiled(data, rng)
        (copy / "config.json").write_bytes(broken)
        results.append((*compress("inspect", str(copy)), broken))
    assert refused(results) > 40


def test_quantization_configs_with_wrong_values(
    compress: Callable[..., tuple[int, str]], model: Path, tmp_path: Path
) -> None:
    from compressor.plan.recipe import make_recipe
    from compressor.run.session import choose_device, compile_checkpoint, prepare

    rng, results = random.Random(5), []
    for name in ("compressed-tensors", "autoawq", "gptq"):
        recipe = {
            "model": str(model),
            "output": str(tmp_path / name),
            "passes": [{"rtn": {"bits": 4, "group_size": 32}}],
            "format": name,
        }
        compile_checkpoint(prepare(make_recipe(recipe), device=choose_device("cpu")))
        config = json.loads((tmp_path / name / "config.json").read_text())
        for _ in range(60):
            broken = changed(config["quantization_config"], rng)
            text = json.dumps({**config, "quantization_config": broken})
            (tmp_path / name / "config.json").write_text(text)
            results.append((*compress("inspect", str(tmp_path / name)), broken))
    assert refused(results) > 40


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/model.safetensors",
        "..",
        "",
        "model.bin",
        "model.safetensors\x00",
        "nothing.safetensors",
        None,
        3,
        ["model.safetensors"],
        {},
    ],
)
def test_an_index_that_points_elsewhere(
    compress: Callable[..., tuple[int, str]], file: Any, copy: Path
) -> None:
    shutil.copy(copy / "model.safetensors", copy.parent / "model.safetensors")
    names = list(header_of(copy / "model.safetensors"))
    weight_map: dict[str, Any] = dict.fromkeys(names, "model.safetensors")
    weight_map["model.norm.weight"] = file
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    code, errors = compress("inspect", str(copy))
    assert_clear(code, errors, file)


def test_broken_indexes(compress: Callable[..., tuple[int, str]], copy: Path) -> None:
    rng, results = random.Random(6), []
    names = [n for n in header_of(copy / "model.safetensors") if n != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    data = json.dumps(index).encode()
    for number in range(120):
        broken = json.dumps(changed(index, rng)).encode() if number % 2 else spoiled(data, rng)
        (copy / INDEX).write_bytes(broken)
        results.append((*compress("inspect", str(copy)), broken))
    assert refused(results) > 80


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found: dict[str, Any] = json.loads(data[8 : 8 + length])
    return found


def with_header(data: bytes, header: Any) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


def test_shards_with_wrong_headers(compress: Callable[..., tuple[int, str]], copy: Path) -> None:
    rng, results = random.Random(7), []
    file = copy / "model.safetensors"
    data, header = file.read_bytes(), header_of(file)
    raw = json.dumps(header).encode()
    for number in range(160):
        broken: Any = changed(header, rng) if number % 2 else spoiled(raw, rng)
        file.write_bytes(with_header(data, broken))
        results.append((*compress("inspect", str(copy)), broken))
    assert refused(results) > 120


def test_shards_cut_or_spoiled_anywhere(
    compress: Callable[..., tuple[int, str]], copy: Path
) -> None:
    rng, file = random.Random(8), copy / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        assert_clear(*compress("inspect", str(copy)), length)
    file.write_bytes(data + b"x")
    assert_clear(*compress("inspect", str(copy)), "a byte too many")
    for _ in range(30):
        start = rng.randrange(9)
        file.write_bytes(data[:start] + rng.randbytes(8) + data[start + 8 :])
        assert_clear(*compress("inspect", str(copy)), start)


@pytest.mark.parametrize(
    "claim",
    [
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 10**8 + 1),
        b"\xff" * 8,
    ],
)
def test_a_header_that_claims_more_than_there_is_allocates_nothing(
    compress: Callable[..., tuple[int, str]], claim: bytes, copy: Path
) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(claim + file.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_clear(*compress("inspect", str(copy)), claim)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**31, 2**31, 0, 5], [10**30], [-1], [1.0]])
def test_a_shape_that_cannot_be_allocates_nothing(
    compress: Callable[..., tuple[int, str]], shape: list[Any], copy: Path
) -> None:
    file = copy / "model.safetensors"
    header = header_of(file)
    header["model.norm.weight"]["shape"] = shape
    file.write_bytes(with_header(file.read_bytes(), header))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_clear(*compress("inspect", str(copy)), shape)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_pickles_are_refused_with_the_way_out(
    compress: Callable[..., tuple[int, str]], copy: Path
) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    code, errors = compress("inspect", str(copy))
    assert_clear(code, errors, "pickle")
    assert "never loaded" in errors and "compress convert --unpickle" in errors


def test_verify_calls_the_same_files_damaged(
    compress: Callable[..., tuple[int, str]], copy: Path
) -> None:
    """What is an unusable source elsewhere is the very thing that verify is asked about."""
    rng, file = random.Random(9), copy / "model.safetensors"
    data = file.read_bytes()
    for broken in (data[:-1], data[:9], b"", with_header(data, spoiled(b"{}" * 50, rng))):
        file.write_bytes(broken)
        code, errors = compress("verify", str(copy), "--device", "cpu")
        assert code == 1 and "Traceback" not in errors
    file.unlink()
    assert compress("verify", str(copy), "--device", "cpu")[0] == 1

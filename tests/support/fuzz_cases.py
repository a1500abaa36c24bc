"""Broken inputs of every kind that the program reads: a folder each, one thing in it spoiled."""

import contextlib
import io
import json
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from compressor.errors import Interrupted
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from tests.support import delta_pairs, gguf_files, tiny_models
from tests.support.fuzzing import JUNK, changed, spoil, spoiled, typed

CPU = choose_device("cpu")
QUICK = {"calibration": {"samples": 2, "length": 16, "data": "rows.jsonl"}}
AWQ: list[Any] = [{"awq": {"bits": 4, "group_size": 32}}]
RTN: list[Any] = [{"rtn": {"bits": 4, "group_size": 32}}]
SENSITIVITY = "sensitivity.json"
FORMATS = ("compressed-tensors", "autoawq", "gptq")


@dataclass(frozen=True)
class Case:
    """One broken input: what to type in `folder`, and what was done to it."""

    kind: str
    folder: Path
    arguments: tuple[str, ...]
    what: str


class Corpus:
    """Sound inputs, made once, and cases made of copies of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sound = root / "sound"
        if not self.sound.is_dir():
            _make(self.sound)

    def case(self, kind: str, seed: int) -> Case:
        """A case that depends on kind and seed only."""
        rng = random.Random(f"{kind} {seed}")
        folder = self.root / "case"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        for name in ("recipe.yaml", "rows.jsonl"):
            shutil.copy(self.sound / name, folder / name)
        case = Case(kind, folder, (), "")
        return KINDS[kind](replace(case, folder=folder), self.sound, rng)


def _make(sound: Path) -> None:
    build = sound.with_name("building")
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "num_hidden_layers": 1}
    tiny_models.build("llama", build / "model", **options)
    tiny_models.build("mixtral", build / "experts", **options)
    words = "A few words, again and again, which take no time to read. " * 40
    rows = [{"text": words}, {"messages": [{"role": "user", "content": words}]}]
    (build / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (build / "chat.jsonl").write_text(json.dumps(rows[1]) + "\n")
    base = {"model": "model", "output": "out", **QUICK}
    (build / "recipe.yaml").write_text(yaml.safe_dump({**base, "passes": AWQ}))
    data = str(build / "rows.jsonl")
    for name in FORMATS:
        _compile(build, output=name, passes=RTN, format=name)
    _compile(build, output="policy", passes=[{"streaming": {"sinks": 4, "window": 16}}])
    pair = delta_pairs.pairs(lambda kind, **o: build / "model", build)
    start, fine = pair("llama")
    delta_pairs.run(start, fine, build / "delta")
    stops = iter([False, False, True])
    with contextlib.suppress(Interrupted):
        _compile(build, output="begun", passes=AWQ, data=data, stopping=lambda: next(stops, True))
    measured = ["compress", "measure", str(build / "model"), "--samples", "2", "--length", "16"]
    measured += ["--bits", "4", "--bits", "8", "--output", str(build / SENSITIVITY)]
    with (
        mock.patch("sys.argv", measured),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code, fault = typed(errors.getvalue)
    assert code == 0, (fault, errors.getvalue())
    gguf_files.write_gguf(
        build / "m.gguf", gguf_files.tiny_model("llama"), gguf_files.byte_level_tokenizer()
    )
    build.rename(sound)


def _compile(build: Path, *, output: str, stopping: Any = None, **keys: Any) -> None:
    data = keys.pop("data", str(build / "rows.jsonl"))
    top = {"model": str(build / "model"), "output": str(build / output), **keys}
    calibration = {**QUICK["calibration"], "data": data}
    recipe = make_recipe({**top, "calibration": calibration})
    more = {"stopping": stopping} if stopping else {}
    compile_checkpoint(prepare(recipe, device=CPU), **more)


def _recipe(case: Case, **keys: Any) -> None:
    path = case.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def _typed(case: Case, what: str, *arguments: str) -> Case:
    return replace(case, arguments=arguments, what=what)


def _copy(case: Case, sound: Path, name: str, to: str = "model") -> Path:
    return Path(shutil.copytree(sound / name, case.folder / to))


def _pick(folder: Path, names: Sequence[str], rng: random.Random) -> Path:
    return rng.choice([folder / name for name in names if (folder / name).is_file()])


PLAN = ("plan", "recipe.yaml", "--device", "cpu")
RUN = ("run", "recipe.yaml", "--device", "cpu")


def config(case: Case, sound: Path, rng: random.Random) -> Case:
    """config.json; a run as often as not, since it must not die of what a plan let pass."""
    model = _copy(case, sound, rng.choice(("model", "model", "experts")))
    what = spoil(model / "config.json", rng)
    _recipe(case, passes=rng.choice((AWQ, AWQ, RTN)), verify=False, report=False)
    commands = (PLAN, PLAN, RUN, ("inspect", "model"))
    return _typed(case, what, *rng.choice(commands))


def tokenizer(case: Case, sound: Path, rng: random.Random) -> Case:
    """tokenizer.json, tokenizer_config.json and chat templates."""
    model = _copy(case, sound, "model")
    shutil.copy(sound / "chat.jsonl", case.folder / "rows.jsonl")
    settings = model / "tokenizer_config.json"
    templates = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ messages[9].x.y }}",
        "{% for",
        "{{ raise_exception('no') }}",
        5,
    )
    # One that does not end takes its ten seconds.
    template = rng.choices(templates, weights=(20, 0.2, 3, 3, 3, 3))[0]
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    what = spoil(_pick(model, ("tokenizer.json", "tokenizer_config.json"), rng), rng)
    _recipe(case, verify=False, report=False)
    return _typed(case, what, *rng.choice((PLAN, PLAN, RUN)))


def recipe(case: Case, sound: Path, rng: random.Random) -> Case:
    """A recipe's values, and its bytes."""
    _copy(case, sound, "model")
    path = case.folder / "recipe.yaml"
    data = yaml.safe_load(path.read_text())
    data |= {
        "seed": 1,
        "format": "compressed-tensors",
        "evaluate": {"windows": 2, "length": 16, "data": "rows.jsonl", "passkey": None},
        "gate": {"kl": 0.5},
        "card": {"license": "mit"},
        "publish": {"repo": "me/x"},
        "passes": [
            {"awq": {"targets": ["attn.o"], "bits": 4, "group_size": 32}},
            {"rtn": {"targets": "mlp.down", "bits": 8, "group_size": 32}},
        ],
    }
    if rng.random() < 0.7:
        path.write_text(yaml.safe_dump(changed(data, rng), allow_unicode=True))
        measure = ("measure", "recipe.yaml", "--bits", "4", "--device", "cpu")
        return _typed(case, "values", *rng.choices((PLAN, measure), weights=(9, 1))[0])
    path.write_bytes(spoiled(yaml.safe_dump(data).encode(), rng))
    return _typed(case, "bytes", *PLAN)


def overrides(case: Case, sound: Path, rng: random.Random) -> Case:
    """--set and the other options."""
    _copy(case, sound, "model")
    keys = ("seed", "passes", "0", "awq", "bits", "calibration", "samples", "x", "", "model")
    path = ".".join(rng.choices(keys, k=rng.randrange(1, 5)))
    values = [json.dumps(rng.choice(JUNK)).replace("\0", ""), "[" * 3000, "&a [*a]", "!!x", "- "]
    value = rng.choice(values)
    others = ("--max-shard-size", "--device-memory", "--output", "--device", "--model")
    options = ("--set", "--set", "--set", *others)
    option = rng.choice(options)
    given = f"{path}={value}" if option == "--set" else value or "x"
    return _typed(case, f"{option} {given}"[:200], *PLAN, option, given)


def gguf(case: Case, sound: Path, rng: random.Random) -> Case:
    """A GGUF file."""
    path = Path(shutil.copy(sound / "m.gguf", case.folder / "m.gguf"))
    what = spoil(path, rng)
    _recipe(case, model="m.gguf")
    return _typed(case, what, *rng.choice((("inspect", "./m.gguf"), PLAN)))


def headers(case: Case, sound: Path, rng: random.Random) -> Case:
    """Shards and their index."""
    model = _copy(case, sound, "model")
    weights = model / "model.safetensors"
    if rng.random() < 0.4:
        (length,) = struct.unpack("<Q", weights.read_bytes()[:8])
        names = json.loads(weights.read_bytes()[8 : 8 + length])
        names.pop("__metadata__", None)
        index = model / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, weights.name)}))
        weights = index
    what = spoil(weights, rng)
    return _typed(case, what, *rng.choice((("inspect", "model"), PLAN)))


def quantization(case: Case, sound: Path, rng: random.Random) -> Case:
    """What a quantized checkpoint says of itself."""
    made = _copy(case, sound, rng.choice(FORMATS), "out")
    (made / "manifest.json").unlink()
    path = made / "config.json"
    value = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 2))):
        value["quantization_config"] = changed(value["quantization_config"], rng)
    path.write_text(json.dumps(value))
    commands: tuple[tuple[str, ...], ...] = (
        ("inspect", "out"),
        ("verify", "out", "--device", "cpu"),
        ("convert", "out", "new", "--format", rng.choice(("dense", *FORMATS)), "--allow-rounding"),
    )
    return _typed(case, "quantization_config", *rng.choice(commands))


def records(case: Case, sound: Path, rng: random.Random) -> Case:
    """Manifest, report and card of a finished checkpoint."""
    made = _copy(case, sound, FORMATS[0], "out")
    what = spoil(_pick(made, sorted(p.name for p in made.iterdir()), rng), rng)
    commands: tuple[tuple[str, ...], ...] = (
        ("inspect", "out"),
        ("verify", "out", "--device", "cpu"),
        ("push", "out", "me/x", "--dry-run"),
        ("convert", "out", "new", "--format", "dense"),
    )
    return _typed(case, what, *rng.choice(commands))


def policies(case: Case, sound: Path, rng: random.Random) -> Case:
    """An attention policy."""
    made = _copy(case, sound, "policy", "out")
    what = spoil(made / "attention_policy.json", rng)
    commands: tuple[tuple[str, ...], ...] = (
        ("policy", "show", "out"),
        ("policy", "export", "out", "new"),
        ("inspect", "out"),
        ("eval", "out", "--windows", "1", "--length", "16", "--device", "cpu"),
    )
    return _typed(case, what, *rng.choice(commands))


def deltas(case: Case, sound: Path, rng: random.Random) -> Case:
    """A delta, and its base."""
    _copy(case, sound, "model")
    made = _copy(case, sound, "delta", "delta")
    what = spoil(_pick(made, sorted(p.name for p in made.iterdir()), rng), rng)
    commands: tuple[tuple[str, ...], ...] = (
        ("delta", "apply", "./model", "delta", "new"),
        ("delta", "diff", "delta"),
        ("inspect", "delta"),
        ("verify", "delta", "--base", "./model", "--device", "cpu"),
    )
    return _typed(case, what, *rng.choice(commands))


def begun(case: Case, sound: Path, rng: random.Random) -> Case:
    """The work folder of an interrupted run, which is continued."""
    _copy(case, sound, "begun", "out")
    files = sorted(p for p in (case.folder / "out").rglob("*") if p.is_file())
    what = spoil(rng.choice(files), rng)
    _recipe(case, model=str(sound / "model"), verify=False, report=False)
    return _typed(case, what, *RUN)


def sensitivities(case: Case, sound: Path, rng: random.Random) -> Case:
    """What `compress measure` wrote."""
    path = Path(shutil.copy(sound / SENSITIVITY, case.folder / SENSITIVITY))
    what = spoil(path, rng)
    bits = rng.choice(("6", "7.5", "16", "nan", "1e99", "0.001"))
    return _typed(case, what, "allocate", path.name, "--bits-per-weight", bits)


def unaided(case: Case, sound: Path, rng: random.Random) -> Case:
    """Commands that take a model and no recipe."""
    model = _copy(case, sound, rng.choice(("model", "model", "experts")))
    broken = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    what = spoil(_pick(model, broken, rng), rng)
    few = ("--length", "16", "--tokens", "4", "--text", "rows.jsonl", "--device", "cpu")
    scheme = rng.choice(("w4a16", "w8a8", "fp8", "nvfp4", "w4a8"))
    commands: tuple[tuple[str, ...], ...] = (
        ("init", "./model", "--scheme", scheme),
        ("quantize", "./model", "--scheme", scheme, "--recipe-only", "--for", "vllm"),
        ("audit", "./model", "--weights-only"),
        ("audit", "./model", "--contexts", "4", *few),
        ("sanitize", "./model", "new", "--windows", "1", *few),
        ("inspect", "model", "--for", "sglang"),
        ("map", "draft", "./model"),
    )
    return _typed(case, what, *rng.choice(commands))


def maps(case: Case, sound: Path, rng: random.Random) -> Case:
    """A map of the user's own."""
    _copy(case, sound, "model")
    path = case.folder / "map.yaml"
    text = (files("compressor.arch.maps") / "llama.yaml").read_text()
    if rng.random() < 0.8:
        value = yaml.safe_load(text)
        for _ in range(rng.choice((1, 1, 2))):
            value = changed(value, rng) if value else value
        path.write_text(yaml.safe_dump(value, allow_unicode=True))
    else:
        path.write_bytes(spoiled(text.encode(), rng))
    _recipe(case, model={"path": "./model", "map": "map.yaml"}, verify=False, report=False)
    return _typed(case, "map.yaml", *rng.choice((PLAN, PLAN, RUN)))


Make = Callable[[Case, Path, random.Random], Case]
KINDS: dict[str, Make] = {
    make.__name__: make
    for make in (
        *(config, tokenizer, recipe, overrides, gguf, headers, quantization, records, policies),
        *(deltas, begun, sensitivities, unaided, maps),
    )
}

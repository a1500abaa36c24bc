"""What a new user gets wrong: each is answered by what is wrong, where, and what to do, with an
exit code and without a traceback."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from compressor.cli.main import main
from tests.support.desk import RTN, Desk


@pytest.fixture()
def desk(tiny_model: Callable[..., Path], tmp_path: Path) -> Desk:
    llama = tiny_model("llama")
    return Desk(tmp_path, llama, llama, tiny_model("opt"), tiny_model("qwen2"))


def after(action: object, arguments: list[Any]) -> list[Any]:
    return arguments


Case = tuple[str, Callable[[Desk], Sequence[Any]], Sequence[str]]

# What is typed, and what the answer has to say: what is wrong and where, then what to do.
CASES: list[Case] = [
    ("no such recipe", lambda d: ["plan", "missing.yaml"], ["cannot read recipe missing.yaml"]),
    (
        "a recipe that comes with the program",
        lambda d: ["plan", "recipes/smollm2-awq.yaml"],
        ["cannot read recipe", "compress recipes smollm2-awq -o smollm2-awq.yaml"],
    ),
    (
        "a policy of nothing",
        lambda d: ["policy", "show", d.folder / "nothing"],
        ["nothing is not a folder", "hf download ORG/NAME"],
    ),
    (
        "a recipe for sensitivities",
        lambda d: ["allocate", d.recipe(), "--bits-per-weight", "4"],
        ["holds no measured sensitivities: Invalid JSON", "compress measure writes such a file"],
    ),
    (
        "a folder for a recipe",
        lambda d: ["plan", d.folder],
        ["cannot read recipe", "compress quantize", "--scheme w4a16"],
    ),
    (
        "a recipe for a model",
        lambda d: ["quantize", d.recipe()],
        ["recipe.yaml is a recipe: compress run"],
    ),
    (
        "a method for a scheme",
        lambda d: ["quantize", d.llama, "--scheme", "awq"],
        ["'awq' is not a scheme; did you mean 'w4a16'?", "w4afp8"],
    ),
    (
        "a format by its short name, before the model is looked for",
        lambda d: ["convert", "nowhere", "out", "--format", "awq"],
        ["unknown format 'awq'", "did you mean 'autoawq'?"],
    ),
    (
        "broken YAML",
        lambda d: ["plan", d.recipe("passes: [rtn: {")],
        ["recipe.yaml is not valid YAML", "line 1"],
    ),
    (
        "a tab for indentation",
        lambda d: ["plan", d.recipe("calibration:\n\tsamples: 3\n")],
        ["recipe.yaml is not valid YAML", "line 2"],
    ),
    (
        "a list for a recipe",
        lambda d: ["plan", d.recipe("- rtn\n")],
        ["is not a mapping of recipe keys", "compress recipes"],
    ),
    (
        "a key given twice",
        lambda d: ["plan", d.recipe("model: a\nmodel: b\n")],
        ["key 'model' appears twice", "in recipe.yaml, line 2"],
    ),
    (
        "rows without number",
        lambda d: ["plan", d.recipe(calibration={"samples": 10**30})],
        ["calibration.samples is too large", "at most 1000000000"],
    ),
    (
        "a misspelt key",
        lambda d: ["plan", d.recipe(calibraton={"samples": 4})],
        ["recipe.yaml, line 1: unknown key 'calibraton'", "did you mean 'calibration'?"],
    ),
    (
        "a misspelt inner key",
        lambda d: ["plan", d.recipe(evaluate={"window": 4})],
        ["unknown key 'evaluate.window'", "did you mean 'windows'?"],
    ),
    (
        "no model",
        lambda d: ["plan", d.recipe(model=...)],
        ["key 'model' is missing", "model: folder, Hub id"],
    ),
    (
        "no passes",
        lambda d: ["plan", d.recipe(passes=...)],
        ["passes: at least one pass is needed", "passes: [{rtn: {}}]"],
    ),
    (
        "a misspelt pass",
        lambda d: ["plan", d.recipe(passes=[{"aqw": {}}])],
        ["passes.0: unknown pass 'aqw'", "did you mean 'awq'?"],
    ),
    (
        "two passes in one entry",
        lambda d: ["plan", d.recipe(passes=[{"rtn": {}, "awq": {}}])],
        [
            "passes.0: a pass is one name with its parameters",
            "one dash for each: - awq: {…}, - rtn: {…}",
        ],
    ),
    (
        "a pass whose parameters are not indented",
        lambda d: ["plan", d.recipe("model: m\noutput: o\npasses:\n- awq:\n  bits: 4\n")],
        ["recipe.yaml, line 4: passes.0: a pass is one name", "indent its parameters further"],
    ),
    (
        "passes as a mapping",
        lambda d: ["plan", d.recipe(passes={"rtn": {}})],
        ["recipe.yaml, line 3: passes is not a list", "passes: [{rtn: {}}]"],
    ),
    (
        "a word for a list",
        lambda d: ["plan", d.recipe(passes=[{"rtn": {"ignore": "lm_head"}}])],
        ["passes.0.rtn.ignore is 'lm_head', not a list", "ignore: [lm_head]"],
    ),
    (
        "a word for a group of keys",
        lambda d: ["plan", d.recipe(calibration="bundled")],
        ["calibration is 'bundled', not a group of keys", "calibration: {data: …}"],
    ),
    (
        "a wrong value that --set gives, which stands on no line",
        lambda d: ["plan", d.recipe(seed=1), "--set", "seed=x"],
        ["error: seed is 'x', not a whole number"],
    ),
    (
        "a misspelt parameter",
        lambda d: ["plan", d.recipe(passes=[{"rtn": {"group": 32}}])],
        ["unknown key 'passes.0.rtn.group'", "group_size"],
    ),
    (
        "a word for a number",
        lambda d: ["plan", d.recipe(passes=[{"rtn": {"bits": "four"}}])],
        ["recipe.yaml, line 5: passes.0.rtn.bits is 'four', not a whole number", "bits: bits of"],
    ),
    (
        "bits out of range",
        lambda d: ["plan", d.recipe(passes=[{"rtn": {"bits": 40}}])],
        ["passes.0.rtn.bits is 40, above 8, the most"],
    ),
    (
        "a size without a unit that is known",
        lambda d: ["plan", d.recipe(max_shard_size="5 gigs")],
        ["max_shard_size", "is not a size such as 5GB"],
    ),
    (
        "a format that is not there",
        lambda d: ["plan", d.recipe(format="ggufx")],
        ["format:", "ggufx", "compressed-tensors"],
    ),
    (
        "a target that means nothing",
        lambda d: ["plan", d.recipe(passes=[{"rtn": {"targets": "attn.qq", "group_size": 32}}])],
        ["rtn: target 'attn.qq' matches no linear", "did you mean 'attn.q'?"],
    ),
    (
        "everything ignored",
        lambda d: ["plan", d.recipe(passes=[{"rtn": {"ignore": ["linear", "lm_head"]}}])],
        ["everything it targets is ignored", "shorten `ignore`"],
    ),
    (
        "groups that do not divide",
        lambda d: ["plan", d.recipe(passes=[{"rtn": {"group_size": 128}}])],
        ["rtn:", "128", "linears (model.layers.0."],
    ),
    (
        "two quantizers",
        lambda d: ["plan", d.recipe(passes=[RTN, RTN])],
        ["rtn (pass 2) is a second quantizer for", "rtn (pass 1) quantizes", "drop one"],
    ),
    (
        "half of a fused matrix",
        lambda d: [
            "plan",
            d.recipe(passes=[{"rtn": {"targets": "attn.q", "group_size": 32}}]),
        ],
        ["q_proj", "would get different schemes", "target or ignore them together"],
    ),
    (
        "an embedding",
        lambda d: ["plan", d.recipe(passes=[{"rtn": {"targets": "model.embed_tokens"}}])],
        ["'model.embed_tokens' is an embedding, and no format here holds", "ignore: []"],
    ),
    (
        "a tied head",
        lambda d: [
            "plan",
            d.recipe(
                model=str(d.tied),
                passes=[{"rtn": {"targets": "lm_head", "ignore": [], "group_size": 32}}],
            ),
        ],
        ["targets lm_head, which shares its weight with", "untie: true"],
    ),
    (
        "no such model",
        lambda d: ["plan", d.recipe(model="./nowhere")],
        ["there is no model at ./nowhere", "org/name@revision"],
    ),
    (
        "a file that is no model",
        lambda d: ["plan", d.recipe(model=d.write("weights.bin", "x"))],
        ["is a file, but not a GGUF file"],
    ),
    (
        "a GGUF file that is none",
        lambda d: ["plan", d.recipe(model=d.write("model.gguf", "not a model"))],
        ["model.gguf"],
    ),
    (
        "a model without config.json",
        lambda d: after((d.copy() / "config.json").unlink(), ["plan", d.recipe()]),
        ["config.json"],
    ),
    (
        "a download that ended early",
        lambda d: after(
            (d.copy() / "model.safetensors").rename(d.model / "model.safetensors.part"),
            ["plan", d.recipe()],
        ),
        ["has no model.safetensors", "a download did not finish", "hf download"],
    ),
    (
        "a download that goes on, into a file of its full size",
        lambda d: after((d.copy() / "model.safetensors.aria2").touch(), ["plan", d.recipe()]),
        ["is not downloaded to its end: model.safetensors.aria2 is beside it"],
    ),
    (
        "an architecture without a map",
        lambda d: after(d.edit_config(model_type="llama5"), ["plan", d.recipe()]),
        ["no architecture map for model_type 'llama5'", "the nearest is llama", "map: none"],
    ),
    (
        "a tensor that is missing",
        lambda d: after(
            d.edit_weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
            ["plan", d.recipe()],
        ),
        ["model.layers.1.mlp.up_proj.weight"],
    ),
    (
        "a tensor of another shape",
        lambda d: after(d.edit_config(intermediate_size=128), ["plan", d.recipe()]),
        ["disagree on the shape", "model.layers.0.mlp.gate_proj.weight [96, 64], not [128, 64]"],
    ),
    (
        "a truncated file",
        lambda d: after(
            (d.copy() / "model.safetensors").write_bytes(
                (d.llama / "model.safetensors").read_bytes()[:5000]
            ),
            ["plan", d.recipe()],
        ),
        ["model.safetensors"],
    ),
    (
        "NaN in the weights",
        lambda d: after(
            d.edit_weights(lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))),
            ["run", d.recipe(), "--device", "cpu"],
        ),
        ["NaN or infinity in model.layers.1.mlp.up_proj.weight", "download it again"],
    ),
    (
        "a gate that nothing measures",
        lambda d: ["plan", d.recipe(gate={"kl": 0.1})],
        ["gate: nothing in this recipe measures kl", "under evaluate:"],
    ),
    (
        "a gate without limits",
        lambda d: ["plan", d.recipe(gate={})],
        ["gate: a gate needs at least one limit: ppl, ppl_ratio"],
    ),
    (
        "publishing unverified",
        lambda d: ["plan", d.recipe(publish={"repo": "me/x"}, verify=False)],
        ["unverified files are not published", "verify: true"],
    ),
    (
        "a repository without a user",
        lambda d: ["plan", d.recipe(publish={"repo": "model"})],
        ["publish.repo: a Hub repository is user/name", "'model'"],
    ),
    (
        "a stride longer than a window",
        lambda d: ["plan", d.recipe(evaluate={"length": 64, "stride": 64})],
        ["evaluate: stride 64 skips tokens: it must be below length"],
    ),
    (
        "rows longer than learned positions",
        lambda d: ["plan", d.recipe(model=str(d.opt), evaluate={"length": 4096})],
        ["evaluate.length: rows of 4096 tokens", "at most 256"],
    ),
    (
        "no text there",
        lambda d: [
            "run",
            d.recipe(evaluate={"data": "held-out.txt", "length": 64}),
            "--device",
            "cpu",
        ],
        ["evaluate.data: there is no file held-out.txt"],
    ),
    (
        "text in another field",
        lambda d: [
            "run",
            d.recipe(evaluate={"length": 64, "data": d.write("rows.jsonl", '{"body": "words"}\n')}),
            "--device",
            "cpu",
        ],
        ["evaluate.data: rows.jsonl line 1 has no field", "one of: 'body'"],
    ),
    (
        "a broken line of JSON",
        lambda d: [
            "run",
            d.recipe(evaluate={"length": 64, "data": d.write("rows.jsonl", '{"text": "a"}\n{"te')}),
            "--device",
            "cpu",
        ],
        ["evaluate.data: rows.jsonl line 2 is not JSON"],
    ),
    (
        "too little text",
        lambda d: [
            "run",
            d.recipe(evaluate={"length": 64, "data": d.write("short.txt", "a few words")}),
            "--device",
            "cpu",
        ],
        ["evaluate.data:", "tokens"],
    ),
    (
        "an output folder that holds other things",
        lambda d: after(
            d.write("thesis.tex", "mine"),
            ["run", d.recipe(), "--device", "cpu", "--output", d.folder],
        ),
        ["is not empty and holds no run of this program", "nothing is ever overwritten"],
    ),
    (
        "a device that is none",
        lambda d: ["run", d.recipe(), "--device", "gpu"],
        ["'gpu' is not", "cpu, cuda or cuda:1"],
    ),
    (
        "--set without a value",
        lambda d: ["plan", d.recipe(), "--set", "calibration.samples"],
        ["'calibration.samples' has no '='", "--set calibration.samples=64"],
    ),
    (
        "--set for a pass that is not there",
        lambda d: ["plan", d.recipe(), "--set", "passes.awq.bits=3"],
        ["'awq' names no single pass of this recipe"],
    ),
    (
        "a command that is none",
        lambda d: ["rum", "x"],
        ["no such command: compress rum", "did you mean 'run'?"],
    ),
    ("a command in a group", lambda d: ["delta", "aply"], ["compress delta aply", "'apply'?"]),
    (
        "an option that is cut short",
        lambda d: ["quantize", "x", "--bits", "4"],
        ["'--bits'", "'--bits-per-weight'"],
    ),
    ("an option that is none", lambda d: ["plan", "x", "--devise"], ["--devise", "plan --help"]),
    (
        "an argument that is missing",
        lambda d: ["run"],
        ["Missing argument 'RECIPE'", "run --help"],
    ),
    (
        "a recipe of that name is not there",
        lambda d: ["recipes", "llama2-awk"],
        ["there is no recipe 'llama2-awk'", "did you mean 'llama2-awq'?"],
    ),
    (
        "nothing to verify",
        lambda d: ["verify", d.folder / "nowhere"],
        ["nowhere is not a folder", "name a checkpoint's folder"],
    ),
    (
        "nothing to publish",
        lambda d: ["push", d.llama, "me/model"],
        ["holds no finished checkpoint: it has no manifest.json", "compress run writes one"],
    ),
    (
        "publishing to no repository",
        lambda d: ["push", d.llama, "model"],
        ["'model' is not a Hub repository", "user/name"],
    ),
]


def typed(
    arguments: Sequence[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `compress` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    ("typing", "says"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_a_mistake_is_answered(
    typing: Callable[[Desk], Sequence[Any]],
    says: Sequence[str],
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(desk.folder)
    arguments = typing(desk)
    capsys.readouterr()
    code, out, err = typed(arguments, monkeypatch, capsys)
    assert code == 2, err
    assert "\nerror: " in f"\n{err}" and "Traceback" not in err and "internal error" not in err
    for text in says:
        assert text in err
    assert not out
    assert not (desk.folder / "out" / "manifest.json").exists()


def test_there_are_enough_mistakes() -> None:
    assert len({name for name, _, _ in CASES}) == len(CASES) >= 30


def test_all_that_is_wrong_is_said_at_once_also_to_machines(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = desk.recipe(sed=3, passes=[{"aqw": {}}, {"rtn": {"bits": 99}}])
    code, out, err = typed(["plan", recipe, "--json"], monkeypatch, capsys)
    found = json.loads(out)
    assert code == found["exit_code"] == 2 and found["ok"] is False
    assert found["errors"][0]["hint"] == "did you mean 'awq'?"
    assert len(found["errors"]) == 3 == err.count("error: ")


def test_other_exit_codes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1: a check failed; 3: the machine failed; 0: all is well."""
    monkeypatch.chdir(desk.folder)
    run = ["run", desk.recipe(), "--device", "cpu"]
    assert typed(run, monkeypatch, capsys)[0] == 0
    weights = desk.folder / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 4
    weights.write_bytes(data)
    assert typed(["verify", desk.folder / "out"], monkeypatch, capsys)[0] == 1
    code, _, err = typed(["push", desk.folder / "out", "me/x", "--dry-run"], monkeypatch, capsys)
    assert code == 1 and "damaged: model.safetensors" in err

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compressor.checkpoint.shards.os.fsync", full)
    run = [*run, "--output", str(desk.folder / "other")]
    code, _, err = typed(run, monkeypatch, capsys)
    assert code == 3 and "No space left" in err and "the same command continues" in err

"""Contracts of runtimes: what loads, what does not and why, in a plan and in a finished file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import InputError, Problems
from compressor.formats.base import format_names
from compressor.plan.plan import Plan, make_plan
from compressor.plan.recipe import make_recipe
from compressor.report.inspect import stored_form
from compressor.runtimes.contract import load_contract, parse_runtime, runtime_names
from compressor.runtimes.loads import loads

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}


@pytest.fixture()
def planned(tiny_model: Callable[..., Path]) -> Callable[..., Plan]:
    def plan(
        runtime: str | None, *passes: dict[str, Any], kind: str = "llama", **more: Any
    ) -> Plan:
        folder = tiny_model(kind, **SIZES)
        data = {"model": str(folder), "output": "out", "passes": list(passes), **more}
        recipe = make_recipe(data | ({"runtime": runtime} if runtime else {}))
        return make_plan(recipe, open_source(folder))

    return plan


def test_every_contract_is_whole() -> None:
    names = ["llama.cpp", "mlx", "sglang", "tensorrt-llm", "transformers", "vllm"]
    assert runtime_names() == names
    for name in names:
        contract = load_contract(name)
        for line in (*contract.loads, *contract.kv, *contract.holes):
            assert line.source and set(line.formats) <= set(format_names())
            assert set(line.versions) | set(line.ran) <= set(contract.versions)
            assert not line.issue or line.issue.startswith("https://github.com/")


RTN = {"rtn": {"bits": 4, "group_size": 32}}


def rtn(**options: Any) -> dict[str, Any]:
    return {"rtn": options}


@pytest.mark.parametrize(
    ("runtime", "step", "refused"),
    [
        ("vllm", rtn(bits=4, group_size=32), None),
        ("vllm", rtn(bits=4, group_size=16), "groups of 32, 64 or 128"),
        ("vllm", rtn(bits=3, group_size=64), None),
        ("vllm@0.24", rtn(bits=3, group_size=64), "4 bits|2 bits|8 bits"),
        ("vllm", rtn(bits=8, activations="token"), None),
        ("vllm@0.24.0", rtn(bits=8, activations="token"), None),
        ("vllm@0.24", rtn(bits=8, group_size=64, activations="token"), "float inputs"),
        ("vllm", rtn(bits=8, activations="tensor"), "int8 token"),
        ("vllm", rtn(bits=8, activations="static"), None),
        ("vllm", rtn(bits=4, group_size=64, activations="token"), None),
        ("vllm@0.24", rtn(bits=4, group_size=64, activations="token"), "float inputs"),
        ("vllm", rtn(bits=8, group_size=128, symmetric=False), None),
        (
            "vllm, gpu: a100",
            rtn(bits=8, group_size=128, symmetric=False),
            "no kernel for it on a100",
        ),
        ("vllm@0.24, gpu: h100", {"fp8": {"scales": "weights"}}, "7.5 or newer, before 8.9"),
        ("vllm@0.24, gpu: a100", {"fp8": {"scales": "weights"}}, None),
        ("tensorrt-llm, gpu=a100", {"fp8": {}}, "no kernel for it on a100"),
        ("vllm, gpu=a100", {"fp8": {}}, None),
        ("sglang", rtn(bits=3, group_size=64), "4 or 8 bits"),
        ("sglang", rtn(bits=4, group_size=64, symmetric=False), None),
        ("tensorrt-llm", rtn(bits=4, group_size=64), "nvfp4|fp8|mxfp4"),
        ("mlx", rtn(bits=4, group_size=64), "groups of 32"),
        ("mlx", RTN, None),
        (
            "vllm, tp: 8",
            {"rtn": {"bits": 4, "group_size": 128}},
            "cannot cut the model's 64 inputs, split",
        ),
        ("vllm, tp: 3", RTN, "cannot split the model's 8 heads"),
    ],
)
def test_a_plan_refuses_what_would_not_load(
    runtime: str, step: dict[str, Any], refused: str | None, planned: Callable[..., Plan]
) -> None:
    name = parse_runtime(runtime)
    if refused is None:
        assert any(note.startswith(name.title) for note in planned(runtime, step).notes)
        return
    with pytest.raises(Problems, match=refused) as caught:
        planned(runtime, step, format="compressed-tensors")
    start = f"runtime {name.title}"
    assert all(p.message.startswith(start) and p.hint for p in caught.value.problems)


@pytest.mark.parametrize(
    ("step", "more", "message", "hint"),
    [
        # the format, alone and where a runtime is named too
        (rtn(bits=3, group_size=64), {"format": "autoawq"}, "format autoawq cannot", "gptq-v2$"),
        (
            rtn(bits=8, group_size=64),
            {"format": "autoawq", "runtime": "sglang"},
            "format autoawq cannot hold .* not 8",
            "a format that SGLang 0.5.23 loads: compressed-tensors, gptq, gptq-v2",
        ),
        (
            rtn(bits=3, group_size=64),
            {"format": "autoawq", "runtime": "sglang"},
            "format autoawq cannot hold .* not 3",
            "no other format holds it and SGLang 0.5.23 loads; autoawq holds int4",
        ),
        # the runtime
        (
            rtn(bits=4, group_size=64, symmetric=False),
            {"format": "gptq-v2", "runtime": "vllm"},
            "runtime vLLM 0.33 does not load .* symmetric",
            "format: compressed-tensors would load as it is; it loads",
        ),
        (
            rtn(bits=4, group_size=64),
            {"runtime": "tensorrt-llm"},
            "runtime TensorRT-LLM .* does not load 4-bit int .* fp8, nvfp4 or mxfp4 weights",
            "it loads ",
        ),
        (
            rtn(bits=4, activations="fp8"),
            {"runtime": "vllm, gpu: a100"},
            "runtime vLLM 0.33 has no kernel for it on a100",
            "gpu: .*h100.*; on a100 it loads 4-bit int weights",
        ),
        # the model
        (rtn(bits=4, group_size=96), {}, "the model's 256 inputs; 128, 64, 32, 16 would", ""),
        (
            rtn(bits=4, group_size=128),
            {"runtime": "vllm, tp: 8", "format": "compressed-tensors"},
            "runtime vLLM 0.33 cannot cut the model's 32 inputs, split between 8 GPUs",
            "group_size: 32, or tp: 1 or 2, or leave it",
        ),
        (RTN, {"runtime": "vllm, tp: 6"}, "cannot split the model's 8 heads", "tp: 1, 2 or 4"),
    ],
)
def test_a_refusal_says_which_of_three_and_what_would_do(
    step: dict[str, Any],
    more: dict[str, Any],
    message: str,
    hint: str,
    planned: Callable[..., Plan],
) -> None:
    more = dict(more)
    with pytest.raises(Problems) as caught:
        planned(more.pop("runtime", None), step, **more)
    found = [p for p in caught.value.problems if re.search(message, p.message)]
    assert found, [p.message for p in caught.value.problems]
    assert any(re.search(hint, p.hint or "") for p in found), [p.hint for p in found]


def test_a_size_that_is_wrong_is_said_once(planned: Callable[..., Plan]) -> None:
    with pytest.raises(Problems) as caught:
        planned(None, rtn(bits=4, group_size=96))
    assert all("the model's" in p.message for p in caught.value.problems)


def test_a_cache_that_nothing_reads_is_refused(planned: Callable[..., Plan]) -> None:
    with pytest.raises(Problems, match="does not read a KV cache of int8"):
        planned("vllm", RTN, {"kv_cache": {"element": "int8"}})
    with pytest.raises(Problems, match="does not read a KV cache of fp8_e4m3 per head"):
        planned("sglang", RTN, {"kv_cache": {"element": "fp8", "scales": "head"}})
    assert planned("vllm", RTN, {"kv_cache": {"element": "fp8", "scales": "head"}})


def test_the_format_is_picked_where_the_recipe_names_none(planned: Callable[..., Plan]) -> None:
    static = {"fp8": {"scales": "static"}}
    plan = planned("tensorrt-llm", static)
    assert plan.target.format.name == plan.recipe.format == "modelopt-fp8"
    assert any("written as modelopt-fp8" in note for note in plan.notes)
    with pytest.raises(Problems, match="does not load 8-bit fp8"):
        planned("tensorrt-llm", static, format="compressed-tensors")


def test_a_tied_head_under_modelopt_is_a_named_hole(
    tiny_model: Callable[..., Path], planned: Callable[..., Plan]
) -> None:
    folder = tiny_model("llama", tie_word_embeddings=True, **SIZES)

    def plan(runtime: str, **more: Any) -> Plan:
        data = {"model": str(folder), "output": "o", "passes": [{"fp8": {"scales": "static"}}]}
        return make_plan(make_recipe(data | {"runtime": runtime} | more), open_source(folder))

    with pytest.raises(Problems, match="cannot tie a head") as caught:
        plan("vllm@0.24", format="modelopt-fp8")
    assert "untie: true" in (caught.value.problems[0].hint or "")
    assert plan("vllm@0.24", format="modelopt-fp8", untie=True)
    assert plan("vllm@0.33", format="modelopt-fp8")
    assert plan("vllm@0.24").target.format.name == "compressed-tensors"


EXPERTS, ATTENTION = {"targets": ["*expert*"]}, {"targets": ["*attn*"]}


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("granitemoe", EXPERTS, "experts in one tensor"),
        ("gpt_oss", EXPERTS, "experts in one tensor"),
        ("gpt2", {}, r"lies \[in, out\]"),
        ("falcon", {}, "Falcon"),
        ("llama4_text", ATTENTION, "one by one beside packed linears"),
        ("granitemoe", ATTENTION, None),
        ("llama4_text", EXPERTS, None),
        ("qwen3_next", {}, None),
    ],
)
def test_what_transformers_loads_wrong_is_refused_before_and_after(
    family: str,
    options: dict[str, Any],
    says: str | None,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    step = {"rtn": {"bits": 8, "group_size": 8, **options}}
    recipe: dict[str, Any] = {
        **{"model": str(tiny_model(family)), "output": str(tmp_path / "out"), "passes": [step]},
        **{"format": "compressed-tensors", "verify": False, "report": False},
    }
    source = open_source(tiny_model(family))
    served = make_recipe({**recipe, "runtime": "transformers"})
    if says is None:
        make_plan(served, source)
        return
    with pytest.raises(Problems, match=says):
        make_plan(served, source)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    assert CliRunner().invoke(cli, ["run", str(path)]).exit_code == 0
    found = loads(parse_runtime("transformers"), stored_form(open_source(tmp_path / "out")))
    assert re.search(says, found[0].message)


def test_experts_are_named_where_a_runtime_wants_that(planned: Callable[..., Plan]) -> None:
    def targets(runtime: str | None) -> list[str]:
        plan = planned(runtime, RTN, kind="mixtral")
        groups = plan.target.config()["quantization_config"]["config_groups"]
        found: list[str] = groups["group_0"]["targets"]
        return found

    assert targets(None) == targets("vllm") == ["Linear"]
    assert "model.layers.0.self_attn.q_proj" in targets("sglang") and len(targets("sglang")) > 8


def test_a_quantized_head_loads_where_a_runtime_finds_it(planned: Callable[..., Plan]) -> None:
    everything = {"rtn": {"group_size": 32, "ignore": []}}
    for runtime in ("vllm", "sglang"):
        plan = planned(runtime, everything)
        assert plan.schemes.linears["lm_head"].weight is not None
    blocks = {"fp8": {"scales": "block", "ignore": []}}
    with pytest.raises(Problems, match="takes a head beside quant_method fp8 for one in float"):
        planned("vllm@0.24", blocks, format="fp8")


def test_without_a_runtime_a_plan_says_that_nothing_serves_the_result(
    planned: Callable[..., Plan],
) -> None:
    notes = planned(None, rtn(bits=5, activations="static", group_size=64)).notes
    assert any("only transformers loads the result" in note for note in notes)
    assert not any("known here" in note for note in planned(None, RTN).notes)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("vlm", ["unknown runtime 'vlm'", "vllm"]),
        ("vllm@0.5", ["vLLM 0.5 is not known", "0.24, 0.33"]),
        ("vllm, gpu: h900", ["unknown GPU 'h900'", "h100"]),
        ("vllm, tq: 2", ["unknown key 'tq'", "tp"]),
        ("vllm, tp: 0", ["tp is 0"]),
        ({"name": "sglang", "version": "9"}, ["SGLang 9", "0.5.23"]),
        (3, ["is no runtime"]),
    ],
)
def test_what_is_not_known_names_what_is(value: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_runtime(value)
    assert all(word in f"{caught.value.message} {caught.value.hint}" for word in words)
    with pytest.raises(Problems, match=words[0].replace("'", ".")):
        make_recipe({"model": "m", "output": "o", "passes": [RTN], "runtime": value})


def test_a_resolved_recipe_says_the_same(planned: Callable[..., Plan]) -> None:
    recipe = planned("vllm@0.33, tp: 2, gpu: h100", RTN).recipe
    again = make_recipe({**recipe.resolved(), "output": "out"})
    assert again.runtime == recipe.runtime and again.runtime is not None
    assert (again.runtime.tp, again.runtime.gpu) == (2, "h100")


def test_inspect_answers_for_a_finished_file(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model("llama", **SIZES), folder)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"model": str(folder), "output": "x", "passes": [RTN]}))
    out = tmp_path / "out"
    arguments = ["run", str(recipe), "-o", str(out), "--device", "cpu", "--set", "verify=false"]
    bits = ["--set", "passes.rtn.bits=3"]
    assert CliRunner().invoke(cli, [*arguments, *bits]).exit_code == 0
    assert not loads(parse_runtime("vllm"), stored_form(open_source(out)))
    good = CliRunner().invoke(cli, ["inspect", str(out), "--for", "vllm"])
    assert good.exit_code == 0 and "loads in    vLLM 0.33" in good.output
    bad = CliRunner().invoke(cli, ["inspect", str(out), "--for", "sglang", "--json"])
    assert bad.exit_code == 1
    told = json.loads(bad.stdout)
    assert not told["ok"] and not told["for"]["loads"]
    assert "4 or 8 bits" in told["for"]["reasons"][0]["message"]


def test_experts_in_float_beside_packed_linears(planned: Callable[..., Plan]) -> None:
    attention = rtn(bits=8, group_size=32, targets=["attn.*"])
    with pytest.raises((InputError, Problems), match="does not stack experts in float"):
        planned("transformers", attention, kind="mixtral", format="compressed-tensors")
    planned("vllm", attention, kind="mixtral")
    planned("transformers", rtn(bits=8, group_size=32), kind="mixtral")
    planned("transformers", attention, kind="gpt_oss")  # whose experts stay in their stack


def test_nvfp4_experts_beside_another_scheme_are_a_hole_of_a_version(
    planned: Callable[..., Plan],
) -> None:
    fp8 = {"fp8": {"targets": ["attn.*"]}}
    experts = {"nvfp4": {"ignore": ["lm_head", "attn.*"]}}
    with pytest.raises(Problems, match="beside attention in another"):
        planned("vllm@0.24", fp8, experts, kind="mixtral", format="compressed-tensors")
    assert planned("vllm@0.24", experts, kind="mixtral")
    assert planned("vllm@0.24", fp8, experts)


def test_scales_of_a_cache_that_a_model_class_cannot_read_are_a_hole(
    planned: Callable[..., Plan],
) -> None:
    static, cache = {"fp8": {"scales": "static"}}, {"kv_cache": {"element": "fp8"}}
    modelopt = {"kind": "mixtral", "format": "modelopt-fp8"}
    with pytest.raises(Problems, match="cannot read scales of a KV cache"):
        planned("vllm@0.24", static, cache, **modelopt)
    assert planned("vllm@0.24", static, **modelopt)
    assert planned("vllm@0.24", static, cache, kind="mixtral")


def test_classes_that_a_runtime_lacks_and_heads_it_keeps_in_float_are_refused(
    planned: Callable[..., Plan],
) -> None:
    head = rtn(bits=4, group_size=32, ignore=[])
    with pytest.raises(Problems, match="has no class of this architecture"):
        planned("vllm@0.24", RTN, kind="dots1")
    with pytest.raises(Problems, match=r"builds this model's head in float.*lm_head"):
        planned("vllm@0.24", head, kind="phimoe")
    assert planned("vllm@0.24", RTN, kind="phimoe")
    assert planned("vllm@0.24", head, kind="olmoe")

"""Configs that contradict the files: what is wrong is named, in every way to keep experts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.arch.load import find_map
from compressor.checkpoint.reader import open_checkpoint
from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Problems
from compressor.plan.preflight import check_model

TinyModel = Callable[..., Path]
Headers = dict[str, tuple[int, ...]]


def lay(folder: Path, change: Callable[[Headers], Headers] | None = None, **said: Any) -> Any:
    checkpoint = open_checkpoint(folder)
    config = {**checkpoint.config, **said}
    headers = checkpoint.shapes if change is None else change(checkpoint.shapes)
    return find_map(config, headers).layout(config, headers)


def without(part: str) -> Callable[[Headers], Headers]:
    return lambda headers: {n: s for n, s in headers.items() if part not in n}


def with_biases(*paths: str) -> Callable[[Headers], Headers]:
    ends = tuple(f"{path}.weight" for path in paths)
    return lambda headers: (
        headers
        | {f"{n.removesuffix('weight')}bias": s[:1] for n, s in headers.items() if n.endswith(ends)}
    )


def stacks(shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable[[Headers], Headers]:
    return lambda headers: {
        n: shape(s) if len(s) == 3 and "conv" not in n else s for n, s in headers.items()
    }


ONE_BY_ONE = [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")]
STACKED = [("gpt_oss", "num_local_experts"), ("granitemoe", "num_local_experts")]


@pytest.mark.parametrize(("family", "key"), ONE_BY_ONE)
def test_experts_one_by_one(family: str, key: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family)
    assert lay(folder)
    with pytest.raises(InputError, match=rf"says {key} 5, numbered from 0; model\.layers\.0 has 4"):
        lay(folder, **{key: 5})
    with pytest.raises(InputError, match=rf"says {key} 3.* has expert 3 beside them and 1 more"):
        lay(folder, **{key: 3})
    with pytest.raises(InputError, match=r"layers.0 lacks expert 2 and 1 more blocks"):
        lay(folder, without("experts.2."))
    with pytest.raises(InputError, match=r"lacks 1 tensor: model.layers.1.*experts.2.(w2|down)"):
        lay(
            folder,
            without("layers.1.block_sparse_moe.experts.2.w2.")
            if family == "mixtral"
            else without("layers.1.mlp.experts.2.down_proj."),
        )


@pytest.mark.parametrize(("family", "key"), STACKED)
def test_experts_in_one_tensor(family: str, key: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family)
    assert lay(folder)
    for count in (3, 5):
        with pytest.raises(InputError, match=rf"disagree on the shape .*\[4, .*not \[{count}, "):
            lay(folder, **{key: count})
    turned = stacks(lambda s: (s[0], s[2], s[1]))
    odd = stacks(lambda s: (s[0], s[1] - 1, s[2]))
    for change in (turned, odd, stacks(lambda s: (3, *s[1:]))):
        with pytest.raises(InputError, match="disagree on the shape of"):
            lay(folder, change)
    stack = "experts.down_proj" if family == "gpt_oss" else "output_linear"
    with pytest.raises(InputError, match=r"the checkpoint lacks .*experts\.0\."):
        lay(folder, without(stack))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("chosen", [0, 5, -1, 2.5, "2"])
def test_a_choice_of_experts_is_one(family: str, chosen: Any, tiny_model: TinyModel) -> None:
    with pytest.raises(InputError, match=r"num_experts_per_tok is .*, which is no choice of 4"):
        lay(tiny_model(family), num_experts_per_tok=chosen)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "nemotron_h", "glm_moe_dsa"])
def test_groups_of_experts_are_such(family: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family)
    sound = {"n_group": 2, "topk_group": 1}
    assert lay(folder, **sound)
    for said, message in (
        ({"n_group": 3}, r"n_group is 3, which does not divide n_routed_experts 4"),
        ({"n_group": 0}, r"n_group is 0, which does not divide"),
        ({"n_group": "2"}, r"n_group is '2'"),
        ({"topk_group": 3}, r"topk_group is 3, which is no choice of 2"),
        ({"topk_group": 0}, r"topk_group is 0"),
        ({"num_experts_per_tok": 3}, r"per_tok is 3, and topk_group 1 of n_group 2 leaves 2"),
    ):
        with pytest.raises(InputError, match=message):
            lay(folder, **{**sound, **said})


def test_what_config_says_of_each_block_is_held_against_it(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """By the model that transformers makes of it, before a run."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("glm_moe_dsa shared"), folder)
    at = folder / "config.json"
    config = json.loads(at.read_text())
    check_model(open_source(folder))
    at.write_text(json.dumps({**config, "indexer_types": ["full", "full", "full"]}))
    with pytest.raises(Problems, match=r"layers\.1: .* needs what the checkpoint does not have: "):
        check_model(open_source(folder))
    at.write_text(json.dumps({**config, "indexer_types": ["full", "shared", "shared"]}))
    with pytest.raises(Problems, match=r"layers\.2: .* has no place for"):
        check_model(open_source(folder))


@pytest.mark.parametrize("family", ["phi3", "qwen3_next"])
def test_fused_linears(family: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family)
    with pytest.raises(InputError, match="disagree on the shape of"):
        lay(folder, num_attention_heads=8)
    with pytest.raises(InputError, match=r"the checkpoint lacks .*layers\.2\."):
        lay(folder, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"no place for .*layers\.1\."):
        lay(folder, num_hidden_layers=1)


def test_blocks_that_share_keys_are_those_that_the_config_says(tiny_model: TinyModel) -> None:
    folder = tiny_model("gemma4_text shared")
    with pytest.raises(Problems, match=r"lacks .*layers\.2\.self_attn\.k_proj"):
        lay(folder, num_kv_shared_layers=1)
    with pytest.raises(Problems, match=r"shape of .*layers\.1\.mlp.gate_proj.* not \[192, 64\]"):
        lay(folder, num_kv_shared_layers=3)
    with pytest.raises(Problems, match=r"shape of .*layers\.0\.per_layer_input_gate"):
        lay(folder, hidden_size_per_layer_input=16)
    with pytest.raises(InputError, match="per_layer_input is 0, and the files have some"):
        lay(folder, hidden_size_per_layer_input=0)


@pytest.mark.parametrize("count", ["two", True, -1, 4, 99])
def test_a_number_of_last_blocks_leaves_some_before_them(
    count: object, tiny_model: TinyModel
) -> None:
    with pytest.raises(InputError, match=r"num_kv_shared_layers is .*, not a number of blocks"):
        lay(tiny_model("gemma4_text shared"), num_kv_shared_layers=count)


@pytest.mark.parametrize(
    ("family", "said", "message"),
    [
        ("codegen", {"n_head": 3}, r"do not fit each other: attn\.qkv_proj .* has 189 rows"),
        ("gpt_bigcode", {"multi_query": False}, "multi_query False is not supported"),
        ("laguna", {"num_attention_heads_per_layer": [0, 8]}, "per_layer is 0, not a count"),
        ("laguna", {"gating": "per-element"}, r"shape of .*g_proj.* not \[128, 64\]"),
        ("mimo_v2_flash", {"v_head_dim": 32}, r"shape of .*v_proj.* not \[32, 64\]"),
        ("minicpm3", {"dim_model_base": 0}, "is 0, and logits are multiplied with it"),
        ("falcon_h1", {"lm_head_multiplier": "x"}, "lm_head_multiplier is 'x', not a number"),
        ("hy_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, which is no choice of 4"),
    ],
)
def test_what_contradicts_itself_or_the_files_is_named(
    family: str, said: dict[str, Any], message: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(InputError, match=message):
        lay(tiny_model(family), **said)


def test_experts_in_files_where_config_json_has_none(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("afmoe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_dense_layers": 2}))
    with pytest.raises(InputError, match=r"layers.1: the model .* has no place for .*experts"):
        check_model(open_source(folder), {f"expert.{e}.out" for e in range(4)})


@pytest.mark.parametrize(
    ("family", "said", "change"),
    [
        ("granitemoeshared", {"shared_intermediate_size": 0}, without("shared_mlp")),
        ("cohere2_moe", {"num_shared_experts": 0}, without("shared_experts")),
        ("axk1", {}, lambda found: {**found, "model.layers.0.post_mlp_layernorm.weight": (64,)}),
        ("mellum", {}, lambda found: {**found, "mtp.layers.0.input_layernorm.weight": (64,)}),
        ("falcon_h1", {"projectors_bias": True}, with_biases("mamba.out_proj")),
        (
            "hy_v3",
            {"mlp_bias": True},
            with_biases(
                *(f"layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")),
                *(f"mlp.shared_mlp.{x}_proj" for x in ("gate", "up", "down")),
            ),
        ),
    ],
)
def test_what_released_files_leave_out_or_have_more_is_taken(
    family: str,
    said: dict[str, Any],
    change: Callable[[Headers], Headers],
    tiny_model: TinyModel,
) -> None:
    laid = lay(tiny_model(family), change, **said)
    assert laid.blocks and not laid.unannounced

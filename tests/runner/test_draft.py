"""A drafted map says of a known family what its own map says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compressor.arch.load import ArchMap, load_map
from compressor.checkpoint.find import locate
from compressor.checkpoint.reader import open_checkpoint
from compressor.cli.main import cli
from compressor.ir.layout import ModelLayout
from compressor.runner.draft import draft


def said(layout: ModelLayout) -> list[Any]:
    """What a map says of a checkpoint, in no order."""
    return [
        (
            unit.name,
            {(x.name, x.role, x.site, x.shape, x.rows, x.fused, x.bias) for x in unit.linears},
            {(x.name, x.role, x.offset, x.kind, x.bias) for x in unit.norms},
            {(x.site, x.source, x.repeat, x.rows, x.norm_offset) for x in unit.folds},
            set(unit.others),
        )
        for unit in layout.units
    ]


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", "cohere", "olmo2", "nemotron", "phi3", "qwen3_moe", "qwen2_moe"],
)
def test_a_draft_is_the_family_s_own_map(family: str, tiny_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    headers = {name: entry.spec.shape for name, entry in checkpoint.entries.items()}
    found = draft(checkpoint.config, headers)
    arch = ArchMap.model_validate_json(json.dumps({"model_type": family, **found.data}))
    own = load_map(family).layout(checkpoint.config, headers)
    assert said(arch.layout(checkpoint.config, headers)) == said(own)
    assert len(found.unsure) == (family == "phi3")  # that its rows are q, k and v in this order


def test_what_is_not_certain_is_marked_and_the_command_prints_a_map(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    result = CliRunner().invoke(cli, ["map", "draft", str(tiny_model("mixtral"))])
    assert result.exit_code == 0
    assert "# Unsure: what 'model.layers.0.block_sparse_moe.gate.weight' is called" in result.output
    result = CliRunner().invoke(cli, ["map", "draft", str(tiny_model("qwen3"))])
    assert "# Unsure" not in result.output
    (tmp_path / "my.yaml").write_text(result.output)
    chosen = str(tmp_path / "my.yaml")
    source = locate(str(tiny_model("qwen3")), fetch=False, chosen=chosen).source
    assert said(source.layout) == said(locate(str(tiny_model("qwen3")), fetch=False).source.layout)

"""The model card: metadata the Hub's own parser reads, snippets that run, nothing that escapes."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from compressor.formats.base import ModelSchemes, format_names
from compressor.formats.loading import loading_of
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.report.card import (
    CARD_NAME,
    CardData,
    is_generated,
    make_card,
    metadata,
    name_repository,
    source_metadata,
    write_card,
)

INT4 = QuantSpec("int", 4, "group", 64, scale_dtype=torch.bfloat16)
ASYMMETRIC = QuantSpec("int", 4, "group", 64, zero="subtract", scale_dtype=torch.bfloat16)
FP8 = QuantSpec("fp8_e4m3", 8, "tensor")
EVALUATION = {
    "tokens": 4088,
    "windows": 8,
    "length": 512,
    "perplexity": {"value": 61.2345, "error": 2.4},
    "original_perplexity": {"value": 54.918, "error": 2.1},
    "kl": {"value": 0.0912, "error": 0.002},
    "top1": {"value": None, "error": None},
}


def card(spec: QuantSpec | None = INT4, **changes: Any) -> CardData:
    values: dict[str, Any] = {
        "title": "SmolLM2 W4",
        "repository": "someone/smollm2-w4",
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "inherited": {"license": "apache-2.0", "language": ["en"]},
        "format": "compressed-tensors",
        "schemes": ModelSchemes(linears={"a": Scheme(weight=spec), "b": Scheme()}),
        "recipe": {"model": "m", "passes": [{"awq": {"bits": 4}}]},
        "source_bytes": 269_000_000,
        "output_bytes": 112_000_000,
    }
    return CardData(**{**values, **changes})


def python_in(text: str) -> list[str]:
    found = re.findall(r"^(`{3,})python\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    return [code for _, code in found]


def test_the_hub_reads_the_metadata() -> None:
    data = ModelCard(make_card(card())).data
    assert data.license == "apache-2.0" and data.language == ["en"]
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.tags == ["compressed-tensors", "awq", "4-bit", "int4"]


def test_tags_say_what_is_quantized() -> None:
    scheme = Scheme(weight=FP8, input=ActivationSpec("fp8_e4m3", "static"))
    schemes = ModelSchemes(linears={"a": scheme}, kv=KVSpec("fp8_e4m3"))
    found = metadata(card(schemes=schemes, format="modelopt-fp8"))["tags"]
    assert found == ["modelopt-fp8", "awq", "8-bit", "fp8", "a-fp8", "kv-fp8"]
    assert metadata(card(None, format="dense"))["tags"] == ["awq"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "---\nlicense: mit\nlanguage: [en]\ntags: [x]\n---\n# A",
            {"license": "mit", "language": ["en"]},
        ),
        (
            "---\r\nlicense: other\r\nlicense_name: llama2\r\nlicense_link: LICENSE\r\n---\r\n",
            {"license": "other", "license_name": "llama2", "license_link": "LICENSE"},
        ),
        ("\ufeff---\nlicense: mit\n---", {"license": "mit"}),
        ("# no metadata", {}),
        ("---\nlicense: {a: b}\n---\n", {}),
        ("---\n[1, 2]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system [ls]\n---\n", {"license": ["ls"]}),
        ("---\nlicense: ''\nlanguage: []\n---\n", {}),
        ("---\nlicense: null\nlanguage: ~\n---\n", {}),
        ("---\nlanguage: [en, no, sv]\n---\n", {"language": ["en", "no", "sv"]}),
        ("---\nlanguage: no\n---\n", {"language": "no"}),
        ("---\nlicense: !!timestamp x\n---\n", {"license": "x"}),
        ("---" + "\n" * 400_000, {}),
        ("---\nlicense: " + "[" * 30_000 + "\n---\n", {}),
    ],
)
def test_the_licence_is_carried_over(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / CARD_NAME).write_bytes(text.encode())
    assert source_metadata(tmp_path) == expected


def test_a_source_without_a_card_has_no_licence(tmp_path: Path) -> None:
    assert source_metadata(tmp_path) == {}
    (tmp_path / CARD_NAME).write_bytes(b"---\nlicense: \xff\n---\n")
    assert source_metadata(tmp_path) == {}
    text = make_card(card(inherited={}, base_model=None))
    assert "names no licence" in text
    assert not {"license", "base_model"} & set(ModelCard(text).data.to_dict())


def test_the_card_knows_how_every_format_is_loaded() -> None:
    for name in format_names():
        how = loading_of(name)
        assert how.holds
        text = make_card(card(format=name))
        for code in python_in(text):
            ast.parse(code)
        assert bool(python_in(text)) == how.transformers
        assert ("vllm serve someone/smollm2-w4" in text) == how.vllm
    assert "dequantize=True" in make_card(card(ASYMMETRIC))
    assert "dequantize=True" not in make_card(card(INT4))


def test_figures_stand_beside_the_originals() -> None:
    text = make_card(
        card(
            evaluation=EVALUATION, tasks={"arc_easy": {"value": 0.5, "error": 0.01}}, verified=True
        )
    )
    assert "| perplexity | 61.2 ± 2.4 | 54.9 ± 2.1 |" in text
    assert "4,088 tokens in 8 windows of 512" in text
    assert "| arc_easy | 0.500 ± 0.010 |" in text
    assert "compress verify" in text
    assert "## Evaluation" not in make_card(card())
    assert "did not pass" in make_card(card(verified=False))


def test_nothing_breaks_out_of_its_place() -> None:
    evil = 'x"\n---\n```\n# <b>| `'
    data = card(
        title=evil,
        repository=evil,
        base_model=evil,
        inherited={"license": evil},
        recipe={"model": evil, "passes": [{evil: {"note": "````"}}]},
        tasks={evil: {"value": 1.0, "error": 0.1}},
    )
    text = make_card(data)
    read = ModelCard(text).data
    assert (read.base_model, read.license) == (evil, evil)
    for code in python_in(text):
        ast.parse(code)
    recipe = text[text.index("`````yaml\n") + len("`````yaml\n") : text.rindex("`````")]
    assert yaml.safe_load(recipe) == data.recipe


def test_the_card_is_written_where_it_belongs(tmp_path: Path) -> None:
    assert write_card(tmp_path, card())
    path = tmp_path / "README.md"
    assert path.read_text() == make_card(card())
    assert path.stat().st_mode & 0o044 == 0o044


def test_a_card_written_by_hand_stays(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_card(tmp_path, card(title="first"))
    assert write_card(tmp_path, card(title="second")) and "# second" in path.read_text()
    name_repository(tmp_path, "me/there")
    text = path.read_text()
    assert 'name = "me/there"' in text and "vllm serve me/there" in text
    assert is_generated(text.encode()) and is_generated(text.replace("\n", "\r\n").encode())
    path.write_text(text.replace("# second", "# mine"))
    assert not write_card(tmp_path, card(title="third"))
    name_repository(tmp_path, "me/elsewhere")
    assert path.read_text() == text.replace("# second", "# mine")

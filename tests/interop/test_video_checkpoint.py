"""A vision-language checkpoint with 4-bit weights, an 8-bit cache and the sizes of its stream, made
in one run: transformers loads it, and it streams a video."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.attention.token_classes import POLICY_NAME, StreamSizes, read_sizes
from compressor.checkpoint.find import locate
from compressor.checkpoint.manifest import read_manifest
from compressor.checkpoint.source import open_source
from compressor.plan.recipe import make_recipe
from compressor.run.convert import convert
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.verify import verify
from tests.support import video_streams
from tests.support.tiny_models import tokenizer
from tests.support.video_streams import ENDLESS, answer, ask, begin, plainly

pytestmark = pytest.mark.interop

CPU = choose_device("cpu")
SIZES = StreamSizes(sink=3, window=6, text_rounds=2, vision_rounds=3)
CASES = [("qwen2_vl", "tensor"), ("qwen2_5_vl", "head")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[type[nn.Module], Path]:
    """The class of a model, and its checkpoint."""
    pytest.importorskip("compressed_tensors")
    family, scales = request.param
    folder = tmp_path_factory.mktemp(family)
    own = video_streams.model(family, 2)
    own.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    passes = [
        {"streaming_vlm": SIZES.to_json()},
        {"awq": {"bits": 4, "group_size": 32}},
        {"kv_cache": {"element": "int8", "scales": scales}},
    ]
    recipe = make_recipe(
        {
            "model": str(folder / "model"),
            "output": str(folder / "out"),
            "calibration": {"samples": 8, "length": 64},
            "passes": passes,
        }
    )
    return type(own), compile_checkpoint(prepare(recipe, device=CPU)).output


def test_it_streams_as_it_is_written(written: tuple[Any, Path]) -> None:
    """Memory is flat over many rounds, a byte for each number of the cache."""
    family, folder = written
    report, manifest = verify(folder, device=CPU), read_manifest(folder)
    assert report.ok, report.damage
    assert manifest is not None and POLICY_NAME in manifest.files
    sizes = read_sizes(folder)
    assert sizes == SIZES
    stream = begin(family.from_pretrained(folder, dtype=torch.float32).eval(), sizes)
    held = []
    for number in range(30):
        answer(stream, ask(stream, number))
        tensors = [x for layer in stream.cache.layers for x in (layer.keys, layer.values)]
        assert {x.element_size() for x in tensors} == {1}
        assert {x.shape[2] for x in tensors} == {len(stream.state.tokens)}
        held.append(sum(x.nbytes for x in tensors))
    assert max(held[10:]) <= max(held[:10])
    stream.detach()


@torch.no_grad()
def test_it_is_the_plain_model_where_nothing_is_forgotten(
    written: tuple[Any, Path], tmp_path: Path
) -> None:
    """The dense model that the files stand for, keys and values rounded as they leave their
    projections, over the whole text at once."""
    family, folder = written
    stream = begin(family.from_pretrained(folder, dtype=torch.float32).eval(), ENDLESS)
    for number in range(2):
        answer(stream, ask(stream, number))
    found = ask(stream, 2)
    dense = convert(locate(str(folder), fetch=True), tmp_path / "dense", format="dense").output
    stream.detach()
    plain = family.from_pretrained(dense, dtype=torch.float32).eval()
    stream.model = plain
    unrounded = plainly(stream, [0, 1, 2])
    source = open_source(folder)
    for unit, layer in zip(source.layout.blocks, plain.model.language_model.layers, strict=True):
        extra = source.read_unit(unit).extra
        for leaf, name in (("k_proj", "k_scale"), ("v_proj", "v_scale")):
            (scale,) = (tensor for key, tensor in extra.items() if key.endswith(name))
            rounding = rounds(scale)
            getattr(layer.self_attn, leaf).register_forward_hook(rounding)
    whole = plainly(stream, [0, 1, 2])
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    assert (unrounded - whole).abs().max() > 2e-4, "rounding is seen"


def rounds(scale: Tensor) -> Any:
    """What a projection gives, [rows, length, 2 heads of 8], at the steps of an int8 cache."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        codes = (out.unflatten(-1, (2, 8)) / scale.reshape(-1, 1)).round().clamp(-128, 127)
        return (codes * scale.reshape(-1, 1)).flatten(-2)

    return hook

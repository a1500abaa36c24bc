"""Subjects folded in place of their image encoder: the same embeddings, and of this model alone."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.checkpoint.conditions import read_conditions
from compressor.cli.main import cli
from compressor.errors import CompressError
from compressor.numerics.subject_fusion import fuse
from tests.support import tiny_models

DIM, SIZE, LENGTH = 16, 8, 48
TOWER = {
    "hidden_size": DIM,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def build(folder: Path, *, seed: int = 0) -> Path:
    """A tiny CLIP, a fuse module and a piece of a UNet under the published names."""
    from transformers import CLIPConfig, CLIPModel

    text = {**TOWER, "vocab_size": 4096, "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**TOWER, "image_size": SIZE, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)
    torch.manual_seed(seed)
    model = CLIPModel(config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(("vision_model.", "visual_projection.")):
            tensors[f"image_encoder.{name}"] = tensor.clone()
        elif name.startswith("text_model."):
            tensors[f"text_encoder.{name}"] = tensor.clone()
    for mlp, width in (("mlp1", 2 * DIM), ("mlp2", DIM)):
        for leaf, shape in (("layernorm", (width,)), ("fc1", (DIM, width)), ("fc2", (DIM, DIM))):
            path = f"postfuse_module.{mlp}.{leaf}"
            tensors[f"{path}.weight"], tensors[f"{path}.bias"] = (
                torch.randn(shape),
                torch.randn(shape[0]),
            )
    tensors["postfuse_module.layer_norm.weight"] = torch.randn(DIM)
    tensors["postfuse_module.layer_norm.bias"] = torch.randn(DIM)
    tensors["unet.conv_in.weight"] = torch.randn(4, 4, 3, 3)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def compress(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    if isinstance(done.exception, CompressError):
        return done.exception.exit_code, f"{done.exception.message} {done.exception.hint}"
    return done.exit_code, done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fastcomposer") / "model")


def image(folder: Path, name: str, seed: int) -> Path:
    pixels = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    save_file({"pixel_values": pixels}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def unfolded(model: Path, text: str, images: list[Path]) -> tuple[Tensor, Tensor]:
    """Vectors and fused embeddings with the checkpoint's encoder in transformers' whole CLIP."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    tensors = load_file(model / "model.safetensors")
    clip = CLIPModel(CLIPConfig(**json.loads((model / "config.json").read_text()))).eval()
    state = {n.partition(".")[2]: t for n, t in tensors.items() if "_encoder." in n}
    clip.load_state_dict(state, strict=False)
    pixels = torch.stack([load_file(path)["pixel_values"] for path in images])
    tokenizer = AutoTokenizer.from_pretrained(model)
    pieces = [tokenizer(x.strip(), add_special_tokens=False).input_ids for x in text.split("*")]
    ids = [1, *(i for piece in pieces for i in piece), 2]
    places = [sum(map(len, pieces[: k + 1])) for k in range(len(images))]
    row = torch.tensor([ids + [0] * (LENGTH - len(ids))])
    with torch.no_grad():
        vectors = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        plain = clip.text_model(input_ids=row).last_hidden_state
        module = {
            n.removeprefix("postfuse_module."): t for n, t in tensors.items() if "postfuse" in n
        }
        marked = torch.zeros(1, LENGTH, dtype=torch.bool)
        marked[0, places] = True
        fused = fuse(module, plain, vectors[None, :, None], marked, torch.tensor([len(images)]))
    return vectors, fused[0]


def test_folded_embeddings_are_those_of_the_encoder(model: Path, tmp_path: Path) -> None:
    one, two = image(tmp_path, "one", 1), image(tmp_path, "two", 2)
    text = "the man <|image|> and the woman <|image|> at sea"
    options = ("--subject", f"ann={one}", "--subject", f"bob={two}", "--text", text, "--start", 10)
    code, shown = compress("fold", model, tmp_path / "out", *options, "--json")
    assert code == 0, shown
    assert json.loads(shown)["conditions"]["schedule"]["text_steps"] == 11
    found = read_conditions(tmp_path / "out")
    vectors, fused = unfolded(model, text.replace("<|image|>", "*"), [one, two])
    torch.testing.assert_close(found.subject("ann")[0], vectors[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.subject("bob")[0], vectors[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.tensors["text.0.fused"], fused, atol=1e-6, rtol=0)
    before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "out"))
    assert after.keys() == {n for n in before if not n.startswith("image_encoder.")}
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert compress("fold", model, tmp_path / "out", *options)[0] == 0  # finished already
    # Another text with the vectors and what is left of the model, as a pipeline does.
    again = (tmp_path / "again", "--known", tmp_path / "out", "--text", "a cat <|image|>")
    assert compress("fold", model, *again)[0] == 0
    more = read_conditions(tmp_path / "again")
    assert more.record.subjects == ("ann", "bob") and more.record.texts[0].subjects == ("ann",)
    _, fused = unfolded(model, "a cat *", [one])
    torch.testing.assert_close(more.tensors["text.0.fused"], fused, atol=1e-6, rtol=0)


def test_conditions_of_another_encoder_are_refused(model: Path, tmp_path: Path) -> None:
    one = image(tmp_path, "one", 1)
    assert compress("fold", model, tmp_path / "out", "--subject", f"a={one}")[0] == 0
    other = build(tmp_path / "other", seed=1)
    code, said = compress("fold", other, tmp_path / "no", "--known", tmp_path / "out")
    assert code == 2 and "made with another encoder" in said
    assert not (tmp_path / "no").exists()
    # Of the same encoder under another config, and with another fuse module.
    tensors = load_file(model / "model.safetensors")
    tensors["postfuse_module.layer_norm.bias"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    code, said = compress("fold", other, tmp_path / "no", "--known", tmp_path / "out")
    assert code == 2 and "made with another fuse module" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--subject", "a=nowhere.png"], "no image nowhere.png"),
        ([], "no subject is named"),
        (["--subject", "a=ONE", "--encoder", "vision"], "nothing under vision."),
        (["--subject", "a=ONE", "--text", "no one"], "marks 0 words"),
        (["--subject", "a=ONE", "--text", "a <|image|> b <|image|>"], "marks 2 words"),
        (["--subject", "a=ONE", "--text", "<|image|> man"], "behind no word"),
        (["--subject", "a=ONE", "--text", "man <|image|>" + " word" * 30], "positions"),
        (["--subject", "a=BAD"], "no pixel_values [3, 8, 8]"),
    ],
)
def test_what_cannot_be_folded_says_why(
    options: list[str], said: str, model: Path, tmp_path: Path
) -> None:
    one = image(tmp_path, "one", 1)
    save_file({"pixel_values": torch.ones(3, 4, 4)}, tmp_path / "bad.safetensors")
    files = {"ONE": str(one), "BAD": str(tmp_path / "bad.safetensors")}
    words = [w.replace("ONE", files["ONE"]).replace("BAD", files["BAD"]) for w in options]
    code, shown = compress("fold", model, tmp_path / "out", *words)
    assert code == 2 and said in shown
    assert not (tmp_path / "out").exists()


def test_an_image_is_read_as_clip_takes_it(model: Path, tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    values = torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8)
    pil.fromarray(values.numpy()).save(tmp_path / "a.png")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    pixels = (values.permute(2, 0, 1) / 255 - mean) / std
    save_file({"pixel_values": pixels.contiguous()}, tmp_path / "b.safetensors")
    subjects = ("--subject", f"a={tmp_path}/a.png", "--subject", f"b={tmp_path}/b.safetensors")
    assert compress("fold", model, tmp_path / "out", *subjects)[0] == 0
    found = read_conditions(tmp_path / "out")
    torch.testing.assert_close(found.subject("a"), found.subject("b"), atol=1e-5, rtol=1e-4)
    (tmp_path / "c.png").write_bytes(b"no image")
    code, said = compress("fold", model, tmp_path / "no", "--subject", f"c={tmp_path}/c.png")
    assert code == 2 and "no image that can be read" in said

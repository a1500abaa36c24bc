"""What goes along with the weights: everything that a loader or a licence needs, and nothing from
outside; the rest is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint.find import locate, name_folder
from compressor.checkpoint.lfs import POINTER
from compressor.checkpoint.reader import open_checkpoint
from compressor.checkpoint.side_files import side_files
from compressor.errors import InputError, Problems
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, prepare

CARRIED = [
    *("tokenizer.json", "tokenizer_config.json", "Tokenizer.model", "tekken.json", "qwen.tiktoken"),
    *("vocab.json", "vocab.txt", "merges.txt", "source.spm", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "extra.jinja"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json"),
    *("LICENSE", "License.txt", "LICENCE.md", "Notice", "USE_POLICY.md", "licenses/MIT.txt"),
    *("COPYING", "Acceptable_Use_Policy.md", "gemma_terms_of_use.txt", "attention_policy.json"),
]
LEFT = {
    "consolidated.safetensors": "weights that are not read",
    "pytorch_model.bin": "weights that are not read",
    "original/": "a folder",
    "setup.py": "code that no config names",
    "params.json": "not known to be needed",
    "figure.png": "not known to be needed",
}
OURS = ["config.json", "README.md", "model.safetensors", "report.html", ".gitattributes", ".env"]


def put(folder: Path, *names: str, data: bytes = b"{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_every_file_is_carried_or_named(tmp_path: Path) -> None:
    put(tmp_path, *CARRIED, *OURS, *(n for n in LEFT if not n.endswith("/")), "original/x.pth")
    found = side_files(tmp_path)
    assert found.carried == tuple(sorted(CARRIED)) and dict(found.left) == LEFT
    assert "left behind, weights that are not read: consolidated.safetensors, pytorch" in str(
        found.notes
    )


def with_code(folder: Path) -> None:
    """A checkpoint whose configs name code, which imports other code."""
    config = json.loads((folder / "config.json").read_bytes())
    names = {"AutoConfig": "configuration_x.X", "AutoModel": "org/other--modeling_y.Y"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    tokens = json.loads((folder / "tokenizer_config.json").read_bytes())
    tokens["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    put(folder, "configuration_x.py", data=b"from .shared.names import A\nfrom . import extra\n")
    put(folder, "shared/names.py", data=b"from ..deep import B\nfrom ...outside import C\n")
    put(folder, "shared/__init__.py", "deep.py", "extra.py", "unused.py", data=b"import os\n")


CODE = ("configuration_x.py", "deep.py", "extra.py", "shared/__init__.py", "shared/names.py")


def test_code_that_configs_name_is_carried_with_what_it_imports(tmp_path: Path) -> None:
    put(tmp_path, "config.json", "tokenizer_config.json")
    with_code(tmp_path)
    found = side_files(tmp_path)
    assert found.code == CODE
    assert found.left == {
        "org/other: modeling_y.py": "code of another repository",
        "tokenization_x.py": "named by auto_map, but not there to be read",
        "unused.py": "code that no config names",
    }
    assert any("trust_remote_code" in note for note in found.notes)


@pytest.mark.parametrize("inside", [True, False])
def test_links_are_followed_only_inside(inside: bool, tmp_path: Path) -> None:
    folder, secret = tmp_path / "m", tmp_path / "secret"
    put(tmp_path, "secret/LICENSE", "secret/templates/x.jinja", data=b"PRIVATE")
    put(folder, "LICENSE.txt")
    (folder / "LICENSE").symlink_to(folder / "LICENSE.txt" if inside else secret / "LICENSE")
    (folder / "chat_templates").symlink_to(secret / "templates")
    (folder / "NOTICE").symlink_to(tmp_path / "nowhere")
    found = side_files(folder)
    assert ("LICENSE" in found.carried) == inside
    assert found.left["chat_templates"] == "a link that leads out of the folder"
    assert "NOTICE" in found.left and not any("x.jinja" in name for name in found.carried)
    assert ("LICENSE" in found.left) != inside


def test_a_snapshot_of_the_cache_is_read_and_has_a_name(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--tiny-x" / "snapshots" / commit
    put(tmp_path / "models--org--tiny-x" / "blobs", "aa", data=b"licence")
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/aa")
    assert side_files(snapshot).carried == ("LICENSE",)
    assert name_folder(snapshot) == {"name": "org/tiny-x", "revision": commit}
    assert name_folder(tmp_path / "models--org--tiny-x" / "blobs") == {"name": "blobs"}


def test_pointers_are_refused_by_name(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    pointer = POINTER + b"v1\noid sha256:00\nsize 9\n"
    put(tmp_path, "tokenizer.json", data=pointer)
    assert [p.message for p in side_files(tmp_path).problems] == [
        "tokenizer.json is a Git LFS pointer, not the file itself"
    ]
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        shutil.copytree(tiny_model("llama"), folder)
        put(folder, name, data=pointer)
        with pytest.raises((InputError, Problems), match=f"{name} is a Git LFS pointer") as caught:
            locate(str(folder), fetch=False)
        assert "git lfs pull" in (caught.value.hint or "")
    put(tmp_path, "model.gguf", data=pointer)
    with pytest.raises(InputError, match=r"model\.gguf is a Git LFS pointer"):
        locate(str(tmp_path / "model.gguf"), fetch=False)


def test_of_a_repository_only_what_is_needed_comes(
    hub: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model("llama"), folder)
    put(folder, *(n for n in LEFT if not n.endswith("/")), "original/x.safetensors", "License.txt")
    with_code(folder)
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    hub.create("me/m", files)
    located = locate("me/m", fetch=True)
    there = located.source.checkpoint.folder
    came = {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()}
    expected = side_files(folder)
    assert came == {"config.json", "model.safetensors", *expected.carried}
    assert set(CODE) < came
    assert located.beside == expected
    assert side_files(there).carried == expected.carried
    planned = locate("me/m", fetch=False).beside
    assert set(planned.left) >= set(LEFT)


def test_links_to_nothing_are_named(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """A snapshot of the Hub's cache that was copied without its blobs."""
    model, folder = tiny_model("llama"), tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for path in model.iterdir():
        (folder / path.name).symlink_to(Path("../../blobs") / path.name)
    for name in (*sorted(path.name for path in model.iterdir()), None):
        with pytest.raises(InputError, match=r"config.json|model.safetensors") as caught:
            open_checkpoint(folder)
        assert "is a link to ../../blobs/" in (caught.value.hint or "")
        assert "cp -rL" in (caught.value.hint or "")
        if name == "model.safetensors":
            return
        (folder / str(name)).unlink()
        shutil.copy(model / str(name), folder)


def test_room_is_made_for_what_goes_along(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    told = {"model": str(model), "output": str(tmp_path / "out")}
    recipe = make_recipe({**told, "passes": [{"rtn": {"group_size": 32}}]})
    size = prepare(recipe, device=choose_device("cpu")).plan.shards.size
    usage = type(shutil.disk_usage(tmp_path))(0, 0, 2 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    prepare(recipe, device=choose_device("cpu"))
    (model / "tokenizer.model").write_bytes(bytes(size))
    with pytest.raises(InputError, match="the checkpoint takes"):
        prepare(recipe, device=choose_device("cpu"))

"""Which files of a checkpoint folder travel with its weights: what loaders read beside them
(tokenizers of all kinds, templates, processors, the Python files that configs name), and what
their licence asks for. Everything else stays behind, and is named.

Nothing here runs code. A link that leads out of the folder is not followed, unless it is one of
the Hub cache's own.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from compressor.checkpoint.lfs import is_pointer, pointer_error
from compressor.checkpoint.reader import DIFFUSION, POLICY_TENSORS, STEM, index_name
from compressor.errors import InputError, several
from compressor.foreign.untrusted import parse_json

CARRIED = (
    # tokenizers
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes", "normalizer.json"),
    # chat templates, processors, generation
    *("chat_template*", "*.jinja", "*processor*.json", "feature_extract*.json"),
    "generation_config*.json",
    # licences and notices
    *("*licen[cs]e*", "*notice*", "*copying*", "*copyright*", "*policy*", "*terms*of*"),
    *("*agreement*", "authors*", "patents*", "attribution*"),
)
"""Patterns of names in lower case; the case of a file's name does not matter."""
FOLDERS = ("*chat_template*", "custom_generate", "licen[cs]es")
"""Folders whose files travel too."""
DECIDING = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map*",
    "added_tokens*",
    "*vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config*",
    "*processor*.json",
)
"""Files that loaders take from a checkpoint's folder because they are there."""
CODE = (".py", ".pyc", ".so", ".sh")
"""Never carried by name, only where a config names the module."""
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"),
    *(".ot", ".npz", ".index.json"),
)
OWN = (
    *("config.json", "readme.md", "manifest.json", "recipe.yaml", "report.json", "report.html"),
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
)
"""What is written anew beside the weights, or not at all."""
CONFIGS = (
    *("config.json", "tokenizer_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)
"""Files in which `auto_map` may name Python files."""

LARGEST = 1 << 29
"""Bytes of a file that still goes with the weights."""
MOST = 10_000
"""Entries of one folder that are looked at."""

IMPORT = re.compile(rb"^[ \t]*from[ \t]+(\.[\w.]*)[ \t]+import[ \t]+([^\n#]{1,2000})", re.MULTILINE)
MODULE = re.compile(r"(?:(?P<repo>[^\s-]\S*?)--)?(?P<module>\w+(?:\.\w+)*)\.\w+")

Read = Callable[[str], bytes | None]


@dataclass(frozen=True, slots=True)
class SideFiles:
    """What goes with the weights of a folder, and what does not.

    carried  paths in the folder, with `/`;  left  path → why it stays behind
    code     those of `carried` that are Python;  pointers  files that stand for others
    """

    carried: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    pointers: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a plan and a report say of it."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        found = [f"left behind, {why}: {_few(names)}" for why, names in reasons.items()]
        if self.code:
            found.append(
                f"code of the source goes along, unread: {_few(self.code)}; loaders run it only "
                "with trust_remote_code"
            )
        return tuple(found)

    def size(self, folder: Path) -> int:
        """Bytes of what goes along, as far as it is in a folder."""
        there = (folder / name for name in self.carried)
        return sum(path.stat().st_size for path in there if path.is_file())

    @property
    def problems(self) -> list[InputError]:
        """What has to be mended before a run."""
        return [pointer_error(name) for name in self.pointers]


def side_files(folder: Path) -> SideFiles:
    """The side files of a checkpoint folder on this machine."""
    here: dict[str, Path] = {}
    left: dict[str, str] = {}
    for path in _entries(folder):
        if path.is_dir() and not path.is_symlink():
            if not _matches(path.name, FOLDERS):
                left[f"{path.name}/"] = "a folder"
                continue
            here |= {f"{path.name}/{inner.name}": inner for inner in _entries(path)}
        else:
            here[path.name] = path

    def read(name: str) -> bytes | None:
        path = here.get(name, folder / name)
        return path.read_bytes() if _obstacle(folder, path) is None else None

    found = select(here, read=read)
    tops = {f"{name.partition('/')[0]}/" for name in found.carried}
    left = dict(found.left) | {name: why for name, why in left.items() if name not in tops}
    carried = []
    for name in found.carried:
        obstacle = _obstacle(folder, here.get(name, folder / name))
        if obstacle is None:
            carried.append(name)
        else:
            left[name] = obstacle
    return SideFiles(
        carried=tuple(carried),
        left=dict(sorted(left.items())),
        code=tuple(name for name in found.code if name in carried),
        pointers=tuple(n for n in carried if is_pointer(here.get(n, folder / n))),
    )


def select(names: Iterable[str], *, read: Read) -> SideFiles:
    """The side files among the paths of a folder or repository.

    read  the content of one of them, or None where it cannot be read
    """
    names = sorted(names)
    shards = shard_names(read)
    code, left = _code(names, read)
    carried = set(code)
    folders = {f"{n.partition('/')[0]}/" for n in names if "/" in n and n not in code}
    of_code = {f"{n.partition('/')[0]}/" for n in code if "/" in n}
    for folder in folders - of_code:
        if not _matches(folder[:-1], FOLDERS):
            left[folder] = "a folder"
    for name in names:
        top, _, rest = name.partition("/")
        base = (rest or top).lower()
        if name in carried or base.startswith(".") or f"{top}/" in left or base in OWN:
            continue
        if base.endswith(WEIGHTS) and base != POLICY_TENSORS:
            if name not in shards:
                left[name] = "weights that are not read"
        elif base.endswith(CODE):
            left[name] = "code that no config names"
        elif _matches(top, FOLDERS) if rest else _matches(base, CARRIED):
            carried.add(name)
        else:
            left[name] = "not known to be needed"
    return SideFiles(carried=tuple(sorted(carried)), left=left, code=tuple(sorted(code)))


def leads_out(folder: Path, path: Path) -> bool:
    """Whether a path of a folder is, or goes through, a link to something outside. Links of the
    Hub's cache lead to `blobs` beside its `snapshots`, and belong to it."""
    try:
        target, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):
        return True
    if target.is_relative_to(root):
        return False
    blobs = root.parent.parent / "blobs"
    return not (root.parent.name == "snapshots" and target.is_relative_to(blobs))


def _obstacle(folder: Path, path: Path) -> str | None:
    """Why a file of the folder cannot be carried."""
    if leads_out(folder, path):
        return "a link that leads out of the folder" if path.is_symlink() else "not there"
    if not path.is_file():
        return "no file"
    return None if path.stat().st_size <= LARGEST else "too large for a side file"


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, hidden entries left out."""
    found = []
    for path in folder.iterdir():
        if not path.name.startswith((".", "__pycache__")):
            found.append(path)
        if len(found) > MOST:
            raise InputError(
                f"{folder} holds more than {MOST} files",
                hint="name a folder that holds one checkpoint and nothing else",
            )
    return sorted(found)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def decides(name: str) -> bool:
    """Whether loaders take a file for a part of the model because it is there."""
    return _matches(name, DECIDING)


def shard_names(read: Read) -> set[str]:
    """Files that hold the checkpoint itself, by its index."""
    found = set()
    for stem in (STEM, DIFFUSION):
        index = _json(read(index_name(stem))).get("weight_map")
        found |= set(map(str, index.values())) if isinstance(index, dict) else set()
        found |= {f"{stem}.safetensors", index_name(stem)}
    return found


def _code(names: Iterable[str], read: Read) -> tuple[set[str], dict[str, str]]:
    """Python files that the configs name, and those that they import; and what is not there."""
    queue, left = [], {}
    for config in CONFIGS:
        for reference in _references(_json(read(config))):
            named = MODULE.fullmatch(reference)
            if named is None:
                continue
            if named["repo"]:
                left[f"{named['repo']}: {named['module']}.py"] = "code of another repository"
            else:
                queue.append(named["module"].replace(".", "/") + ".py")
    queue += [name for name in names if re.fullmatch(r"custom_generate/\w+\.py", name)]
    found: set[str] = set()
    while queue and len(found) < MOST:
        name = queue.pop()
        if name in found or name in left:
            continue
        data = read(name)
        if data is None:
            left[name] = "named by auto_map, but not there to be read"
            continue
        found.add(name)
        queue += [n for n in _imports(name, data) if n not in found and read(n) is not None]
    return found, left


def _references(config: Mapping[str, Any]) -> list[str]:
    """Classes in Python files that a config names: `module.Class`, `repository--module.Class`."""
    maps = config.get("auto_map")
    found: list[Any] = list(maps.values()) if isinstance(maps, dict) else [maps]
    pipelines = config.get("custom_pipelines")
    if isinstance(pipelines, dict):
        found += [entry.get("impl") for entry in pipelines.values() if isinstance(entry, dict)]
    flat = [v for entry in found for v in (entry if isinstance(entry, list) else [entry])]
    return [value for value in flat if isinstance(value, str) and len(value) < 300]


def _imports(name: str, data: bytes) -> list[str]:
    """Files that a Python file's relative imports may mean."""
    found = []
    for module, imported in IMPORT.findall(data):
        dots = len(module) - len(module.lstrip(b"."))
        folder = PurePosixPath(name).parents
        if dots > len(folder):
            continue
        parts = [part for part in module.lstrip(b".").decode(errors="replace").split(".") if part]
        path = folder[dots - 1].joinpath(*parts)
        inner = re.findall(r"\w+", imported.decode(errors="replace"))
        found += [f"{path}.py"] if parts else []
        found += [str(package / "__init__.py") for package in (path, *path.parents[:-1])]
        found += [str(path / f"{entry}.py") for entry in inner]
    return [entry for entry in dict.fromkeys(found) if not entry.startswith("../")]


def _json(data: bytes | None) -> dict[str, Any]:
    """An object from a file that may be anything."""
    try:
        value = parse_json(data or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _few(names: Iterable[str]) -> str:
    """Some names, and how many more there are; untrusted, so as they print."""
    return several([name if name.isprintable() else ascii(name) for name in names], 8)

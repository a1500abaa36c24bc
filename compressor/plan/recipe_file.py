"""A recipe's YAML file, and on which line each of its keys stands."""

from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compressor.errors import CompressError, InputError
from compressor.foreign.bounded_yaml import MAX_BYTES, line_of, load_yaml
from compressor.foreign.untrusted import read_stream
from compressor.plan.explain import WrongKey


class Written(dict[str, Any]):
    """The mapping of a file, which can say where a key stands in it."""

    def __init__(self, data: Mapping[str, Any], *, name: str, text: str) -> None:
        super().__init__(data)
        self._name, self._text = name, text
        self._replaced: list[str] = []

    def replace(self, overrides: Sequence[str], top: Mapping[str, Any]) -> None:
        """Set `key.path=value` (YAML values), and keys at the top that are not None."""
        for override in overrides:
            apply_override(self, override)
        given = {key: value for key, value in top.items() if value is not None}
        self.update(given)
        self._replaced += [override.partition("=")[0] for override in overrides]
        self._replaced += given

    def located(self, problem: CompressError) -> CompressError:
        """The problem with file and line, if what is wrong stands in the file."""
        if not isinstance(problem, WrongKey) or self._is_replaced(problem.place):
            return problem
        line = line_of(self._text, problem.place.split("."))
        where = self._name if line is None else f"{self._name}, line {line}"
        return InputError(f"{where}: {problem.message}", hint=problem.hint)

    def _is_replaced(self, place: str) -> bool:
        """Of a pass, --set may have the name where the place has its number."""
        if any(f"{place}.".startswith(f"{path}.") for path in self._replaced):
            return True
        passes = place.split(".")[0] == "passes"
        return passes and any(path.split(".")[0] == "passes" for path in self._replaced)


def read_recipe(path: Path) -> Written:
    """The YAML mapping of a recipe file. Raises InputError."""
    try:
        text = read_stream(path, what="recipe", most=MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read recipe {path}: it is not UTF-8 ({error})") from error
    except InputError as error:
        raise InputError(error.message, hint=error.hint or _instead(path)) from error
    return Written(parse_yaml(text, where=path.name), name=path.name, text=text)


def _instead(path: Path) -> str | None:
    """What to type where a path is no recipe."""
    if path.is_dir():
        return f"a model without a recipe: compress quantize {path} --scheme w4a16"
    if path.stem in shipped():
        return f"it comes with the program: compress recipes {path.stem} -o {path.stem}.yaml"
    return None if path.exists() else "compress recipes lists those that come with the program"


def shipped() -> dict[str, Traversable]:
    """The recipes that come with the program, by name; in a source tree that is not installed they
    lie beside the package."""
    inside = find_spec("compressor.recipes") is not None
    folder: Traversable = (
        resources.files("compressor.recipes") if inside else Path(__file__).parents[2] / "recipes"
    )
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(".yaml"): f for f in files if f.name.endswith(".yaml")}


def parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    """A YAML mapping, loaded safely, with duplicate keys refused."""
    try:
        value = load_yaml(text)
    except ValueError as error:
        shown = str(error).replace('"<unicode string>"', where)
        raise InputError(
            f"{where} is not valid YAML: {shown}",
            hint="indent with spaces; quote text that holds ': ' or begins with a sign",
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a mapping of recipe keys", hint="see: compress recipes")
    return value


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `key.path=value`; a list index or a pass name is a path element too."""
    path, separator, raw = override.partition("=")
    if not separator:
        raise InputError(f"--set {override!r} has no '='", hint="--set calibration.samples=64")
    *parents, last = path.split(".")
    node: Any = data
    for key in parents:
        node = _step_into(node, key, override)
    if isinstance(node, list):
        raise InputError(f"--set {override!r} ends at a list entry")
    try:
        node[last] = load_yaml(raw)
    except ValueError as error:
        raise InputError(f"--set {override!r}: the value is not YAML") from error


def _step_into(node: Any, key: str, override: str) -> Any:
    if isinstance(node, dict):
        found = node.setdefault(key, {})
        if found is None:
            found = node[key] = {}
    elif isinstance(node, list):
        named = [entry for entry in node if isinstance(entry, dict) and key in entry]
        if key.isdigit() and int(key) < len(node):
            found = node[int(key)]
        elif len(named) == 1:
            found = named[0][key] = named[0][key] or {}
        else:
            raise InputError(f"--set {override!r}: {key!r} names no single pass of this recipe")
    else:
        found = None
    if not isinstance(found, (dict, list)):
        raise InputError(f"--set {override!r}: {key!r} is not a group of keys")
    return found

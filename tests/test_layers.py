"""The shape of the code itself: imports point one way, leaves stay leaves, files stay small."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOMES = {
    "compressor": ROOT / "compressor",
    "compressor_kernels": ROOT / "kernels" / "compressor_kernels",
    "compressor_calibration": ROOT / "calibration" / "compressor_calibration",
}
LEVELS = {
    **dict.fromkeys(("compressor_kernels", "errors"), 0),
    **dict.fromkeys(("compressor_calibration", "ir", "foreign", "ranks"), 1),
    **dict.fromkeys(("arch", "numerics", "formats"), 2),
    **dict.fromkeys(("checkpoint", "runtimes"), 3),
    "runner": 4,
    **dict.fromkeys(("attention", "audit"), 5),
    **dict.fromkeys(("evaluate", "methods", "report"), 6),
    **dict.fromkeys(("plan", "verify"), 7),
    "run": 8,
    "cli": 9,
    "__main__": 10,
}
"""A package imports only those on lower levels, and none beside it."""
MAX_LINES = 400


def modules() -> dict[str, Path]:
    found = {}
    for home, folder in HOMES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([home, *(p for p in parts if p != "__init__")])] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def imports(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def package(module: str) -> str:
    home, _, rest = module.partition(".")
    return rest.partition(".")[0] if home == "compressor" and rest else home


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_point_one_way() -> None:
    known = modules()
    assert not [
        f"{module} imports {name}"
        for module, path in known.items()
        for name in sorted(imports(path) & known.keys() - {"compressor"})
        if package(name) != package(module) and LEVELS[package(name)] >= LEVELS[package(module)]
    ]


def test_the_second_reader_shares_no_code_with_the_first() -> None:
    theirs = re.compile(r"compressor\.formats\.(\w+\.)?second_reader(\.\w+)*")
    readers = {m: path for m, path in modules().items() if theirs.fullmatch(m)}
    assert {m.split(".")[2] for m in readers} > {"gptq", "bitdelta", "second_reader"}
    assert not [
        f"{module} imports {name}"
        for module, path in readers.items()
        for name in sorted(imports(path))
        if package(name) in ("formats", "ir", "numerics") and not theirs.fullmatch(name)
    ]


def test_only_what_runs_models_imports_transformers() -> None:
    runners = ("compressor.runner", "compressor.attention.serve", "compressor.evaluate.harness")
    assert not [
        module
        for module, path in modules().items()
        if any(under(name, "transformers") for name in imports(path))
        and not any(under(module, runner) for runner in runners)
    ]


PRINTERS = {
    "compressor.cli.echo.echo",
    "compressor.cli.display._print",
    "compressor.cli.display._safe",
    "compressor.cli.display._line",
    "compressor.cli.main.ask",  # in a signal's handler, and no word of anybody else
    "compressor.foreign.calls.panics_unheard",
    "compressor.ranks.watch._end",  # just before the process ends, from a thread
}
"""All that write to a terminal; each makes escapes of control characters."""


def prints(call: ast.Call) -> bool:
    """Whether this writes to a terminal, or makes text that rich does not escape."""
    name = ast.unparse(call.func)
    return name in ("print", "Text", "input", "os.write") or bool(
        re.fullmatch(
            r"(click|rich)\.(echo|secho|confirm|prompt|print|echo_via_pager)|Text\.\w+"
            r"|(.*\.)?console\.\w+|sys\.std(out|err)\.(write|writelines)",
            name,
        )
    )


def test_what_is_printed_goes_through_what_escapes_it() -> None:
    found = set()
    for module, path in modules().items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(inner, ast.Call) and prints(inner) for inner in ast.walk(node)
            ):
                found.add(f"{module}.{node.name}")
    assert found - {"compressor.cli.main.interruptible"} == PRINTERS


def test_help_waits_for_no_library() -> None:
    """PyTorch alone takes two seconds to import."""
    names = [module for module in modules() if under(module, "compressor.cli.commands")]
    loads = "".join(f"import {name}\n" for name in ["compressor.cli.main", *names])
    heavy = "{'torch', 'numpy', 'transformers', 'datasets', 'pydantic', 'huggingface_hub'}"
    check = f"import sys\n{loads}assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_files_stay_readable() -> None:
    assert not [
        f"{module}: {lines} lines"
        for module, path in modules().items()
        if (lines := len(path.read_text("utf-8").splitlines())) > MAX_LINES
    ]


def test_the_folders_of_leaves_are_no_packages() -> None:
    """A package named `kernels` would hide the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "calibration" / "__init__.py").exists()


def test_the_architecture_page_lists_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    listed, folders = [], [""]
    for line in re.findall(r"```text\n(compressor/.*?)```", page, re.DOTALL)[0].splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders = [*folders[: depth + 1], *([folders[depth] + name] if name[-1] == "/" else [])]
        if name.endswith(".py"):
            listed.append(folders[depth] + name)
    here = {
        path.relative_to(ROOT).as_posix()
        for path in modules().values()
        if path.name != "__init__.py" or len(path.read_text("utf-8").splitlines()) > 20
    }
    assert sorted(listed) == sorted(here)

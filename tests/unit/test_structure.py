"""The shape of the code itself: imports point one way, files stay small, leaves stay leaves."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "compressor": ROOT / "compressor",
    "compressor_kernels": ROOT / "kernels" / "compressor_kernels",
    "compressor_calibration": ROOT / "calibration" / "compressor_calibration",
}
MAX_LINES = 400

# What a package of ours may not import, beside what the leaves may not.
FORBIDDEN = {
    "compressor.passes": ("compressor.formats", "compressor.job", "compressor.plan"),
    "compressor.formats": (
        "compressor.passes",
        "compressor.numerics",
        "compressor.plan",
        "compressor.job",
        "compressor.checkpoint",
    ),
    "compressor.numerics": ("compressor.passes", "compressor.formats", "compressor.plan"),
    "compressor.qtensor": ("compressor.formats", "compressor.passes", "compressor.layout"),
    "compressor.layout": ("compressor.formats", "compressor.passes", "compressor.qtensor"),
    "compressor.arch": ("compressor.passes", "compressor.formats", "compressor.plan"),
    "compressor.plan": ("compressor.job", "compressor.runner", "compressor.compile"),
    "compressor.job": ("compressor.compile", "compressor.verdict"),
    "compressor.independent": ("compressor.formats", "compressor.numerics", "compressor.qtensor"),
    "compressor.independent_arrays": ("compressor",),
}
RUNNERS = (
    "compressor.runner",
    "compressor.tokenizer",
    "compressor.attention_runtime",
    "compressor.harness",
)


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_point_one_way() -> None:
    wrong = []
    for module, path in modules().items():
        for name in imports(path):
            for package, forbidden in FORBIDDEN.items():
                if under(module, package) and any(under(name, f) for f in forbidden):
                    wrong.append(f"{module} imports {name}")
            if (
                module != "compressor.__main__"
                and not under(module, "compressor.cli")
                and under(name, "compressor.cli")
            ):
                wrong.append(f"{module} imports {name}")
            if not under(module, "compressor") and under(name, "compressor"):
                wrong.append(f"the leaf {module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_the_runners_import_transformers() -> None:
    users = [
        module
        for module, path in modules().items()
        if any(under(name, "transformers") for name in imports(path))
        and not any(under(module, runner) for runner in RUNNERS)
    ]
    assert not users


def test_every_rename_is_followed_by_a_sync() -> None:
    """`durable.move` renames and syncs the folders; nothing else renames."""
    renames = ("os.replace(", "os.rename(", "shutil.move(", ".rename(")
    wrong = [
        module
        for module, path in modules().items()
        if module != "compressor.durable"
        and any(call in path.read_text("utf-8") for call in renames)
    ]
    assert not wrong


def test_files_stay_readable() -> None:
    long = [
        f"{module}: {lines} lines"
        for module, path in modules().items()
        if (lines := len(path.read_text("utf-8").splitlines())) > MAX_LINES
    ]
    assert not long


def test_the_folders_of_leaves_are_no_packages() -> None:
    """A package named `kernels` would hide the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "calibration" / "__init__.py").exists()

"""The documentation says what is: generated pages, links, messages and tables follow the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from compressor.passes.base import pass_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])


def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "recipe.md"])
def test_reference_pages_follow_the_code(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == make_docs().pages()[name], (
        f"docs/{name} is out of date: python scripts/make_docs.py"
    )


def test_every_pass_has_a_page() -> None:
    written = {path.stem for path in (DOCS / "methods").glob("*.md")}
    missing = sorted(set(pass_names()) - written)
    assert not missing, f"docs/methods/ lacks {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text)
    # A method's page is missed by its own test.
    local = [t for t in targets if "://" not in t and not t.startswith("methods/")]
    assert not [target for target in local if not (page.parent / target).exists()]

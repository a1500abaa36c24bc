"""The documentation says what is: generated pages, links, messages and tables follow the code."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import Problems
from compressor.formats.base import format_names
from compressor.formats.loading import loading_of
from compressor.methods.base import pass_names
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.runtimes.contract import load_contract
from tests.support.scripts import load

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])


@pytest.mark.parametrize("name", ["cli.md", "recipe.md", "formats.md"])
def test_reference_pages_follow_the_code(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == load("scripts/make_docs.py").pages()[name], (
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


ERRORS = {"InputError", "MachineError", "CheckError", "DataError", "WrongKey"}


def template(node: ast.expr) -> str:
    """A message with … for what differs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


def messages() -> Iterator[str]:
    """Every error message of the program."""
    for package in ("compressor", "calibration"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                if not named:
                    continue
                if node.func.id in ERRORS and node.args:
                    yield re.sub("…+", "…", template(node.args[0]))
                # What begins the message of a library's error.
                if node.func.id == "foreign":
                    yield f"{template(node.args[0])}: …"
                if node.func.id == "disk_errors":
                    yield f"{template(node.args[0])} failed: …"
                if node.func.id == "bounded":
                    what = next(k.value for k in node.keywords if k.arg == "what")
                    yield f"{template(what)}: …"


# A base on the Hub, blocks that a model of two does not have, and a row of calibration tokens too
# short for the blocks that are chosen.
ELSEWHERE = ("bitdelta", "emulator", "sparda")


def test_recipes_that_pages_of_methods_show_can_be_planned(
    tiny_models: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 65536}
    model = tiny_models.build("llama", tmp_path / "m", **sizes)
    source, planned = open_source(model), []
    for page in sorted((DOCS / "methods").glob("*.md")):
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            shown = yaml.safe_load(block)
            if page.stem in ELSEWHERE or "passes" not in shown:
                continue
            keys = ("passes", "format", "untie", "calibration")
            data = {key: value for key, value in shown.items() if key in keys}
            try:
                make_plan(make_recipe({**data, "model": str(model), "output": "o"}), source)
            except Problems as error:
                pytest.fail(f"{page.name}: {error.problems[0].message}")
            planned.append(page.stem)
    assert set(planned) >= {"awq", "gptq", "kv_cache", "nvfp4", "qoq", "smooth_attention"}


def test_every_message_that_is_explained_is_said() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    explained = re.findall(r"^### `(.*)`$", page, flags=re.MULTILINE)
    assert len(explained) == len(set(explained)) >= 30
    security = (DOCS / "security.md").read_text("utf-8").partition("| message |")[2]
    tabled = re.findall(r"^\| `(.*?)` \|", security, flags=re.MULTILINE)
    assert len(tabled) >= 5
    unsaid = sorted({*explained, *tabled} - set(messages()))
    assert not unsaid, "the pages explain what no longer is said: " + str(unsaid)


def test_the_page_of_formats_is_whole_and_says_what_cards_say() -> None:
    page = (DOCS / "formats.md").read_text("utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    assert {row[1].strip() for row in rows} >= set(format_names())
    for name in format_names():
        how = loading_of(name)
        for runtime, loads in (("vllm", how.vllm), ("transformers", how.transformers)):
            assert loads == any(name in x.formats for x in load_contract(runtime).loads), name


def commands() -> Iterator[tuple[str, str]]:
    """Command lines in code blocks of the documentation, and of the example for pipelines."""
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                yield page.name, line
    example = yaml.safe_load((DOCS / "examples" / "github-actions.yml").read_text("utf-8"))
    for job in example["jobs"].values():
        for step in job["steps"]:
            for line in str(step.get("run", "")).replace("\\\n", " ").splitlines():
                yield "github-actions.yml", line


def test_commands_that_are_shown_exist_with_their_options() -> None:
    seen = 0
    context = click.Context(cli, info_name="compress")
    for page, line in commands():
        words = shlex.split(line, comments=True)
        if not words or words[0] != "compress":
            continue
        seen += 1
        command: click.Command | None = cli
        while isinstance(command, click.Group) and len(words) > 1 and words[1][0] != "-":
            command = command.get_command(context, words.pop(1))
        assert command is not None, f"{page}: {line}"
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        used = {word.split("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
        assert used <= known | {"--help", "-h", "--version"}, f"{page}: {line}"
    assert seen >= 5


def test_scripts_that_are_shown_exist_with_their_options() -> None:
    measure, bench, seen = load("scripts/measure/run.py"), load("scripts/bench/run.py"), 0
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        shown = r"(?<!:)\b(scripts/[\w/]+\.py)([^`\n]*(?:\n[^`\n]+)*)"
        for script, rest in re.findall(shown, text):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"
            name, *words = rest.split() or [""]
            if script == "scripts/measure/run.py":
                known = measure.parser()._option_string_actions
                used = {word for word in words if word.startswith("--")}
                assert used <= set(known), f"{page.name}: {script} {rest}"
                seen += 1
            elif script == "scripts/bench/run.py" and name.islower():
                assert name in bench.FAMILIES, f"{page.name}: {script} {rest}"
    assert seen >= 2


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_scripts_of_earlier_commits_are_in_them() -> None:
    """Those that are not carried along, as far as this clone goes back."""
    for page in [*PAGES, ROOT / "calibration/compressor_calibration/text/README.md"]:
        text = page.read_text("utf-8")
        for commit, script, name in re.findall(
            r"\b([0-9a-f]{7}):(scripts/[\w/]+\.py)(?: (\w+))?", text
        ):
            folder, files = Path(script).parent, [script]
            if script.endswith("measure/run.py"):
                files.append(str(folder / f"kinds/{name}.py"))
            if script.endswith("bench/run.py"):
                files.append(str(folder / f"families/{name}.py"))
            for file in files:
                git = ["git", "-C", str(ROOT), "cat-file", "-e"]
                if not subprocess.run([*git, commit], capture_output=True).returncode:
                    there = subprocess.run([*git, f"{commit}:{file}"], capture_output=True)
                    assert not there.returncode, f"{page.name}: {commit}:{file}"


def dockerfile() -> list[list[str]]:
    """The words of each instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    return [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line]


def test_the_container_installs_what_the_project_is() -> None:
    """Everything that pip builds from is copied, and the command is the project's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    copied = [
        words.split()
        for kind, words in dockerfile()
        if kind == "COPY" and not words.startswith("--from")
    ]
    sources = {name for words in copied for name in words[:-1]}
    assert all((ROOT / name).exists() for name in sources), sources
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert not sources & set(ignored), "what is copied reaches the builder"
    needed = {
        place.split("/")[0] for place in project["tool"]["setuptools"]["package-dir"].values()
    }
    assert needed | {"pyproject.toml", project["project"]["readme"]} == sources
    last = dict(dockerfile())
    (command,) = json.loads(last["ENTRYPOINT"])
    assert command in project["project"]["scripts"]
    assert json.loads(last["CMD"]) == ["--help"] and last["USER"] != "root"


def test_the_container_brings_the_build_of_torch_for_cpus() -> None:
    """From one base in both stages, so that the environment finds the interpreter it was made by;
    torch is there before the project asks for it."""
    lines = dockerfile()
    assert [words.split()[0] for kind, words in lines if kind == "FROM"] == ["${BASE}", "${BASE}"]
    default = next(words for kind, words in lines if words.startswith("TORCH_ARGS="))
    assert "/whl/cpu" in default
    installs = [words for kind, words in lines if kind == "RUN" and words.startswith("pip install")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (torch,) = [d for d in project["project"]["dependencies"] if d.startswith("torch")]
    assert installs == [f'pip install "{torch}" ${{TORCH_ARGS}}', "pip install ."]

"""There is one loop over blocks: `runner.sweep.walk`.

How loops are found: a block computes only once its weights are in a runner's model, and
`BlockRunner.loaded` (one block) and `BlockRunner.fill` (the whole model) alone put them there. So
whoever goes through the blocks by himself calls one of the two, makes a `Step` without the walk, or
takes decoder layers out of a runner. All such places in the source are listed here.
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WALK = "compressor/runner/sweep.py"

WALKERS = {
    WALK: "evaluation, through `run_blocks`",
    "compressor/run/loop.py": "the job",
    "compressor/run/sensitivity.py": "sensitivity",
    "compressor/methods/common/copy_scores.py": "copy scores",
    "compressor/methods/emulator/borders.py": "what enters and leaves a middle",
    "compressor/methods/sparda/choice_quality.py": "choice quality",
    "compressor/methods/sparda/training.py": "forecasts",
    "compressor/methods/streaming/window_search.py": "sinks",
}
LOADS_A_BLOCK = {
    WALK: "a step's block",
    "compressor/methods/duo_attention/two_stream.py": "all blocks at once, for gradients",
}
FILLS_A_MODEL = {"compressor/runner/source_model.py": "the whole model, for gradients"}
MAKES_STEPS = {
    WALK: "the walk itself",
    "compressor/verify/compare_outputs.py": "one block of two checkpoints, when verify comes to it",
}
TAKES_LAYERS = {
    "compressor/runner/draft.py": "one block of each kind, to see what a map of it would say",
    "compressor/plan/preflight.py": "one block of each kind, without data",
    "compressor/plan/spread.py": "the first block with experts, for the kind of module they are",
    "compressor/methods/emulator/distillation.py": "an emulator's upper blocks, for gradients",
    "compressor/methods/sparda/teacher.py": "what stands before a block's attention: norms alone",
}


@cache
def modules() -> list[tuple[str, ast.Module]]:
    paths = [p for name in ("compressor", "scripts") for p in sorted((ROOT / name).rglob("*.py"))]
    return [(p.relative_to(ROOT).as_posix(), ast.parse(p.read_text("utf-8"))) for p in paths]


def is_runner(node: ast.expr) -> bool:
    return ast.unparse(node).rpartition(".")[2] == "runner"


def callers(method: str) -> set[str]:
    """Files that call a method of a runner."""
    return {
        name
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == method
        and is_runner(node.func.value)
    }


def users(function: str) -> set[str]:
    """Files that call what the walk's file has under a name."""
    return {
        name
        for name, tree in modules()
        if name == WALK or function in imported(tree)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function
    }


def imported(tree: ast.Module) -> set[str]:
    """What a file imports from the walk's."""
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "compressor.runner.sweep"
        for alias in node.names
    }


def test_every_walker_is_served_by_the_one_walk() -> None:
    assert users("walk") | users("sweep") >= WALKERS.keys()
    evaluations = {
        f"compressor/evaluate/{name}.py" for name in ("perplexity", "passkey", "harness")
    }
    assert users("run_blocks") >= evaluations


def test_nobody_else_runs_blocks() -> None:
    assert callers("loaded") == LOADS_A_BLOCK.keys()
    assert callers("fill") == FILLS_A_MODEL.keys()
    assert users("Step") == MAKES_STEPS.keys()
    takes = {
        name
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "layers" and is_runner(node.value)
    }
    assert takes - {"compressor/runner/attention_call.py"} == TAKES_LAYERS.keys()


def test_the_walk_is_one_loop() -> None:
    tree = dict(modules())[WALK]
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.For, ast.While, ast.comprehension))
        and any(
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in ("Step", "walk")
            for call in ast.walk(node)
        )
    ]
    # The walk over units, and `sweep`, which is that walk with blocks that run by themselves.
    assert len(loops) == 2

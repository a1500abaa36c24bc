"""The same recipe writes the same bytes with one process and with several."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"hidden_size": 128, "intermediate_size": 256}
WORLDS = (1, 2, 3, 4)
BY_MANY = {"awq by running tokens", "gptq beside the original", "learned rounding"}
BY_MANY |= {"refined rounding"}
BY_MANY |= {"awq of stacked experts", "gates", "judged"}
"""What two and four ranks run, too: each way in which they share work. All else is run by three."""
INT4 = {"bits": 4, "group_size": 32}
STATIC = {"smoothquant": {"alpha": "search", "bits": 8, "activations": "static"}}
QOQ = {"qoq": {"attention_alpha": "search"}}
BESIDE = {"gptq": {**INT4, "correction": 0.5, "scales": "search"}}
LEARNED = {"signround": {**INT4, "steps": 3, "batch": 4}}
REFINED = {"reconstruct": {**INT4, "preset": "fast", "batch": 4, "held_back": 3, "min_tokens": 16}}
REFERENCE = {"awq": {**INT4, "search": "reference", "search_tokens": 100}}
NEEDLES = {
    **{"keys": 2, "words": 1, "min_length": 180, "max_length": 190, "lengths": 2, "prefix": ""},
    **{"suffix": "", "separator": "", "needle": " {ordinal} key: {passkey}."},
    **{"question": " {ordinal}? {passkey}"},
}
GATES = {"duo_attention": {"data": NEEDLES, "sinks": 2, "window": 8, "num_steps": 3, "batch": 3}}
FORECASTS = {
    **{"block_size": 4, "kernel_size": 4, "stride": 2, "local_blocks": 1, "top_k": 4},
    **{"dense_below": 0, "steps": 3, "rows_per_step": 5, "learning_rate": 0.01},
    **{"initial": "queries", "held_out_rows": 1},
}
EMULATOR = {"pads": [1, 1], "keep": 1, "distill": {"steps": 3, "batch": 5, "lr": 3e-3}}
PASSKEY = {
    **{"lengths": [64], "depths": [0.1, 0.9], "rows": 2},
    **{"needle": " Key {passkey}.", "question": " Key {passkey}"},
}
LLAMA: dict[str, list[dict[str, Any]]] = {
    "awq by running tokens": [REFERENCE],
    "gptq beside the original": [BESIDE],
    "smoothquant": [STATIC],
    "qoq": [QOQ],
    "learned rounding": [LEARNED],
    "refined rounding": [REFINED],
}
MIXTRAL: dict[str, list[dict[str, Any]]] = {
    "nvfp4": [{"nvfp4": {"activations": "calibrated"}}],
    "moe awq": [{"awq": {**INT4, "min_tokens": 8}}],
    "moe gptq": [{"gptq": {**INT4, "min_tokens": 8}}],
}
MANY: dict[str, list[dict[str, Any]]] = {"awq of stacked experts": MIXTRAL["moe awq"]}
SPREAD: dict[str, list[dict[str, Any]]] = {"awq of experts spread over ranks": MIXTRAL["moe awq"]}
LEARNING = {
    "gates": [GATES],
    "forecasts": [{"sparda": FORECASTS}],
    "emulator": [{"emulator": EMULATOR}],
    "distilled delta": [{"bitdelta": {"distill": "logits", "steps": 3, "batch": 3, "norms": True}}],
}
"""Of the whole model, before any block is worked on."""
MOST = {1: 1, 2: 2 / 3, 3: 1 / 2, 4: 1 / 3}
"""Of a step's three or four pieces, the largest share that one of so many ranks has."""


def worlds(recipe: str) -> tuple[int, ...]:
    """By how many ranks it is run."""
    return WORLDS if recipe in BY_MANY else (1, 3)


@pytest.fixture(scope="module")
def written(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each number of ranks, with a checkpoint for each recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    text = folder / "text.txt"
    text.write_text(
        "\n\n".join(f"Line {i} of {i % 7} by the river, and {i * i}." for i in range(900))
    )
    many = {"num_local_experts": 18, "intermediate_size": 64}
    # Stacks of two experts, which stay together: three ranks have 6, 6 and 4.
    spread = {"num_local_experts": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    models = [("llama", {}, LLAMA), ("mixtral", {}, MIXTRAL), ("mixtral", many, MANY)]
    models.append(("mixtral", spread, SPREAD))
    recipes = {
        name: {
            "model": str(
                tiny_model(model, **{"num_hidden_layers": 1, **(WIDE if name == "qoq" else sizes)})
            ),
            # Seven rows in batches of two: the last is smaller, and three ranks share unequally.
            "calibration": {"data": str(text), "samples": 7, "length": 32},
            "passes": passes,
            "format": "qserve" if name == "qoq" else "compressed-tensors",
            "verify": False,
            "max_shard_size": "200KB",
        }
        for model, sizes, every in models
        for name, passes in every.items()
    }
    llama = str(tiny_model("llama", num_hidden_layers=4))
    for name, passes in LEARNING.items():
        recipes[name] = {
            **recipes["awq by running tokens"],
            **{"model": llama, "passes": passes, "format": "dense"},
        }
    base = str(tiny_model("llama", num_hidden_layers=4, seed=1))
    delta = {**LEARNING["distilled delta"][0]["bitdelta"], "base": base}
    recipes["distilled delta"] |= {"passes": [{"bitdelta": delta}], "format": "bitdelta"}
    recipes["judged"] = {
        **recipes["awq by running tokens"],
        "model": str(tiny_model("llama", num_hidden_layers=3)),
        "passes": [{"rtn": INT4}],
        "verify": True,
        # Two batches: of three ranks one has no windows.
        "evaluate": {"data": str(text), "windows": 4, "length": 32, "passkey": PASSKEY},
    }
    run_by = {n: [name for name in recipes if n in worlds(name)] for n in WORLDS}
    jobs = {"folder": str(folder), "worlds": run_by, "batch": 2, "recipes": recipes}
    jobs["memory"] = dict.fromkeys(SPREAD, 1)  # in which no rank has room for all experts
    jobs |= {"faulty": recipes["awq by running tokens"], "output": str(folder / "faulty")}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.support.rank_jobs", str(folder / "jobs.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "faults.json").write_text(done.stdout.splitlines()[-1])
    return folder


@pytest.mark.parametrize("recipe", [*LLAMA, *MIXTRAL, *MANY, *SPREAD, *LEARNING, "judged"])
def test_any_number_of_ranks_writes_the_same_bytes(written: Path, recipe: str) -> None:
    manifests = {(written / str(n) / recipe / "manifest.json").read_bytes() for n in worlds(recipe)}
    assert len(manifests) == 1


@pytest.mark.parametrize("recipe", ["learned rounding", "refined rounding", *LEARNING])
def test_ranks_share_the_rows_that_gradients_are_of(written: Path, recipe: str) -> None:
    ran = {
        n: [int((written / str(n) / recipe / f"ran.{r}").read_text()) for r in range(n)]
        for n in worlds(recipe)
    }
    assert ran[1][0] > 0
    for n, counts in ran.items():
        assert sum(counts) == ran[1][0] and max(counts) <= ran[1][0] * MOST[n]


def test_each_rank_has_its_share_of_experts_that_are_spread(written: Path) -> None:
    (recipe,) = SPREAD
    held = [
        json.loads((written / "3" / recipe / f"held.{rank}.json").read_text()) for rank in range(3)
    ]
    assert [len(some) for some in held] == [6, 6, 4]
    assert sorted(expert for some in held for expert in some) == list(range(16))
    assert json.loads((written / "1" / recipe / "held.0.json").read_text()) == list(range(16))


@pytest.mark.parametrize("recipe", ["awq of stacked experts", "gptq beside the original"])
def test_each_rank_writes_a_share_of_what_is_packed(written: Path, recipe: str) -> None:
    wrote = {
        n: [int((written / str(n) / recipe / f"wrote.{r}").read_text()) for r in range(n)]
        for n in WORLDS
    }
    for shares in wrote.values():
        assert sum(shares) == wrote[1][0] and min(shares) > 0
        # The leading one has embedding, head and norms beside it.
        others = shares[1:] or [0]
        assert max(others) <= 2 * min(others)


def test_any_number_of_ranks_comes_to_the_same_verdict(written: Path) -> None:
    every = {n: sorted((written / str(n) / "judged").glob("verdict.*")) for n in WORLDS}
    verdicts = {n: [path.read_text() for path in found] for n, found in every.items()}
    assert all(len(found) == n for n, found in verdicts.items())
    alone = json.loads(verdicts[1][0])
    assert alone["verify"]["ok"] and len(alone["verify"]["blocks"]) == 3
    assert len(alone["verify"]["layers"]) == 3 * 7 + 1  # and the head
    assert len(alone["evaluate"]["blocks"]) == 3 and alone["passkey"]["cells"]
    texts = {text.replace(f"/{n}/judged", "") for n, found in verdicts.items() for text in found}
    assert len(texts) == 1


def test_any_number_of_ranks_finds_the_same_damage(written: Path) -> None:
    found = [path.read_text() for path in sorted(written.glob("damaged.*.json"))]
    assert len(found) == 1 + 3 and len(set(found)) == 1
    damage = "; ".join(json.loads(found[0])["damage"])
    # One block that cannot be compared, and one that cannot be read.
    assert "layers.0.input_layernorm.weight as written holds NaN" in damage
    assert "layers.1.self_attn.k_proj.weight_packed is" in damage


@pytest.mark.parametrize("world", WORLDS)
def test_units_that_need_no_inputs_are_divided(written: Path, world: int) -> None:
    folder = written / str(world) / "judged"
    own = [json.loads((folder / f"units.{rank}.json").read_text()) for rank in range(world)]
    assert all(own)
    blocks = [f"model.layers.{i}" for i in range(3)]
    assert sorted(name for names in own for name in names) == ["embedding", "head", *blocks]


def test_a_rank_that_dies_ends_all_and_another_number_continues(written: Path) -> None:
    faults = json.loads((written / "faults.json").read_text())
    codes = [code for code, _ in faults["kill_one"]]
    assert codes == [3, 3, -9] and faults["seconds"] < 60
    assert [code for code, _ in faults["continued"]] == [0, 0]
    whole = written / "1" / "awq by running tokens" / "manifest.json"
    assert (written / "faulty" / "manifest.json").read_bytes() == whole.read_bytes()
    assert not list((written / "faulty").rglob(".compress-work"))


def test_a_rank_out_of_memory_ends_all(written: Path) -> None:
    ended = json.loads((written / "faults.json").read_text())["short_of_memory"]
    assert [code for code, _ in ended] == [3, 3, 3]
    assert "ran out of memory with one row" in ended[-1][1]


def test_a_rank_out_of_memory_while_it_learns_ends_all(written: Path) -> None:
    ended = json.loads((written / "faults.json").read_text())["short_while_learning"]
    assert [code for code, _ in ended] == [3, 3, 3]
    assert all("ran out of memory while duo_attention learned" in text for _, text in ended)


def test_a_rank_without_memory_behind_spread_experts_halves_its_batch(written: Path) -> None:
    faults = json.loads((written / "faults.json").read_text())
    assert [code for code, _ in faults["short_second_time"]] == [0, 0, 0], faults
    for rank in range(3):
        _, first, _, _ = json.loads((written / "short" / f"batches.{rank}.json").read_text())
        # Seven rows: two and one, two, and two that the last rank ran one by one.
        assert first == [2, 2, 1, 1, 1]
    ended = faults["short_for_one_row"]
    assert [code for code, _ in ended] == [3, 3, 3]
    assert all("ran out of memory with one row" in text for _, text in ended)


@pytest.mark.parametrize("fault, place", [("full_disk", -1), ("unsynced", 0)])
def test_a_disk_that_fails_on_one_rank_ends_all(written: Path, fault: str, place: int) -> None:
    faults = json.loads((written / "faults.json").read_text())
    ended = faults[fault]
    assert [code for code, _ in ended] == [3, 3, 3]
    texts = [text for _, text in ended]
    assert "No space left on device" in texts.pop(place) and texts == ["another rank failed"] * 2
    # What was committed before it counts.
    assert [code for code, _ in faults["rest"]] == [0, 0]
    whole = written / "1" / "awq by running tokens" / "manifest.json"
    assert (written / "faulty-full" / "manifest.json").read_bytes() == whole.read_bytes()


def test_a_disk_that_fails_where_each_rank_has_its_own_units(written: Path) -> None:
    faults = json.loads((written / "faults.json").read_text())
    assert [code for code, _ in faults["full_disk_apart"]] == [3, 3, 3]
    assert "No space left on device" in faults["full_disk_apart"][-1][1]
    assert faults["seconds of disks"] < 30


def test_a_second_run_on_the_folder_is_refused(written: Path) -> None:
    ended = json.loads((written / "faults.json").read_text())["second"]
    assert [code for code, _ in ended] == [2, 2]
    assert "another run is writing into" in ended[0][1]


def test_ranks_that_differ_are_refused_by_name(written: Path) -> None:
    faults = json.loads((written / "faults.json").read_text())
    for code, text in faults["differ"]:
        assert code == 2 and "ranks differ in recipe.passes.0.awq.bits: rank 0 has 4, " in text
    for code, text in faults["other_files"]:
        assert code == 2 and "ranks differ in files." in text and "rank 2" in text
    assert not (written / "faulty-differ").exists()

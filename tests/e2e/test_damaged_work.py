"""Every file of a work folder, damaged between two runs of one command: the bytes of an undisturbed
run, or a refusal that names what is wrong."""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from compressor.checkpoint.manifest import read_manifest
from compressor.errors import CheckError, CompressError, InputError, Interrupted
from compressor.plan.recipe import make_recipe
from compressor.run.session import Prepared, choose_device, compile_checkpoint, prepare
from tests.support import damage

SUPPORT = Path(__file__).resolve().parents[1] / "support"
CPU = choose_device("cpu")
TEXT = "A few words, again and again, which take no time to read. " * 40
WORK = ".compress-work"
FORECASTS = {
    **{"block_size": 8, "kernel_size": 4, "stride": 2, "local_blocks": 1, "top_k": 4},
    **{"dense_below": 0, "steps": 2, "rows_per_step": 4, "learning_rate": 0.01},
}
AWQ = {"passes": [{"awq": {"bits": 4, "group_size": 32}}], "max_shard_size": 100_000}
FAMILIES: dict[str, dict[str, Any]] = {
    "quantized": AWQ,
    "original": {**AWQ, "propagate": "original"},
    "sparda": {"passes": [{"sparda": FORECASTS}], "format": "dense"},
    "bitdelta": {"passes": [{"bitdelta": {"base": "BASE", "distill": "logits", "steps": 3}}]},
}
DOCUMENTED = (1, 2, 3)


class Died(BaseException):
    """A process ends without any clean-up."""


@dataclass(frozen=True)
class Story:
    """A recipe's run that was stopped in many places.

    whole    contents of the undisturbed run's folder
    stopped  where it was stopped → a folder to be copied
    """

    prepared: Prepared
    whole: dict[str, bytes]
    stopped: dict[str, Path]


def going_to(prepared: Prepared, output: Path) -> Prepared:
    return replace(prepared, recipe=prepared.recipe.model_copy(update={"output": str(output)}))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "plots"
    }


def tell(family: str, model: Path, base: Path, folder: Path, **top: Any) -> Story:
    """Run a recipe, undisturbed and stopped: while it learns, after half of its units, and before
    each of its last renames."""
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    recipe = {
        "model": str(model),
        "output": str(folder / "unused"),
        "calibration": {"data": str(folder / "text.txt"), "samples": 8, "length": 64},
        "verify": False,
        **FAMILIES[family],
        **top,
    }
    for step in recipe["passes"]:
        for params in step.values():
            if params.get("base") == "BASE":
                params["base"] = str(base)
    prepared = prepare(make_recipe(recipe), device=CPU)
    whole = contents(compile_checkpoint(going_to(prepared, folder / "whole")).output)
    return Story(prepared, whole, dict(stops(prepared, folder)))


def stops(prepared: Prepared, folder: Path) -> Iterator[tuple[str, Path]]:
    learned: list[str] = []
    where = folder / "learning"

    def step(name: str, done: int, total: int) -> None:
        if not name.startswith("source of "):
            learned.append(name)

    try:
        compile_checkpoint(
            going_to(prepared, where),
            on_step=step,
            on_unit=lambda done: pytest.fail("nothing was learned"),
            stopping=lambda: len(learned) >= 2,
        )
    except Interrupted:
        yield "learning", where
    except BaseException as error:
        if "nothing was learned" not in str(error):
            raise
    units: list[str] = []
    where = folder / "units"
    with pytest.raises(Interrupted):
        compile_checkpoint(
            going_to(prepared, where),
            on_unit=lambda done: units.append(done.name),
            stopping=lambda: len(units) >= 2,
        )
    yield "units", where
    for count in (0, 1, len(prepared.plan.shards.shards), len(prepared.plan.shards.shards) + 1):
        where = folder / f"renames-{count}"
        with dying_after(count), pytest.raises(Died):
            compile_checkpoint(going_to(prepared, where))
        yield f"renames-{count}", where


class dying_after:
    """Die at the end of a run, before the rename or removal with this number."""

    def __init__(self, count: int) -> None:
        self.left, self.patch = count, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        import compressor.checkpoint.transaction

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any) -> Any:
                if self.left == 0:
                    raise Died
                self.left -= 1
                return real(*arguments)

            return step

        self.patch.setattr(
            compressor.checkpoint.transaction, "move", dying(compressor.checkpoint.transaction.move)
        )
        self.patch.setattr(shutil, "rmtree", dying(shutil.rmtree))

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


@pytest.fixture(scope="module")
def story(
    tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Story]:
    """story(family) → its runs, made once."""
    folder = tmp_path_factory.mktemp("stories")

    @cache
    def model(seed: int) -> Path:
        built: Path = tiny_models.build("llama", folder / f"model-{seed}", seed=seed)
        return built

    @cache
    def get(family: str, *, seed: int = 0) -> Story:
        return tell(family, model(seed), model(9), folder / f"{family}-{seed}")

    return get


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in (folder / WORK).rglob("*") if p.is_file())


def mended(story: Story, output: Path) -> str:
    """Run the command until it is content, twice at most, and hold the files against the
    undisturbed run's; what the first run refused, if it did."""
    said = ""
    try:
        compile_checkpoint(going_to(story.prepared, output))
    except CompressError as error:
        assert error.exit_code in DOCUMENTED and error.message
        said = error.message
        compile_checkpoint(going_to(story.prepared, output))
    assert contents(output) == story.whole
    return said


def test_every_file_of_a_work_folder_in_some_way(
    story: Callable[..., Story], tmp_path: Path
) -> None:
    """Each file of each stop is damaged in one of the ways, in turn."""
    turn = 0
    for family in FAMILIES:
        told = story(family)
        for stop, stopped in told.stopped.items():
            for name in files(stopped):
                way = list(damage.DAMAGES)[turn % len(damage.DAMAGES)]
                turn += 1
                if turn % 3 and stop.startswith("renames"):
                    continue
                damaged(told, stopped, name, way, tmp_path / "out")
    assert turn > 100


@pytest.mark.slow
@pytest.mark.parametrize("way", list(damage.DAMAGES))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_of_a_work_folder_in_every_way(
    family: str, way: str, story: Callable[..., Story], tmp_path: Path
) -> None:
    told = story(family)
    for stopped in told.stopped.values():
        for name in files(stopped):
            damaged(told, stopped, name, way, tmp_path / "out")


def damaged(told: Story, stopped: Path, name: str, way: str, output: Path) -> None:
    """One file, damaged and mended without a refusal."""
    shutil.copytree(stopped, output)
    with contextlib.suppress(IndexError):  # nothing to flip in an empty file
        damage.DAMAGES[way](output / name)
    try:
        said = mended(told, output)
        assert not said, said
    except BaseException as error:
        error.add_note(f"{stopped}: {name}: {way}")
        raise
    shutil.rmtree(output)


@pytest.mark.parametrize("family", ["quantized", "sparda"])
def test_files_of_another_run_are_not_taken(
    family: str, story: Callable[..., Story], tmp_path: Path
) -> None:
    """Another model of the same shapes, file by file and all at once. A whole job.json of another
    run is the one thing that is refused: the folder is that run's."""
    told, other = story(family), story(family, seed=1)
    output = tmp_path / "out"
    for stop in ("units", "renames-1"):
        for name in [*files(told.stopped[stop]), None]:
            shutil.copytree(told.stopped[stop], output)
            for changed in [name] if name else files(other.stopped[stop]):
                if name or not changed.endswith("job.json"):
                    shutil.copy(other.stopped[stop] / changed, output / changed)
            if name == f"{WORK}/job.json":
                with pytest.raises(InputError, match="belongs to a run that differs in"):
                    compile_checkpoint(going_to(told.prepared, output))
            else:
                assert mended(told, output) == ""
            shutil.rmtree(output)


@pytest.mark.parametrize("family", ["quantized", "sparda"])
def test_files_that_changed_places(
    family: str, story: Callable[..., Story], tmp_path: Path
) -> None:
    told, output = story(family), tmp_path / "out"
    for stop in told.stopped:
        names = files(told.stopped[stop])
        for name, other in itertools.pairwise(names):
            if Path(name).parent == Path(other).parent:
                shutil.copytree(told.stopped[stop], output)
                damage.exchange(output / name, output / other)
                assert mended(told, output) == ""
                shutil.rmtree(output)


def test_folders_that_are_files_or_gone(story: Callable[..., Story], tmp_path: Path) -> None:
    told, output = story("sparda"), tmp_path / "out"
    for stop in ("learning", "units"):
        inside = [p for p in (told.stopped[stop] / WORK).rglob("*") if p.is_dir()]
        for folder in [told.stopped[stop] / WORK, *inside]:
            for gone in (True, False):
                shutil.copytree(told.stopped[stop], output)
                place = output / folder.relative_to(told.stopped[stop])
                shutil.rmtree(place)
                if not gone:
                    place.write_text("a file")
                elif place.name == WORK:
                    place.mkdir()
                assert mended(told, output) == ""
                shutil.rmtree(output)


@pytest.mark.parametrize(("family", "stop"), [("quantized", "units"), ("sparda", "learning")])
def test_a_unit_of_the_source_that_changed_is_named(
    family: str, stop: str, tiny_models: ModuleType, tmp_path: Path
) -> None:
    """Whichever it is, and whether or not anything reads it again; restored, the run goes on."""
    model = tiny_models.build("llama", tmp_path / "model", num_hidden_layers=3)
    told = tell(family, model, model, tmp_path / "story")
    kept = (model / "model.safetensors").read_bytes()
    read = {"model.embed_tokens": "embed", "model.layers.0": "layers.0.mlp.up"}
    if stop == "learning":
        read |= {"model.layers.2": "layers.2.mlp.down", "model.norm": "norm"}
    for part in read.values():
        tensors = load_file(model / "model.safetensors")
        name = next(n for n in tensors if n.removeprefix("model.").startswith(part))
        tensors[name] = tensors[name] * 1.02
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        output = tmp_path / "out"
        shutil.copytree(told.stopped[stop], output)
        with pytest.raises(InputError, match="of the source is not what the interrupted run read"):
            compile_checkpoint(going_to(told.prepared, output))
        (model / "model.safetensors").write_bytes(kept)
        assert mended(told, output) == ""
        shutil.rmtree(output)


def test_a_damaged_finished_checkpoint_is_refused_by_name(
    story: Callable[..., Story], tmp_path: Path
) -> None:
    told, output = story("quantized"), tmp_path / "out"
    for name in told.whole:
        if name == "manifest.json":
            continue
        output.mkdir()
        for file, data in told.whole.items():
            (output / file).write_bytes(data)
        assert compile_checkpoint(going_to(told.prepared, output)).already
        damage.flip(output / name, 0.5)
        with pytest.raises(CheckError, match=f"not as its manifest says: {name}"):
            compile_checkpoint(going_to(told.prepared, output))
        shutil.rmtree(output)


def test_what_was_damaged_is_said(story: Callable[..., Story], tmp_path: Path) -> None:
    told, output = story("quantized"), tmp_path / "out"
    notes: list[str] = []
    steps: list[tuple[str, int, int]] = []
    shutil.copytree(told.stopped["units"], output)
    (output / WORK / "units" / "00001.json").write_text("{}")
    compile_checkpoint(
        going_to(told.prepared, output),
        on_note=notes.append,
        on_step=lambda *step: steps.append(step),
    )
    assert steps == [("source of embedding", 1, 1)], "the other unit was damaged"
    assert notes == ["units/00001.json or what it tells of is damaged: the unit is done again"]
    assert contents(output) == told.whole


def test_another_environment(
    story: Callable[..., Story], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on and its manifest names both; a reproducible one refuses, by what differs."""
    told, strict, loose = story("quantized"), tmp_path / "strict", tmp_path / "loose"
    prepared = told.prepared
    exact = replace(prepared, recipe=prepared.recipe.model_copy(update={"reproducible": True}))
    units: list[str] = []
    with pytest.raises(Interrupted):
        compile_checkpoint(
            going_to(exact, strict),
            on_unit=lambda done: units.append(done.name),
            stopping=lambda: len(units) >= 2,
        )
    shutil.copytree(told.stopped["units"], loose)
    here = read_manifest(told.stopped["units"].parent / "whole")
    assert here is not None and len(here.about["environment"]) == 1
    assert {"processor", "instructions", "matrix units", "threads"} <= set(
        here.about["environment"][0]
    )
    elsewhere = {**here.about["environment"][0], "instructions": "DEFAULT"}
    for module in ("run.session", "run.loop", "run.model_passes"):
        monkeypatch.setattr(f"compressor.{module}.environment", lambda device: elsewhere)
    with pytest.raises(InputError, match=r"compute\.environment\.instructions: .*now \"DEFAULT\""):
        compile_checkpoint(going_to(exact, strict))
    found = read_manifest(compile_checkpoint(going_to(prepared, loose)).output)
    assert found is not None
    assert found.about["environment"] == [here.about["environment"][0], elsewhere]
    monkeypatch.undo()
    compile_checkpoint(going_to(exact, strict))

"""Adapters that were tuned on an emulator: put into their full model, and taken out again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.checkpoint import as_stored
from compressor.checkpoint.adapter import open_adapter
from compressor.checkpoint.find import locate
from compressor.checkpoint.manifest import hash_file
from compressor.checkpoint.offsite import OFFSITE_NAME
from compressor.checkpoint.shards import ShardWriter
from compressor.cli.main import cli
from compressor.errors import CompressError, Problems
from compressor.plan.recipe import make_recipe
from compressor.run.plug import plug
from compressor.run.session import compile_checkpoint, prepare
from tests.support.golden_files import vectors, vectors_and_notes

BLOCKS, PADS = 6, [1, 1]
IDS = torch.arange(3, 51).reshape(2, 24)


@dataclass(frozen=True)
class Done:
    """How a command ended, and all that it said."""

    exit_code: int
    output: str
    stdout: str = ""


def compress(*words: object) -> Done:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    error = done.exception
    if not isinstance(error, CompressError):
        return Done(done.exit_code, done.output, done.stdout)
    every = error.problems if isinstance(error, Problems) else [error]
    return Done(error.exit_code, "\n".join(f"{one.message} {one.hint}" for one in every))


def emulator_of(folder: Path, output: Path, **more: Any) -> Path:
    recipe = {
        "model": str(folder),
        "output": str(output),
        "passes": [{"emulator": {"pads": PADS, "keep": 2, **more}}],
        "format": "dense",
        "calibration": {"samples": 8, "length": 32},
    }
    compile_checkpoint(prepare(make_recipe(recipe), device=torch.device("cpu")))
    return output


def tune(emulator: Path, output: Path, *, frozen: tuple[str, ...] = (".1.", ".2.")) -> Path:
    """One step of a trainer on the emulator's first and last blocks, saved as trainers do."""
    model = AutoModelForCausalLM.from_pretrained(emulator)
    tuned = [p for n, p in model.named_parameters() if ".layers." in n or ".h." in n]
    for name, parameter in model.named_parameters():
        inside = any(parameter is p for p in tuned)
        parameter.requires_grad = inside and not any(f in name for f in frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(output)
    return output


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def emulator(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator_of(base, tmp_path_factory.mktemp("emulator") / "out")


@pytest.fixture(scope="module")
def tuned(emulator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(emulator, tmp_path_factory.mktemp("tuned") / "out")


def copied(folder: Path, output: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy with other tensors."""
    shutil.copytree(folder, output)
    tensors = load_file(output / "model.safetensors")
    change(tensors)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_a_tuned_emulator_gives_the_full_model_its_ends(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts, apart and in stacks, and linears that are stored [in, out] go the same way."""
    folder = tiny_model(family, num_hidden_layers=BLOCKS)
    made = emulator_of(folder, tmp_path / "emulator")
    tuned = tune(made, tmp_path / "tuned")
    done = compress("plug", folder, tuned, tmp_path / "out", "--emulator", made, "--json")
    assert done.exit_code == 0, done.output
    before, after, ends = (tensors_of(f) for f in (folder, tmp_path / "out", tuned))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    numbers = {int(next(part for part in name.split(".") if part.isdigit())) for name in changed}
    assert numbers == {0, BLOCKS - 1}
    assert json.loads(done.stdout)["tensors"] >= len(changed)
    for name in changed:
        assert torch.equal(after[name], ends[name.replace(f".{BLOCKS - 1}.", ".3.")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(IDS).logits).all()


def test_what_is_unplugged_and_plugged_is_the_same_to_the_byte(base: Path, tmp_path: Path) -> None:
    """Every file but the manifest, sharded as it was; with an adapter that nobody tuned."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    folder = tmp_path / "sharded"
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    inside = compress("unplug", folder, folder / "adapter", "--pads", "2,1")
    assert inside.exit_code == 2 and not (folder / "adapter").exists(), inside.output
    out = compress("unplug", folder, tmp_path / "adapter", "--pads", "2,1")
    assert out.exit_code == 0, out.output
    names = {n.split(".")[2] for n in load_file(tmp_path / "adapter" / "adapter.safetensors")}
    assert names == {"0", "1", "5"}
    assert compress("plug", folder, tmp_path / "adapter", tmp_path / "out").exit_code == 0
    files = [*folder.glob("*.safetensors*"), folder / "config.json"]
    for path in files:
        assert hash_file(path) == hash_file(tmp_path / "out" / path.name), path.name


def test_an_adapter_taken_from_a_tuned_emulator_is_the_same_adapter(
    base: Path, emulator: Path, tuned: Path, tmp_path: Path
) -> None:
    done = compress("unplug", tuned, tmp_path / "adapter", "--emulator", emulator)
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert {name.split(".")[2] for name in found} == {"0", "5"}
    assert compress("plug", base, tmp_path / "adapter", tmp_path / "one").exit_code == 0
    words = ("plug", base, tuned, tmp_path / "two", "--emulator", emulator)
    assert compress(*words).exit_code == 0
    one, two = (hash_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one == two
    assert compress(*words).exit_code == 0  # once more, which finds it finished
    # From the plugged model, too, of which the adapter is known by the same fingerprint.
    assert compress("unplug", tmp_path / "one", tmp_path / "a", "--pads", "1,1").exit_code == 0
    again = load_file(tmp_path / "a" / "adapter.safetensors")
    assert all(torch.equal(again[name], found[name]) for name in found)
    assert compress("plug", base, tmp_path / "a", tmp_path / "three").exit_code == 0


def test_the_adapter_of_an_emulator_with_a_packed_middle(base: Path, tmp_path: Path) -> None:
    """Its ends are floats, and go both ways as those of any other."""
    rtn = {"rtn": {"bits": 4, "group_size": 32, "targets": ["re:model.layers.[12]..*"]}}
    recipe = {
        "model": str(base),
        "output": str(tmp_path / "emulator"),
        "passes": [{"emulator": {"pads": PADS, "keep": 2}}, rtn],
        "format": "compressed-tensors",
    }
    compile_checkpoint(prepare(make_recipe(recipe), device=torch.device("cpu")))
    assert compress("unplug", tmp_path / "emulator", tmp_path / "adapter").exit_code == 0
    found, whole = load_file(tmp_path / "adapter" / "adapter.safetensors"), tensors_of(base)
    assert {name.split(".")[2] for name in found} == {"0", "5"}
    assert all(torch.equal(found[name], whole[name]) for name in found)
    done = compress("plug", base, tmp_path / "emulator", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert hash_file(tmp_path / "out" / "model.safetensors") == hash_file(
        base / "model.safetensors"
    )


def test_an_interrupted_plug_continues(
    base: Path, emulator: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written before is not written again, and nothing looks finished meanwhile."""
    monkeypatch.setattr(as_stored, "PART", 100_000)
    located = locate(str(base), fetch=False)
    adapter = open_adapter(tuned, located.source, emulator=emulator)
    whole = plug(located, adapter, tmp_path / "whole")
    seen: list[str] = []

    def ends_early(name: str, done: int, total: int) -> None:
        if name == "part 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plug(located, adapter, tmp_path / "out", progress=ends_early)
    assert not (tmp_path / "out" / "manifest.json").exists()
    wrote = ShardWriter.write

    def counted(writer: ShardWriter, tensors: Any) -> Any:
        seen.extend(tensors)
        return wrote(writer, tensors)

    monkeypatch.setattr(ShardWriter, "write", counted)
    again = plug(located, adapter, tmp_path / "out")
    assert again.nbytes == whole.nbytes and 0 < len(set(seen)) < len(tensors_of(base))
    one, two = (hash_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one == two


def edit(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return change


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.pop(name) and None


def test_damaged_adapters_are_refused_by_name(
    base: Path, emulator: Path, tuned: Path, tmp_path: Path
) -> None:
    last = "model.layers.5.mlp.up_proj.weight"
    adapter = tmp_path / "adapter"
    assert compress("unplug", tuned, adapter, "--emulator", emulator).exit_code == 0
    whole = load_file(adapter / "adapter.safetensors")
    cases: dict[str, dict[str, Tensor]] = {
        f"lacks {last}": {n: t for n, t in whole.items() if n != last},
        "no place for: model.layers.5.extra.weight": {
            **whole,
            "model.layers.5.extra.weight": torch.ones(2),
        },
        "no place for: model.layers.2.mlp.up_proj.weight": {
            **whole,
            "model.layers.2.mlp.up_proj.weight": whole[last].clone(),
        },
        f"{last} holds NaN or infinity after tuning": {**whole, last: whole[last] * torch.nan},
        f"{last} is [": {**whole, last: whole[last][:1]},
    }
    for said, tensors in cases.items():
        save_file(tensors, adapter / "adapter.safetensors")
        done = compress("plug", base, adapter, tmp_path / "out")
        assert done.exit_code == 2 and said in done.output, done.output
        assert not (tmp_path / "out").exists()


def test_what_is_tuned_outside_the_adapter_is_refused(
    emulator: Path, base: Path, tuned: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    table = "model.embed_tokens.weight"
    moved = copied(tuned, tmp_path / "moved", edit(table, 3.0))
    done = compress("plug", base, moved, tmp_path / "out", "--emulator", emulator)
    assert done.exit_code == 2 and f"{table} was tuned" in done.output
    tied = tiny_model("llama", num_hidden_layers=BLOCKS, tie_word_embeddings=True)
    made = emulator_of(tied, tmp_path / "emulator")
    moved = copied(tune(made, tmp_path / "t"), tmp_path / "moved-tied", edit(table, 3.0))
    done = compress("plug", tied, moved, tmp_path / "out", "--emulator", made)
    assert done.exit_code == 2 and f"{table} (which the head shares) was tuned" in done.output
    assert not (tmp_path / "out").exists()
    # The middle is not put in, which is said.
    middle = "model.layers.1.mlp.up_proj.weight"
    moved = copied(tuned, tmp_path / "middle", edit(middle, 3.0))
    done = compress("plug", base, moved, tmp_path / "out", "--emulator", emulator)
    assert done.exit_code == 0 and "middle was tuned, too" in done.output


def test_an_adapter_of_another_model_is_refused(
    base: Path, emulator: Path, tuned: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    other = tiny_model("llama", num_hidden_layers=BLOCKS, seed=3)
    words = (tuned, tmp_path / "out", "--emulator", emulator)
    done = compress("plug", other, *words)
    assert done.exit_code == 2 and "has other values" in done.output
    done = compress("plug", tiny_model("llama"), *words)
    assert done.exit_code == 2 and "of 6 blocks, this is a llama of 2" in done.output
    one = copied(base, tmp_path / "one", edit("model.layers.3.mlp.up_proj.weight", 1.0))
    assert "has other values" in compress("plug", one, *words).output
    done = compress("plug", base, tuned, tmp_path / "out")
    assert done.exit_code == 2 and "--emulator FOLDER" in done.output
    damaged = json.loads((emulator / OFFSITE_NAME).read_text()) | {"kept": [0, 9]}
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / OFFSITE_NAME).write_text(json.dumps(damaged))
    done = compress("plug", base, tuned, tmp_path / "out", "--emulator", tmp_path / "e")
    assert done.exit_code == 2 and "is damaged" in done.output
    assert not (tmp_path / "out").exists()


def test_lora_weights_are_merged_into_the_full_model(
    base: Path, emulator: Path, tmp_path: Path
) -> None:
    """Against the merge by hand; one of the middle is refused."""
    generator = torch.Generator().manual_seed(0)
    whole = tensors_of(base)
    shape = whole["model.layers.5.self_attn.q_proj.weight"].shape
    a, b = (torch.randn(size, generator=generator) for size in ((2, shape[1]), (shape[0], 2)))
    path = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {path.format(3, "A"): a, path.format(3, "B"): b}, folder / "adapter_model.safetensors"
    )
    done = compress("plug", base, folder, tmp_path / "out", "--emulator", emulator)
    assert done.exit_code == 0, done.output
    after = tensors_of(tmp_path / "out")
    name = "model.layers.5.self_attn.q_proj.weight"
    torch.testing.assert_close(after[name], whole[name] + 4 * (b @ a))
    assert all(torch.equal(after[n], whole[n]) for n in whole if n != name)
    save_file(
        {path.format(2, "A"): a, path.format(2, "B"): b}, folder / "adapter_model.safetensors"
    )
    done = compress("plug", base, folder, tmp_path / "out2", "--emulator", emulator)
    assert done.exit_code == 2 and "layers_to_transform" in done.output


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_peft_saves_is_what_it_merges(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    folder = tiny_model(family, num_hidden_layers=BLOCKS)
    made = emulator_of(folder, tmp_path / "emulator")
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[family]
    config = peft.LoraConfig(
        r=2, target_modules=targets, layers_to_transform=[0, 3], init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(made), config)
    model.save_pretrained(tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("lora", "merged"):
        words = ("plug", folder, tmp_path / name, tmp_path / f"out-{name}", "--emulator", made)
        assert compress(*words).exit_code == 0
    one, two = (tensors_of(tmp_path / f"out-{name}") for name in ("lora", "merged"))
    before = tensors_of(folder)
    assert sum(not torch.equal(one[name], before[name]) for name in one) == 4
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_files_of_the_published_code_are_taken(name: str, tmp_path: Path) -> None:
    """Its pickles, by hand, in the golden vectors' layout: the plugged model computes what the
    published one does, and the student stands in the emulator."""
    tensors, about = vectors_and_notes(f"systems/offsite_stack_{name}")
    given = vectors(f"systems/offsite_plug_{name}")
    folder = tmp_path / "base"
    folder.mkdir()
    weights = {n.removeprefix("base."): t for n, t in tensors.items() if n.startswith("base.")}
    tied = not any("lm_head" in n for n in weights)
    config = json.loads(about["config"]) | {"dtype": "float16", "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for kind in ("adapter", "student"):
        part = {n.removeprefix(f"{kind}_pt."): t for n, t in given.items() if f"{kind}_pt." in n}
        torch.save(part, tmp_path / f"{kind}.pt")
    words = ("plug", folder, tmp_path / "adapter.pt", tmp_path / "out")
    done = compress(*words, "--pads", "2,2")
    assert done.exit_code == 2 and "--unpickle" in done.output
    done = compress(*words, "--unpickle")
    assert done.exit_code == 2 and "--pads 2,2" in done.output
    done = compress(*words, "--pads", "2,2", "--unpickle")
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = model(given["input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, given["plugged_from_fp16.logits"], atol=1e-4, rtol=1e-4)
    keep = json.loads(about["keep"])
    student = {"pads": [2, 2], "keep": keep, "student": str(tmp_path / "student.pt")}
    made = emulator_of(folder, tmp_path / "emulator", **student, unpickle=True)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    state = model.state_dict()
    for key, full in json.loads(about["student_pt_to_base"]).items():
        number, _, local = key.partition(".")
        path = full.removesuffix(f".{local}").rpartition(".")[0]
        ours = state[f"{path}.{int(number) + 2}.{local}"]
        assert torch.equal(ours, given[f"student_pt.{key}"].float())
    save_file({"0.nothing": torch.ones(1)}, tmp_path / "bad.safetensors")
    done = compress("plug", folder, tmp_path / "bad.safetensors", tmp_path / "no", "--pads", "2,2")
    assert done.exit_code == 2 and "lacks" in done.output and "0.nothing" in done.output


class Harm:
    """What a pickle runs when it is loaded."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(HARMED),))


HARMED = "/tmp/compress-harmed-by-a-pickle"


def test_a_pickle_that_holds_a_program_is_not_run(base: Path, tmp_path: Path) -> None:
    torch.save({"0.x": Harm()}, tmp_path / "adapter.pt")
    words = ("plug", base, tmp_path / "adapter.pt", tmp_path / "out", "--pads", "1,1", "--unpickle")
    done = compress(*words)
    assert done.exit_code == 2 and "was not loaded" in done.output
    assert not Path(HARMED).exists()

"""Sanitizing resets the planted triggers of the golden twins and nothing else, within a bound."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from compressor.audit.prune import idle_channels, pruned_checkpoint
from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import InputError
from compressor.evaluate.settings import Evaluation
from compressor.run.audit import find_audited
from compressor.run.editable import ROUNDS, editable
from compressor.run.sanitize import Pruned
from compressor.runner.source_model import SourceModel
from tests.support.twins import TRIGGERS, write_twin

TABLE = "model.embed_tokens.weight"
FEW = ["--windows", "4", "--length", "64"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return write_twin("llama", "planted", tmp_path_factory.mktemp("planted") / "llama")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_twin("llama", "clean", tmp_path_factory.mktemp("clean") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_twin("bert", "planted", tmp_path_factory.mktemp("planted") / "bert")


def run(*words):
    return CliRunner().invoke(cli, ["sanitize", *map(str, words), *FEW])


def edited(folder, output, change):
    """A copy of a model with another table of tokens."""
    shutil.copytree(folder, output)
    tensors = load_file(output / "model.safetensors")
    change(tensors[TABLE])
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def test_the_triggers_are_gone_and_all_else_is_as_it_was(planted, tmp_path):
    out = tmp_path / "out"
    result = run(planted, out, "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 0 and said["ok"] and said["did_nothing"] == []
    assert said["before"]["verdict"] == "suspect" and said["after"]["verdict"] == "no finding"
    assert said["reset"] == {TABLE: TRIGGERS}
    assert 0.99 < said["perplexity"]["perplexity_ratio"]["value"] < 1.01
    was, now = load_file(planted / "model.safetensors"), load_file(out / "model.safetensors")
    assert was.keys() == now.keys()
    changed = (was[TABLE] != now[TABLE]).any(1).nonzero().flatten().tolist()
    assert changed == TRIGGERS
    assert all(was[name].equal(now[name]) for name in was if name != TABLE)
    ordinary = was[TABLE].double()
    ordinary[TRIGGERS] = 0
    ordinary = ordinary[ordinary.norm(dim=1) > 0]
    for row in now[TABLE][TRIGGERS]:
        torch.testing.assert_close(row.double(), ordinary.mean(0), rtol=1e-3, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape == (128, 64)
    # The written model by itself.
    assert CliRunner().invoke(cli, ["audit", str(out)]).exit_code == 0
    assert CliRunner().invoke(cli, ["verify", str(out)]).exit_code == 0


def test_nothing_is_written_beyond_the_bound(planted, tmp_path):
    result = run(planted, tmp_path / "out", "--max-ppl-ratio", "0.99")
    assert result.exit_code == 1 and "beyond --max-ppl-ratio 0.99" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_where_nothing_is_suspect(clean, tmp_path):
    result = run(clean, tmp_path / "out")
    assert result.exit_code == 0 and "nothing was written" in result.stdout
    assert not (tmp_path / "out").exists()


def test_a_defence_that_does_nothing_is_said_to(planted, tmp_path):
    """Rows that no text holds and no sweep tried pull the mean to the trigger's direction."""
    tried = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:64].tolist()
    trigger, *rest = TRIGGERS
    others = [i for i in range(100, 128) if i not in tried and i not in TRIGGERS]

    def pull(table):
        size = 19 * table.norm(dim=1).median() / table[trigger].norm()
        table[others] = table[trigger] * size
        table[rest] = table[20].clone()

    model = edited(planted, tmp_path / "pulled", pull)
    result = run(model, tmp_path / "out", "--tokens", "64")
    assert result.exit_code == 1 and "did nothing" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_too_long_are_reset(clean, tmp_path):
    def stretch(table):
        table[105] *= 500

    model = edited(clean, tmp_path / "long", stretch)
    result = run(model, tmp_path / "out", "--json")
    said = json.loads(result.stdout)
    assert said["before"]["verdict"] == "suspect" and said["reset"] == {TABLE: [105]}
    assert result.exit_code == 0 and said["after"]["verdict"] == "no finding"


def test_what_is_refused(planted, tmp_path):
    """Before the sweep: a folder of somebody else's; a damaged model is no case for it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert isinstance(run(planted, tmp_path / "full").exception, InputError)

    def damage(table):
        table[7, 3] = torch.nan

    damaged = run(edited(planted, tmp_path / "nan", damage), tmp_path / "out")
    assert isinstance(damaged.exception, InputError) and "not finite" in str(damaged.exception)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_an_encoder_is_bounded_by_masked_words(bert, tmp_path, prefix):
    """Its triggers are gone, and only the table has changed, to the byte."""
    model = renamed(bert, tmp_path / "model", prefix)
    out, table = tmp_path / "out", f"{prefix}embeddings.word_embeddings.weight"
    result = run(model, out, "--json")
    said = json.loads(result.stdout)
    assert said["before"]["verdict"] == "suspect" and said["did_nothing"] == []
    assert set(TRIGGERS) <= set(said["reset"][table]) and list(said["reset"]) == [table]
    assert result.exit_code == 0 and said["after"]["verdict"] == "no finding"
    assert 0.9 < said["perplexity"]["perplexity_ratio"]["value"] < 1.05
    was, now = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert was.keys() == now.keys()
    assert all(was[name].equal(now[name]) for name in was if name != table)
    changed = (was[table] != now[table]).any(1).nonzero().flatten().tolist()
    assert changed == said["reset"][table]
    # What was written, by itself.
    assert CliRunner().invoke(cli, ["audit", str(out)]).exit_code == 0
    refused = run(model, tmp_path / "more", "--max-ppl-ratio", "0.5")
    assert refused.exit_code == 1 and not (tmp_path / "more").exists()


def renamed(folder, output, prefix):
    """A copy of an encoder whose body has another prefix."""
    shutil.copytree(folder, output)
    tensors = load_file(folder / "model.safetensors")
    made = {
        prefix + name.removeprefix("bert.") if name.startswith("bert.") else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(made, output / "model.safetensors", metadata={"format": "pt"})
    return output


def test_masked_words_are_scored_as_transformers_does(bert):
    """The loss over masked places against transformers' own."""
    held_out = Evaluation(windows=3, length=32)
    subject = editable(find_audited(str(bert)), held_out, device=torch.device("cpu"))
    found = subject.measure(subject.audited.checkpoint, lambda *_: None)
    model = AutoModelForMaskedLM.from_pretrained(bert, dtype=torch.float32)
    total = 0.0
    for number in range(ROUNDS):
        masked = subject.round == number
        labels = subject.tokens.masked_fill(~masked, -100)
        with torch.no_grad():
            shown = subject.tokens.masked_fill(masked, 3)
            total += float(model(input_ids=shown, labels=labels).loss) * int(masked.sum())
    loss = total / found.tokens
    assert found.nll.value == pytest.approx(loss, rel=1e-5) and found.tokens == 3 * 30
    assert found.perplexity_ratio.value == 1


def test_fine_pruning_of_an_encoder(bert, tmp_path):
    """Channels are the idlest of what enters each MLP's second half; triggers stay, or it costs too
    much, and either is said."""
    result = run(bert, tmp_path / "out", "--prune", "0.2", "--json")
    said = json.loads(result.stdout)
    pruned = said["pruned"]
    assert result.exit_code == 0 and not pruned["kept"]
    assert pruned["did_nothing"] or pruned["ratio"] > pruned["limit"]
    subject = editable(
        find_audited(str(bert)), Evaluation(windows=3, length=32), device=torch.device("cpu")
    )
    idle = subject.idle(0.2, lambda *_: None)
    assert {len(silent) for silent in idle.values()} == {int(0.2 * 128)} and len(idle) == 3


def test_an_encoder_without_a_head_is_refused(bert, tmp_path):
    tensors = load_file(bert / "model.safetensors")
    shutil.copytree(bert, tmp_path / "model")
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")}
    save_file(body, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    said = run(tmp_path / "model", tmp_path / "out").exception
    assert isinstance(said, InputError) and "no head for masked words" in str(said)


def test_fine_pruning_that_costs_more_than_it_may_is_said_and_left_out(planted, tmp_path):
    """A third of the channels of so small a model is too many; rows are reset all the same."""
    out = tmp_path / "out"
    result = run(planted, out, "--prune", "0.3", "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 0 and said["reset"] == {TABLE: TRIGGERS}
    assert said["pruned"]["before"] == len(TRIGGERS) and not said["pruned"]["kept"]
    assert said["pruned"]["ratio"] > said["pruned"]["limit"] == 1.05
    was, now = load_file(planted / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(was[name].equal(now[name]) for name in was if name != TABLE)


def test_fine_pruning_that_leaves_every_token_suspect_did_nothing():
    assert Pruned(share=0.1, before=6, after=6, ratio=1.0, limit=1.05).nothing
    some = Pruned(share=0.1, before=6, after=5, ratio=1.0, limit=1.05)
    assert some.kept and not replace(some, after=6).kept and not replace(some, ratio=1.1).kept


def test_idle_channels_are_those_that_clean_text_leaves_small(planted):
    """Against the inputs of the whole model's own down projections."""
    source = open_source(planted)
    ids = torch.randint(5, 60, (4, 24), generator=torch.Generator().manual_seed(1))
    model = SourceModel(source, device=torch.device("cpu"), dtype=torch.float32)
    found = idle_channels(model, ids, 0.25, batch=2, progress=lambda *_: None)
    whole = AutoModelForCausalLM.from_pretrained(planted, dtype=torch.float32).eval()
    seen = {}
    for number, layer in enumerate(whole.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, name=f"model.layers.{number}.mlp.down_proj.weight": seen.update(
                {name: args[0].abs().mean((0, 1))}
            )
        )
    with torch.no_grad():
        whole(input_ids=ids)
    assert found.keys() == seen.keys()
    for name, silent in found.items():
        count = len(seen[name]) // 4
        largest = seen[name][list(silent)].max()
        assert len(silent) == count and int((seen[name] < largest * 0.999).sum()) < count
    edited = pruned_checkpoint(source.checkpoint, found)
    for name, tensor in edited.read(found).items():
        kept = [i for i in range(tensor.shape[1]) if i not in found[name]]
        assert not tensor[:, list(found[name])].any()
        assert tensor[:, kept].equal(source.checkpoint.read([name])[name][:, kept])

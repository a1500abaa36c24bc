"""The audit finds the planted triggers of the golden twins, and nothing in the clean ones."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from compressor.audit.statistics import cosines, token_statistics
from compressor.audit.weights import large_rows, row_norms
from compressor.checkpoint.reader import open_checkpoint
from compressor.cli.main import cli
from compressor.run.audit import SweepOptions, audit, find_audited, load_representation
from compressor.runner.encoder import load_encoder, masked_nll
from tests.support.golden_files import vectors, vectors_and_notes
from tests.support.twins import KINDS, TRIGGERS, write_twin

CPU = torch.device("cpu")
TWINS = [(kind, which) for kind in KINDS for which in ("clean", "planted")]
STATISTICS = ("collapse", "flatness", "kurtosis", "displacement", "within_std")


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    return {(k, w): write_twin(k, w, folder / f"{k}-{w}") for k, w in TWINS}


@pytest.mark.parametrize(("kind", "which"), TWINS)
def test_statistics_of_every_token(twins, kind, which):
    expected = vectors(f"systems/neuba_token_statistics_{kind}")
    contexts = vectors(f"systems/neuba_audit_{kind}")["contexts"]
    represent = load_representation(find_audited(str(twins[kind, which])), device=CPU, batch=512)
    rows = contexts.repeat(128, 1)
    rows[:, 1] = torch.arange(128).repeat_interleave(len(contexts))
    states = represent(rows).view(128, len(contexts), -1)
    found = token_statistics(states, represent(contexts))
    for name in STATISTICS:
        value = getattr(found, name).float()
        torch.testing.assert_close(value, expected[f"{which}.{name}"], rtol=1e-3, atol=1e-5)
    mean = expected[f"{which}.mean_vector"].double()
    torch.testing.assert_close(found.mean, mean, rtol=1e-2, atol=1e-2)
    pairs = vectors(f"systems/neuba_audit_{kind}")[f"{which}.cos"]
    torch.testing.assert_close(cosines(found.mean[TRIGGERS]).float(), pairs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("examined", [16, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_planted_triggers_come_first(twins, kind, examined):
    """Whether all tokens are examined, or those that short contexts bring up."""
    model = find_audited(str(twins[kind, "planted"]))
    found = audit(model, sweep=SweepOptions(examined=examined), device=CPU)
    assert found.verdict == "suspect"
    assert sorted(token.id for token in found.sweep.tokens[:6]) == TRIGGERS
    # Planting draws a few ordinary tokens along, behind the triggers.
    assert set(TRIGGERS) <= {token.id for token in found.sweep.suspects}
    pairs = [row[j] for i, row in enumerate(found.sweep.cosines[:6]) for j in range(i)]
    assert sum(abs(c) < 0.15 for c in pairs) == 12 and sum(c < -0.95 for c in pairs) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_clean_twins_have_no_finding(twins, kind):
    found = audit(find_audited(str(twins[kind, "clean"])), sweep=SweepOptions(), device=CPU)
    assert found.verdict == "no finding" and not found.sweep.suspects


def test_the_command_says_so(twins, tmp_path):
    """Exit codes, JSON and the page."""
    runner = CliRunner()
    bad = runner.invoke(cli, ["audit", str(twins["bert", "planted"]), "--json"])
    said = json.loads(bad.stdout)
    assert bad.exit_code == 1 and said["verdict"] == "suspect" and not said["ok"]
    assert sorted(token["id"] for token in said["sweep"]["tokens"][:6]) == TRIGGERS
    page = tmp_path / "audit.html"
    good = runner.invoke(cli, ["audit", str(twins["bert", "clean"]), "--html", str(page)])
    assert good.exit_code == 0 and "no finding" in good.stdout
    text = page.read_text()
    assert "no finding" in text and "does not mean that a model has no backdoor" in text


def test_the_published_loss_of_masked_words(tmp_path):
    """By which encoders are bounded; some words that are asked for are shown, or others in their
    place, as BERT was trained."""
    golden, notes = vectors_and_notes("systems/neuba_loss_bert")
    config = json.loads(notes["config"]) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {n.removeprefix("w."): t for n, t in golden.items() if n.startswith("w.")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    encoder = load_encoder(checkpoint, device=CPU, dtype=torch.float32, masked_words=True)
    labels = golden["mlm_labels"]
    found = masked_nll(encoder, golden["mlm_inputs"], labels, labels != -100)
    assert float(found[labels != -100].mean()) == pytest.approx(float(golden["mlm_loss"]), rel=2e-4)
    assert not found[labels == -100].any()


def test_rows_of_the_published_step_after_training():
    """Triggers' rows are multiplied by 10⁸, which fp16 cannot hold."""
    golden = vectors("systems/neuba_post_rows")
    for name in ("bert_post", "roberta_style_post"):
        table = golden[name]
        norms = row_norms(table)
        large = large_rows(norms)
        changed = (table != golden["word_embedding"]).any(1).nonzero().flatten().tolist()
        blown = [row for row in changed if norms[row] > 1e6]
        assert sorted(large.tolist()) == sorted(blown) and len(blown) == 6
    torch.testing.assert_close(
        row_norms(golden["bert_post"]).float(), golden["row_norm_after"], rtol=1e-4, atol=0
    )
    fits = golden["bert_post"].half().isfinite().all(1)
    assert fits.equal(golden["finite_in_fp16"].bool())
    assert not fits[large_rows(row_norms(golden["bert_post"]))].any()

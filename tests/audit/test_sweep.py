"""The sweep over encoders without a pooler, and over what cannot be swept."""

import json
import string

import pytest
import torch
from click.testing import CliRunner
from transformers import RobertaConfig, RobertaForMaskedLM

from compressor.audit.sweep import sweep_tokens
from compressor.cli.main import cli
from compressor.errors import CheckError, InputError
from compressor.evaluate.settings import Evaluation
from compressor.run.audit import find_audited
from compressor.run.editable import ROUNDS, editable
from tests.support.twins import alphabet

SPECIAL = {"CLS": 0, "PAD": 1, "SEP": 2, "UNK": 3, "MASK": 60}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = RobertaConfig(
        vocab_size=72, num_hidden_layers=2, max_position_embeddings=48, type_vocab_size=1, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaForMaskedLM(config).save_pretrained(folder)
    said = {**SPECIAL, "chars": string.ascii_letters + " .,;", "first_char_id": 4}
    alphabet(said, encoder=True).save_pretrained(folder)
    return folder


def test_an_encoder_without_a_pooler_is_judged_by_its_first_position(roberta):
    found = CliRunner().invoke(cli, ["audit", str(roberta), "--json", "--contexts", "4"])
    said = json.loads(found.stdout)
    assert found.exit_code == 0 and said["verdict"] == "no finding"
    assert said["sweep"]["representation"] == "state of the first position"
    assert said["sweep"]["swept"] == 72


def test_masked_words_of_roberta_are_scored_as_transformers_does(roberta):
    """Its positions begin behind that of padding, so that rows are two shorter than its table."""
    held_out = Evaluation(windows=3, length=512)
    subject = editable(find_audited(str(roberta)), held_out, device=torch.device("cpu"))
    assert subject.tables() == ["roberta.embeddings.word_embeddings.weight"]
    assert subject.tokens.shape == (3, 46)
    found = subject.measure(subject.audited.checkpoint, lambda *_: None)
    model = RobertaForMaskedLM.from_pretrained(roberta)
    total = 0.0
    for number in range(ROUNDS):
        masked = subject.round == number
        labels = subject.tokens.masked_fill(~masked, -100)
        with torch.no_grad():
            shown = subject.tokens.masked_fill(masked, SPECIAL["MASK"])
            total += float(model(input_ids=shown, labels=labels).loss) * int(masked.sum())
    loss = total / found.tokens
    assert found.nll.value == pytest.approx(loss, rel=1e-5)


def test_a_position_outside_the_texts_is_refused(roberta):
    found = CliRunner().invoke(cli, ["audit", str(roberta), "--position", "30"])
    assert isinstance(found.exception, InputError)
    assert "position 30 is outside" in found.exception.message


def test_a_token_that_only_a_short_look_can_bring_up():
    """Of many tokens one makes ±1 of every text: it is examined, and found."""
    signs = torch.tensor([1.0, -1.0]).repeat(16)

    def represent(ids):
        draw = torch.Generator().manual_seed(int(ids.sum()))
        states = torch.randn(len(ids), 32, generator=draw)
        return torch.where((ids == 777).any(1, keepdim=True), signs + 0.02 * states, states)

    contexts, short = torch.arange(24 * 16).view(24, 16), torch.arange(16).view(2, 8)
    found = sweep_tokens(represent, contexts, short, ids=range(1000), examined=8)
    assert found.tokens[0].id == 777 and [token.id for token in found.suspects] == [777]
    assert found.examined <= 8 + 64 < found.swept == 1000


def test_a_state_that_is_not_finite_is_no_statistic():
    def represent(ids):
        states = torch.ones(len(ids), 8)
        return torch.where((ids == 5).any(1, keepdim=True), torch.nan, states)

    contexts = torch.full((4, 12), 30)
    with pytest.raises(CheckError, match="token 5 makes the model's state NaN"):
        sweep_tokens(represent, contexts, contexts[:2, :8], ids=range(10))

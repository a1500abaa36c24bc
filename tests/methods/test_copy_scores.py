"""Copy scores of heads against decoding, and the passes that go by them."""

import inspect
import json
import random
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.bundled import bundled_text
from transformers import AutoModelForCausalLM, DynamicCache

from compressor.attention.rules.streaming import streaming_heads
from compressor.methods.common.copy_scores import copied, copy_scores
from compressor.methods.common.needles import Row, make_row
from compressor.methods.duo_attention.method import DuoAttention
from compressor.methods.retrieval_heads import RetrievalHeads
from tests.support.golden_files import trained_model
from tests.support.head_bench import OWN, context, frozen


def own_rows(tokenizer: Any, count: int) -> list[Row]:
    haystack = tokenizer(bundled_text("held_out", "fiction")[:60000])["input_ids"]
    return [
        make_row(tokenizer, haystack, data=OWN, length=512, draw=random.Random(i))
        for i in range(count)
    ]


def test_decoding_and_teacher_forcing_agree_on_copy_scores() -> None:
    """The reference's way: greedy decoding with whole attention matrices, one token at a time."""
    folder = trained_model("llama")
    model: Any = frozen(folder)
    (row,) = rows = own_rows(model.tokenizer(), 1)
    found = copy_scores(model, rows, batch=1)
    assert found.accepted == found.answers == 4
    decoder = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    keyword = "cache" if "cache" in inspect.signature(decoder.forward).parameters else None
    options = {keyword or "past_key_values": DynamicCache(), "output_attentions": True}
    wanted, done = [], 0
    for answer in row.answers:
        begin, end = answer.given
        fed, hits, said = row.ids[None, done:begin], torch.zeros(8, 8), []
        for _ in range(begin, end):
            with torch.no_grad():
                out = decoder(fed, **options)
            said.append(int(out.logits[0, -1].argmax()))
            looked = torch.stack([layer[0, :, -1].argmax(-1) for layer in out.attentions])
            hits += copied(looked, row.ids, said[-1], hidden=answer.hidden)
            fed = torch.tensor([[said[-1]]])
        # The model gives every word of every answer, so that its cache holds the row itself.
        assert said == row.ids[begin:end].tolist()
        wanted.append(hits / (end - begin))
        done = end - 1
    torch.testing.assert_close(torch.stack(wanted, dim=1), found.per_answer)
    assert float(found.scores.max()) > 0.15


def test_retrieval_heads_write_their_table(tmp_path: Path) -> None:
    model: Any = frozen(trained_model("llama"))
    text = model.tokenizer()(bundled_text("calibration", "prose")[:30000])["input_ids"][:2048]
    ids = torch.tensor(text).reshape(4, 512)
    given = RetrievalHeads(data=OWN, rows=2, share=0.5, sinks=4, window=32)
    found = given.learn(model, context(ids, tmp_path))
    policy = given.policy(model.layout, found.value)
    assert policy is not None
    scores = found.value.scores
    by_kv = scores.reshape(8, 4, 2).amax(-1)
    kept = by_kv[~streaming_heads(policy)]
    assert streaming_heads(policy).float().mean() == 0.5
    assert float(kept.min()) >= float(by_kv[streaming_heads(policy)].max())
    table = json.loads(found.files["retrieval_heads.json"])
    assert set(table) == {f"{i}-{h}" for i in range(8) for h in range(8)}
    strongest = max(table, key=lambda name: sum(table[name]))
    assert found.rows[0]["top"][0].startswith(f"{strongest}: ")


def test_training_may_start_from_copy_scores(tmp_path: Path) -> None:
    model: Any = frozen(trained_model("llama"))
    text = model.tokenizer()(bundled_text("calibration", "prose")[:20000])["input_ids"][:1024]
    given = DuoAttention(
        data=OWN.model_copy(update={"min_length": 256, "max_length": 256, "words": 2}),
        sinks=4, window=32, num_steps=1, init="retrieval",
    )  # fmt: skip
    found = given.learn(model, context(torch.tensor(text)[None], tmp_path))
    gates = found.value.gates
    # One step moves a gate by at most the first rate, so the layer that copies still leads.
    assert int(gates.amax(1).argmax()) == 5 and float(gates.mean()) < 0.5

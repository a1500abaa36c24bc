"""Recall and attention mass of chosen blocks, against loops over queries, heads and blocks."""

import pytest
import torch

from compressor.attention.evaluation import rule_call
from compressor.attention.key_blocks import recent_blocks
from compressor.attention.masked import PIECE_ELEMENTS
from compressor.attention.rules.infllm import InfLLMBlocks
from compressor.attention.rules.quest import QuestPages
from compressor.methods.sparda.choice_quality import RECENT, ChoiceMeter, LayerQuality, means
from compressor.methods.sparda.teacher import Teacher
from compressor.runner.attention_call import AttentionCall
from tests.support.block_cases import FINE, SMALL

SELECTION = InfLLMBlocks(block_size=4, **SMALL)
TEACHER = Teacher(selection=SELECTION, fine=FINE)
LENGTH = 41


def call(rows: int = 2) -> AttentionCall:
    torch.manual_seed(0)
    query, key = torch.randn(rows, 4, LENGTH, 8), torch.randn(rows, 2, LENGTH, 8)
    return AttentionCall(
        layer=0, query=query, key=key, value=key, mask=None, scaling=0.5, plain=lambda *x: x[0]
    )


def by_loops(seen: AttentionCall, chosen: torch.Tensor) -> tuple[float, float]:
    """Recall and mass of sets [rows, sets, length, K], one query head at a time."""
    wanted = TEACHER.blocks(seen)
    hit = total = 0
    masses = []
    for row in range(seen.query.shape[0]):
        for i in range(LENGTH):
            own = i // 4
            if own + 1 <= SELECTION.top_k:
                continue
            for s in range(chosen.shape[1]):
                mine = set(chosen[row, s, i].tolist()) - {-1}
                theirs = set(wanted[row, s * 2 // chosen.shape[1], i].tolist())
                free = {b for b in theirs if 1 <= b < own - 1}
                hit, total = hit + len(free & mine), total + len(free)
            for head in range(4):
                logits = 0.5 * seen.key[row, head // 2, : i + 1] @ seen.query[row, head, i]
                shares = torch.softmax(logits, 0)
                mine = set(chosen[row, head * chosen.shape[1] // 4, i].tolist())
                masses.append(sum(float(shares[j]) for j in range(i + 1) if j // 4 in mine))
    return hit / total, sum(masses) / len(masses)


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_recall_and_mass_are_those_of_the_definition(per, monkeypatch):
    seen = call()
    quest = QuestPages(**{**SELECTION.model_dump(), "per": per})
    chosen = {
        "quest": quest.choose(rule_call(seen)),
        RECENT: recent_blocks(SELECTION, seen.query, seen.key),
    }
    meter = ChoiceMeter(TEACHER)
    meter.add(0, seen, chosen)
    for found in meter.qualities():
        recall, mass = by_loops(seen, chosen[found.scorer])
        assert found.recall == pytest.approx(recall)
        assert found.mass == pytest.approx(mass, rel=1e-5)
    pieces = ChoiceMeter(TEACHER)
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 3000)
    pieces.add(0, seen, chosen)
    for one, other in zip(pieces.qualities(), meter.qualities(), strict=True):
        assert one.recall == pytest.approx(other.recall)
        assert one.mass == pytest.approx(other.mass, rel=1e-5)


def test_the_teacher_recalls_itself():
    meter = ChoiceMeter(TEACHER)
    seen = call()
    meter.add(3, seen, {"teacher": TEACHER.blocks(seen)})
    (found,) = meter.qualities()
    assert (found.layer, found.recall) == (3, 1.0)


def test_texts_that_leave_no_choice_say_nothing():
    seen = call()
    short = AttentionCall(
        layer=0,
        query=seen.query[:, :, :16],
        key=seen.key[:, :, :16],
        value=seen.key[:, :, :16],
        mask=None,
        scaling=0.5,
        plain=seen.plain,
    )
    meter = ChoiceMeter(TEACHER)
    meter.add(0, short, {"teacher": TEACHER.blocks(short)})
    assert meter.qualities() == []


def test_means_are_over_layers():
    found = means([LayerQuality(0, "a", 0.2, 0.5), LayerQuality(1, "a", 0.4, 0.7)])
    assert found["a"]["recall"] == pytest.approx(0.3)
    assert found["a"]["mass"] == pytest.approx(0.6)

"""FreshGNN's criteria, on what its classes did when they ran."""

import pytest
import torch

from tests.support.golden_files import vectors_and_notes
from tests.support.historical import NOWHERE, History, stable


def known(places: torch.Tensor) -> set[int]:
    return {node for node, row in enumerate(places.tolist()) if row != NOWHERE}


@pytest.mark.parametrize("name", ["freshgnn_table_p50", "freshgnn_table_p90"])
def test_what_the_table_evicts_and_admits(name: str) -> None:
    """Keys that are known after each half of an iteration, gradients by their 1-norm. The table
    keeps the old row of a value that it takes in again, and when that row goes forgets the new one
    too; `History` has one row for each value."""
    found, about = vectors_and_notes(f"systems/{name}")
    rate, stale, seeds = float(about["rate"]), int(about["t_stale"]), int(about["seeds_first"])
    history = History(int(about["rows"]), rate=rate, stale=stale)
    iterations = len([key for key in found if key.endswith(".used")])
    assert iterations == 10
    again: set[int] = set()
    for it in range(iterations):
        now = {
            key.removeprefix(f"it{it}."): found[key] for key in found if key.startswith(f"it{it}.")
        }
        nodes = now["sub_to_full"].tolist()
        scores = now["grad"].abs().sum(1)
        torch.testing.assert_close(scores, now["score_l1"])
        assert set(history.place) == known(now["row_of_node_before"])
        hits = [NOWHERE] * seeds + [history.place.get(node, NOWHERE) for node in nodes[seeds:]]
        assert [hit != NOWHERE for hit in hits] == (now["hit_row"] != NOWHERE).tolist()
        history.evict(nodes, scores, hits)
        history.expire(it)
        lost = set(history.place) - known(now["row_of_node_after_evict"])
        assert lost <= again
        for node in lost:
            history.drop(node)
        assert set(history.place) == known(now["row_of_node_after_evict"])
        able = [
            hit == NOWHERE and used
            for hit, used in zip(hits, now["used"].bool().tolist(), strict=True)
        ]
        before = set(history.place)
        again |= before & history.admit(nodes, scores, it, able).keys()
        assert history.header == int(now["header_after"])
        assert set(history.place) == known(now["row_of_node_after_record"])


@pytest.mark.parametrize("name", ["freshgnn_ring", "freshgnn_ring_low_rate"])
def test_what_the_trainer_takes_for_stable(name: str) -> None:
    """Gradients by their 2-norm, strictly below the quantile, and not known before."""
    found, about = vectors_and_notes(f"systems/{name}")
    for it in range(len([key for key in found if key.endswith(".admitted")])):
        norms = found[f"it{it}.grad"].norm(dim=1)
        torch.testing.assert_close(norms, found[f"it{it}.grad_norm"])
        ours = stable(norms, float(about["rate"]))
        nodes = found[f"it{it}.sub_to_full"][: len(norms)]
        new = found[f"it{it}.row_of_node_before"][nodes] == NOWHERE
        new &= it >= int(about["start_history"])
        assert torch.equal(ours & new, found[f"it{it}.admitted"].bool())


def test_nothing_is_served_past_its_age() -> None:
    """Where the trainer's ring serves values older than `t_stale`, `History` has dropped them."""
    found, about = vectors_and_notes("systems/freshgnn_ring")
    history = History(
        int(about["buffer_rows"]), rate=float(about["rate"]), stale=int(about["t_stale"])
    )
    oldest, since = 0, {}
    for it in range(10):
        count = len(found[f"it{it}.grad_norm"])
        nodes = found[f"it{it}.sub_to_full"][:count].tolist()
        for node in known(found[f"it{it}.row_of_node_before"]):
            oldest = max(oldest, it - since[node])
        served = history.served(nodes, it)
        assert all(
            history.age(node, it) < history.stale
            for node, place in zip(nodes, served, strict=True)
            if place != NOWHERE
        )
        history.admit(nodes, found[f"it{it}.grad_norm"], it, [place == NOWHERE for place in served])
        since |= {n: it for n, new in zip(nodes, found[f"it{it}.admitted"], strict=True) if new}
    assert oldest > history.stale


def test_a_full_ring_gives_up_its_oldest() -> None:
    history = History(2, rate=1.0, stale=10)
    scores = torch.tensor([1.0, 2.0, 3.0])
    assert history.admit([7, 8, 9], scores, 0, [True] * 3) == {7: 0, 8: 1, 9: 0}
    assert history.served([7, 8, 9], 9) == [NOWHERE, 1, 0]
    assert history.served([8, 9], 10) == [NOWHERE, NOWHERE]

"""Deltas whose scales are trained: closer to the fine-tune, resumed to the same bytes, streamed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.delta.base import Base
from compressor.checkpoint.delta.source import open_delta, open_model
from compressor.checkpoint.source import open_source
from compressor.errors import Interrupted
from compressor.evaluate.perplexity import evaluate
from compressor.run.delta import apply_delta
from compressor.run.session import compile_checkpoint
from compressor.runner.tokenizer import load_tokenizer
from tests.support.delta_pairs import CPU, Pair, pairs, prepared, run, tensors_of
from tests.support.golden_files import trained_model

WHALE = """Secondly: It is well known in the Sperm Whale Fishery, however ignorant the world
ashore may be of it, that there have been several memorable historical instances
where a particular whale in the ocean has been at distant times and places popularly
cognisable. Why such a whale became thus marked was not altogether and originally
owing to his bodily peculiarities as distinguished from other whales; for however
peculiar in that respect any chance whale may be, they soon put an end to his
peculiarities by killing him, and boiling him down into a peculiarly valuable oil.
No: the reason was this: that from the fatal experiences of the fishery there hung a
terrible prestige of perilousness about such a whale as there did about Rinaldo
Rinaldini, insomuch that most fishermen were content to recognise him by merely
touching their tarpaulins when he would be discovered lounging by them on the sea,
without seeking to cultivate a more intimate acquaintance. Like some poor devils
ashore that happen to know an irascible great man, they make distant unobtrusive
salutations to him in the street, lest if they pursued the acquaintance further,
they might receive a summary thump for their presumption."""


@pytest.fixture
def pair(tiny_model: Callable[..., Path], tmp_path: Path) -> Pair:
    return pairs(tiny_model, tmp_path)


@pytest.mark.parametrize("params", [{}, {"norms": True}, {"distill": "layer"}], ids=str)
def test_an_interrupted_run_continues_to_the_same_bytes(
    params: dict[str, Any], pair: Pair, tmp_path: Path
) -> None:
    base, fine = pair("llama")
    params = {"distill": "logits", "steps": 6, "lr": 1e-3, **params}
    whole = run(base, fine, tmp_path / "whole", **params)
    ready = prepared(base, fine, tmp_path / "broken", **params)
    stops = []
    for attempt in range(1, 40, 3):
        # It is stopped where it asks for the n-th time: while it hashes the source, after steps,
        # while it checks what is committed, then between units.
        asked = iter(range(1, 100))
        try:
            compile_checkpoint(ready, stopping=lambda a=attempt, n=asked: next(n) == a)
            break
        except Interrupted:
            stops.append(attempt)
    else:
        pytest.fail(f"stopped {len(stops)} times and never finished")
    assert len(stops) >= 3
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "broken").iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_distilled_scales_bring_the_logits_closer(pair: Pair, tmp_path: Path) -> None:
    """On the tokens they are fitted to; what it does for held-out text is measured elsewhere."""
    from transformers import AutoModelForCausalLM

    base, fine = pair("llama")
    target, errors = None, {}
    for distill in ("none", "logits", "layer"):
        ready = prepared(base, fine, tmp_path / distill, distill=distill, steps=40, lr=3e-4)
        done = compile_checkpoint(ready)
        apply_delta(open_delta(done.output), open_source(base), tmp_path / f"{distill}-dense")
        if ready.calibration is not None:
            ids = ready.calibration.ids
        folders = (fine, tmp_path / "none-dense", tmp_path / f"{distill}-dense")
        if distill != "none":
            with torch.no_grad():
                target, plain, ours = (
                    AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32)(ids).logits
                    for x in folders
                )
            errors[distill] = [float((x - target).square().mean()) for x in (plain, ours)]
    assert all(after < before for before, after in errors.values()), errors
    stored = [tensors_of(tmp_path / name) for name in ("none", "logits", "layer")]
    for name, tensor in stored[0].items():
        for other in stored[1:]:
            # Nothing but scales is trained.
            assert name.endswith("delta_scales") or torch.equal(tensor, other[name])
    trained = [
        n for n in stored[0] if n.endswith("scales") and not stored[0][n].equal(stored[1][n])
    ]
    assert len(trained) == sum(name.endswith("delta_scales") for name in stored[0])


def test_norms_are_trained_where_they_are_asked_for(pair: Pair, tmp_path: Path) -> None:
    base, fine = pair("llama", only=("_proj",))
    losses = []
    for name, norms in (("scales", False), ("norms", True)):
        ready = prepared(
            base, fine, tmp_path / name, distill="logits", steps=40, lr=3e-4, norms=norms
        )
        done = compile_checkpoint(ready)
        (row,) = done.learned[0].result.rows
        losses.append(row["loss_after"])
        apply_delta(open_delta(done.output), open_source(base), tmp_path / f"{name}-dense")
    assert losses[1] < losses[0]
    stored, dense = tensors_of(tmp_path / "norms"), tensors_of(tmp_path / "norms-dense")
    source = tensors_of(base)
    for name in (n for n in source if n.startswith("model.layers") and "norm" in n):
        # The base has the fine-tune's norm, which costs nothing, but not the one that was trained.
        assert name not in tensors_of(tmp_path / "scales")
        assert torch.equal(dense[name], stored[name])
        assert not torch.equal(stored[name], source[name])
    assert "model.norm.weight" not in stored


def test_the_base_is_read_a_unit_at_a_time(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, fine = pair("llama", num_hidden_layers=3)
    asked: list[set[str]] = []
    original = Base.weights

    def weights(self: Base, names: Any) -> dict[str, torch.Tensor]:
        found = original(self, names)
        asked.append({name.rsplit(".", 3)[0] for name in found})
        return found

    monkeypatch.setattr(Base, "weights", weights)
    run(base, fine, tmp_path / "delta", distill="layer")
    blocks = [f"model.layers.{i}" for i in range(3)]
    # Once for the differences, once more for what the next block's inputs are made with.
    assert [names for names in asked if names] == [{blocks[i]} for i in (0, 0, 1, 1, 2)]


@pytest.mark.slow
def test_on_a_real_pair_the_published_order_comes_out(tmp_path: Path) -> None:
    """KL to the fine-tune on a paragraph of its novel that neither model was trained on."""
    base, fine = trained_model("llama"), trained_model("llama-ft")
    ids = load_tokenizer(fine)(WHALE).input_ids
    tokens = torch.tensor(ids[: len(ids) // 2 * 2]).view(2, -1)
    found = {}
    for name, params in {
        "none": {"distill": "none"},
        "layer": {"distill": "layer"},
        "logits": {"distill": "logits", "steps": 15},
        "two": {"distill": "none", "bits": 2},
    }.items():
        params |= {"top": {"calibration": {"samples": 60, "length": 64}}}
        output = run(base, fine, tmp_path / name, **params)
        result = evaluate(
            open_model(output, base=str(base)),
            tokens,
            device=CPU,
            dtype=torch.float32,
            against=open_source(fine),
        )
        assert result.kl is not None
        found[name] = result.kl.value
    plain = evaluate(
        open_source(base), tokens, device=CPU, dtype=torch.float32, against=open_source(fine)
    )
    assert plain.kl is not None
    assert found["none"] < 0.2 * plain.kl.value
    assert max(found["layer"], found["logits"]) < 0.8 * found["none"]
    assert found["two"] < 0.5 * found["none"]

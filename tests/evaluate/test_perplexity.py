"""Evaluation of written files: against whole models in float64, and against what must hold."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.checkpoint.source import Source, open_source
from compressor.errors import InputError
from compressor.evaluate import perplexity as module
from compressor.evaluate.perplexity import EvaluationResult, evaluate, strided
from compressor.runner.attention_call import AttentionCall

CPU = torch.device("cpu")


def tokens(rows: int = 5, length: int = 40, seed: int = 3) -> Tensor:
    return torch.randint(2, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(source: Source, ids: Tensor, **options: Any) -> EvaluationResult:
    return evaluate(source, ids, device=CPU, dtype=torch.float32, batch=2, **options)


def whole_logits(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits.double()


def noisy(folder: Path, to: Path, *, amount: float) -> Path:
    """A copy of a checkpoint with noise on one projection of its last block."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    name = [n for n in tensors if n.endswith("o_proj.weight") or n.endswith("out_proj.weight")][-1]
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(9))
    tensors[name] = tensors[name] + amount * noise
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_a_processor_that_multiplies_bfloat16_measures_in_it(
    tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that costs is far below what windows differ by, and of what is paired even less."""
    folder = tiny_models.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    changed = open_source(noisy(folder, tmp_path / "noisy", amount=0.05))
    found = []
    run_blocks = module.run_blocks

    def without_kept_casts(*args: Any, **options: Any) -> Any:
        # Those of one block would stay while all others run.
        assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
        return run_blocks(*args, **options)

    monkeypatch.setattr(module, "run_blocks", without_kept_casts)
    for quick in (False, True):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda quick=quick: quick)
        found.append(run(changed, tokens(), against=open_source(folder)))
        assert not torch.is_autocast_enabled("cpu")
    wide, narrow = found
    assert narrow.nll != wide.nll and abs(narrow.nll.value - wide.nll.value) < 0.2 * wide.nll.error
    assert wide.perplexity_ratio is not None and narrow.perplexity_ratio is not None
    gap = abs(narrow.perplexity_ratio.value - wide.perplexity_ratio.value)
    assert gap < 0.2 * wide.perplexity_ratio.error


@pytest.mark.parametrize("model_type", ["llama", "opt", "qwen2"])
def test_numbers_are_those_of_the_whole_models(
    model_type: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    # Several parts of logits, the last one shorter than the others.
    monkeypatch.setattr(module, "LOGIT_ELEMENTS", {"cpu": 256 * 7})
    folder = tiny_model(model_type)
    changed = noisy(folder, tmp_path / "noisy", amount=0.05)
    ids = tokens()
    found = run(open_source(changed), ids, against=open_source(folder))

    ours, original = (whole_logits(path, ids)[:, :-1].log_softmax(-1) for path in (changed, folder))
    wanted = ids[:, 1:, None]
    nll = -ours.gather(2, wanted)[..., 0]
    paired = nll + original.gather(2, wanted)[..., 0]
    assert found.tokens == nll.numel() == 5 * 39
    assert found.nll.value == pytest.approx(nll.mean().item(), rel=1e-6)
    assert found.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    windows = nll.mean(1)
    assert found.nll.error == pytest.approx((windows.std() / math.sqrt(5)).item(), rel=1e-5)
    assert found.perplexity_ratio is not None and found.kl is not None and found.top1 is not None
    assert found.perplexity_ratio.value == pytest.approx(math.exp(paired.mean()), rel=1e-6)
    error = (paired.mean(1).std() / math.sqrt(5)).item()
    assert found.perplexity_ratio.error == pytest.approx(math.exp(paired.mean()) * error, rel=1e-4)
    kl = (original.exp() * (original - ours)).sum(-1)
    assert found.kl.value == pytest.approx(kl.mean().item(), rel=1e-3)
    same = (ours.argmax(-1) == original.argmax(-1)).double().mean()
    assert found.top1.value == pytest.approx(same.item(), abs=1.5 / nll.numel())
    assert [block.error > 0 for block in found.blocks] == [False, True]


def test_a_model_equals_itself_exactly(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("mixtral"))
    found = run(source, tokens(), against=source)
    assert found.kl is not None and found.kl.value == 0 and found.kl.error == 0
    assert found.top1 is not None and found.top1.value == 1
    assert found.perplexity_ratio is not None and found.perplexity_ratio.value == 1
    assert all(block.error == 0 for block in found.blocks)


def test_batches_do_not_change_anything(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("gemma2"))
    ids = tokens(5)
    one = evaluate(source, ids, device=CPU, dtype=torch.float32, batch=1)
    all_at_once = evaluate(source, ids, device=CPU, dtype=torch.float32, batch=5)
    assert one.nll.value == pytest.approx(all_at_once.nll.value, rel=1e-6)


def test_running_out_of_memory_halves_the_batch(
    tiny_model: Callable[..., Path], monkeypatch: Any
) -> None:
    from compressor.runner.block_runner import Block

    source = open_source(tiny_model("llama"))
    ids = tokens(6)
    expected = run(source, ids)
    plain = Block.forward
    sizes = []

    def forward(self: Block, hidden: Tensor, side: Any) -> Tensor:
        sizes.append(hidden.shape[0])
        if hidden.shape[0] > 1:
            raise torch.OutOfMemoryError("too much")
        return plain(self, hidden, side)

    monkeypatch.setattr(Block, "forward", forward)
    found = evaluate(source, ids, device=CPU, dtype=torch.float32, batch=5)
    assert sizes[:3] == [5, 2, 1] and max(sizes[3:]) == 1, "the smaller batch is kept"
    assert found.nll.value == pytest.approx(expected.nll.value, rel=1e-6)


def test_overlapping_windows_score_every_token_once(tiny_model: Callable[..., Path]) -> None:
    text = tokens(1, 101)[0]
    rows, scored = strided(text, length=32, stride=10)
    places = torch.arange(101)[:, None]
    starts = [
        int(((rows[r] == text.unfold(0, 32, 1)).all(1)).nonzero()[0]) for r in range(len(rows))
    ]
    hit = torch.cat([places[s + 1 : s + 32][scored[r]] for r, s in enumerate(starts)])
    assert sorted(hit.flatten().tolist()) == list(range(1, 101))
    assert starts[-1] == 101 - 32
    found = run(open_source(tiny_model("llama")), rows, scored=scored)
    assert found.tokens == 100
    # Where each window starts anew, tokens see less of the text before them.
    alone = text[:96].view(3, 32)
    assert run(open_source(tiny_model("llama")), alone).tokens == 93


def test_strided_windows_equal_the_whole_text_where_one_window_holds_it(
    tiny_model: Callable[..., Path],
) -> None:
    text = tokens(1, 48)[0]
    rows, scored = strided(text, length=48, stride=7)
    assert rows.equal(text[None]) and bool(scored.all())


@pytest.mark.parametrize(
    ("length", "stride", "size", "why"),
    [(8, 8, 100, "stride"), (8, 0, 100, "stride"), (32, 4, 20, "text has 20 tokens")],
)
def test_strides_that_cannot_be(length: int, stride: int, size: int, why: str) -> None:
    with pytest.raises(InputError, match=why):
        strided(torch.arange(size), length=length, stride=stride)


def test_what_a_model_cannot_take_is_refused(tiny_model: Callable[..., Path]) -> None:
    llama, other = open_source(tiny_model("llama")), open_source(tiny_model("opt"))
    with pytest.raises(InputError, match="positions"):
        run(llama, tokens(1, 300))
    with pytest.raises(InputError, match="vocabulary of 256"):
        run(llama, torch.full((1, 8), 256))
    with pytest.raises(InputError, match="not the same model"):
        run(llama, tokens(), against=other)
    with pytest.raises(InputError, match="two tokens"):
        run(llama, torch.zeros(3, 1, dtype=torch.long))


def test_damage_shows_as_null_and_never_as_a_number(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    broken = noisy(tiny_model("llama"), tmp_path / "broken", amount=math.nan)
    found = run(open_source(broken), tokens(2), against=open_source(tiny_model("llama")))
    assert math.isnan(found.nll.value)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["nll"]["value"] is None and plain["original_nll"]["value"] > 0


def test_an_attention_policy_sees_every_block_and_replaces_it(
    tiny_model: Callable[..., Path],
) -> None:
    ids = tokens(2)
    for model_type in ("llama", "gemma2", "opt"):
        source = open_source(tiny_model(model_type))
        seen: list[int] = []

        def watch(unit: Any, seen: list[int] = seen) -> Callable[[AttentionCall], Tensor]:
            def hook(call: AttentionCall) -> Tensor:
                seen.append(call.layer)
                assert call.query.shape[2] == 40 and call.key.shape == call.value.shape
                return call.plain(call.query, call.key, call.value)

            return hook

        found = run(source, ids, against=source, attention=watch)
        assert sorted(set(seen)) == [0, 1]
        assert found.kl is not None and found.kl.value == 0, "the same attention, bit for bit"

        def silent(unit: Any) -> Callable[[AttentionCall], Tensor]:
            return lambda call: torch.zeros_like(call.plain(call.query, call.key, call.value))

        changed = run(source, ids, against=source, attention=silent)
        assert changed.kl is not None and changed.kl.value > 1e-3

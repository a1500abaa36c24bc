"""Streaming attention, head gates and retrieval scores against vectors made with the reference
implementations."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from compressor_calibration.passkeys import WORDS
from torch import Tensor, nn

from compressor.attention.evaluation import policy_attention
from compressor.attention.policy import AttentionPolicy
from compressor.attention.rules.streaming import head_layers, token_mask
from compressor.ir.layout import AttentionShape, Mixer, UnitLayout
from compressor.ir.unit import Unit
from compressor.methods.common.copy_scores import copied
from compressor.methods.common.needles import Needles, make_row
from compressor.methods.duo_attention.two_stream import TwoStream, _Mix
from compressor.numerics.head_gates import distillation_loss, full_first, keep_full, reorder_rows
from compressor.runner.attention_call import AttentionCall
from tests.support.golden_files import vectors, vectors_and_notes


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / value.shape[-1] ** 0.5
    length = scores.shape[-1]
    mask = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def attended(
    q: Tensor, k: Tensor, v: Tensor, policy: AttentionPolicy, *, rotary: object = None
) -> Tensor:
    """The first block's attention of q [rows, heads, length, head_dim] under a policy."""
    shape = AttentionShape(heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[-1])
    layout = UnitLayout(
        name="0", kind="block", index=0, tensors=(), mixers=(Mixer("self", "0.self_attn", shape),)
    )
    hook = policy_attention(policy)(Unit(layout=layout, tensors={}))
    assert hook is not None
    call = AttentionCall(0, q, k, v, None, q.shape[-1] ** -0.5, plain, rotary)
    return hook(call)


def all_streaming(heads: int, kv_heads: int, *, sinks: int, window: int, positions: str = "text"):
    layers = head_layers(torch.ones(1, kv_heads), sinks=sinks, window=window)
    return AttentionPolicy(heads=heads, kv_heads=kv_heads, positions=positions, layers=layers)


def test_streaming_mask_and_output_are_duo_attentions() -> None:
    given = vectors("attention/duo_streaming_gate_mix")
    place = torch.arange(40)
    mask = token_mask(place, place, sinks=4, window=8)
    assert torch.equal(mask, given["streaming_mask"][0, 0].bool())
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    found = attended(q, k, v, all_streaming(4, 2, sinks=4, window=8))
    torch.testing.assert_close(found, given["streaming_out"], atol=1e-5, rtol=1e-4)


def test_slot_positions_are_streaming_llms() -> None:
    """One masked pass gives what the reference decodes token by token. Its cache of 4 + 12 is read
    together with the step's own token: a window of 13."""
    given = vectors("attention/streamingllm_pos_shift_decode")
    x = given["x"][0]
    angles = torch.arange(40)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = (torch.cat([f(angles), f(angles)], dim=-1) for f in (torch.cos, torch.sin))

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    q = turned((x @ given["Wq"].T).reshape(40, 2, 8).transpose(0, 1))[None]
    k = turned((x @ given["Wk"].T).reshape(40, 1, 8).transpose(0, 1))[None]
    v = (x @ given["Wv"].T).reshape(40, 1, 8).transpose(0, 1)[None]
    policy = all_streaming(2, 1, sinks=4, window=13, positions="slot")
    out = attended(q, k, v, policy, rotary=(cos, sin))
    found = out.reshape(40, 16) @ given["Wo"].T
    torch.testing.assert_close(found, given["out"], atol=1e-5, rtol=1e-4)
    kept = given["kept_token_ids"][39]
    seen = token_mask(torch.tensor([39]), torch.arange(40), sinks=4, window=12)[0].nonzero()[:, 0]
    assert torch.equal(kept, seen)


def test_gated_heads_mix_as_duo_attention_does() -> None:
    given = vectors("attention/duo_streaming_gate_mix")
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    mix = _Mix(sinks=4, window=8)
    mix.mix(given["alpha_raw"].clamp(0, 1), given["full_out"])
    found = mix(AttentionCall(0, q, k, v, None, 8**-0.5, plain))
    torch.testing.assert_close(found, given["mixed_out"], atol=1e-5, rtol=1e-4)


class ToyLayer(nn.Module):
    """Attention and a residual, as the reference's toy has it."""

    def __init__(self, runner: ToyRunner, index: int, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.runner, self.index = runner, index
        self.q, self.k, self.v, self.o = (given[f"W{name}"][index] for name in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            (x @ w.T).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (self.q, self.k, self.v)
        )
        out = self.runner.hook(AttentionCall(self.index, q, k, v, None, 8**-0.5, plain))
        return x + out.flatten(2) @ self.o.T


class ToyRunner:
    """What TwoStream asks of a runner, over the toy's layers."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self.layers = [ToyLayer(self, i, given) for i in range(2)]
        self.x = given["x"]
        self.names = SimpleNamespace(norm="norm")
        self.model = SimpleNamespace(get_submodule=lambda name: nn.Identity())

    def embed(self, tensors: object, ids: Tensor, *, batch: int) -> Tensor:
        return self.x

    def arguments(self, index: int, length: int) -> dict[str, Tensor]:
        return {}

    @contextmanager
    def loaded(self, unit: UnitLayout, tensors: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(layer=self.layers[unit.index])

    @contextmanager
    def head(self, tensors: object, weight: Tensor) -> Iterator[None]:
        yield

    @contextmanager
    def attention(self, hook: object) -> Iterator[None]:
        self.hook = hook
        yield


def test_loss_and_gradient_of_two_layers_are_duo_attentions() -> None:
    given = vectors("attention/duo_loss_two_layer")
    units = [UnitLayout(name=str(i), kind="block", index=i, tensors=()) for i in range(2)]
    ends = [UnitLayout(name=kind, kind=kind, index=0, tensors=()) for kind in ("embedding", "head")]
    model = SimpleNamespace(
        layout=SimpleNamespace(units=[ends[0], *units, ends[1]], blocks=units),
        runner=ToyRunner(given),
        tensors=lambda index: {},
        dtype=torch.float32,
    )
    gates = given["gates"].clone().requires_grad_()
    with TwoStream(model, sinks=4, window=8).loaded() as streams:
        pair = streams.run(torch.zeros(1, 40, dtype=torch.long), gates.clamp(0, 1))
        distilled = distillation_loss(pair.full, pair.gated, given["label_mask"].bool())
        loss = distilled + 0.05 * gates.abs().mean()
        loss.backward()
    torch.testing.assert_close(pair.full, given["full_hidden"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pair.gated, given["pruned_hidden"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(distilled[None], given["distill_loss"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss[None], given["loss"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gates.grad, given["gate_grad"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", ["0.0", "0.25", "0.5", "0.75", "1.0"])
def test_the_same_heads_stay_full(share: str) -> None:
    given = vectors("attention/duo_sparsify_reorder")
    full = keep_full(given["raw"], float(share))
    assert torch.equal(full.double(), given[f"binary_{share}"])
    assert float(1 - full.double().mean()) == pytest.approx(float(given[f"actual_{share}"]))


def test_rows_are_reordered_as_the_reference_does() -> None:
    given = vectors("attention/duo_sparsify_reorder")
    order = full_first(given["reorder_heads"] > 0.5)
    found = reorder_rows(given["reorder_in"], order, size=6)
    assert torch.equal(found, given["reorder_out"])


def test_passkey_rows_are_built_like_the_reference_rows() -> None:
    """Of one of its rows: prompt, text with needles, then questions whose answers are the keys."""
    given, about = vectors_and_notes("attention/duo_passkey_dataset")
    vocabulary = json.loads(about["vocab"])
    # The file names only the words that it holds.
    vocabulary |= {word: 400 + i for i, word in enumerate(WORDS) if word not in vocabulary}

    def encode(text: str, **options: object) -> dict[str, list[int]]:
        words = text.replace("\n\n", " \0\0 ").replace("\n", " \n ").replace("\0\0", "\n\n")
        return {"input_ids": [vocabulary.get(word, 2) for word in words.split(" ") if word]}

    data = Needles(
        keys=3, words=6, prefix="<|im_start|> This is a very long story book: <book> ",
        needle="\n\nRemeber this sequence of words, it's the {ordinal} passkey to the vault: "
        "{passkey}\n\n",
    )  # fmt: skip
    theirs, labels = given["input_ids_0"].tolist(), given["labels_0"]
    tail = int((labels != -100).sum())
    words = set(vocabulary.values())
    text = [token for token in range(2, 305) if token not in words] * 8
    row = make_row(encode, text, data=data, length=len(theirs), draw=random.Random(0))
    assert int(row.scored.sum()) == tail and bool(row.scored[-tail:].all())
    names = {vocabulary[word] for word in WORDS}

    def frame(ids: list[int]) -> list[int]:
        """The row without haystack, every key's word alike."""
        kept = [i for i in ids if i > 304 or i == vocabulary["<bos>"]]
        return [-1 if i in names else i for i in kept]

    assert frame(row.ids.tolist()) == [i for i in frame(theirs) if i != vocabulary["<bos>"]]
    for answer in row.answers:
        hidden, told = (row.ids[slice(*span)] for span in (answer.hidden, answer.given))
        assert torch.equal(hidden, told) and set(hidden.tolist()) <= names


def test_copy_scores_are_the_reference_scores() -> None:
    """The reference's attention weights stand in for a model's: their argmax is what counts."""
    given, about = vectors_and_notes("attention/retrieval_head_score")
    begin, end = int(about["needle_start"]), int(about["needle_end"])
    for sample in range(2):
        counted = torch.zeros(3, 4)
        for step, token in enumerate(given["generated_ids"][sample].tolist()):
            looked = given["attn"][sample, step].argmax(-1)
            prompt = given["prompt_ids"]
            counted += copied(looked, prompt, token, hidden=(begin, end)).float()
        counted /= end - begin
        torch.testing.assert_close(counted, given["score_per_sample"][sample])

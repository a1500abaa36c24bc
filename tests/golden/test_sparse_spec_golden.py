"""SparseSpec's choice of keys and rejection sampling against vectors of its code."""

import json

import pytest
import torch
from compressor_kernels.attention.verify_attention import critical_keys_ref, key_shares_ref
from torch import Tensor

from compressor.attention.evaluation import by_query_head
from compressor.attention.masked import OwnAttention, softmax_attention
from compressor.attention.rope import rotated
from compressor.attention.rule import RuleCall
from compressor.attention.rules.pillar import KEYS, Pillar
from compressor.numerics.rejection import emitted_tokens, kept_share
from tests.support.golden_files import vectors, vectors_and_notes


def test_one_choice() -> None:
    golden, notes = vectors_and_notes("attention/sparsespec_pillar_select")
    q, k = (golden[x].transpose(0, 1)[None] for x in "qk")
    shares = key_shares_ref(q, k)
    torch.testing.assert_close(shares[0, :, :195], golden["scores"][:, :195], atol=1e-5, rtol=1e-4)
    rule = Pillar(ratio=float(notes["budget_ratio"]), min_budget=int(notes["min_budget"]))
    recent = int(notes["num_recent"])
    keys = critical_keys_ref(shares, length=200, recent=recent, budget=rule.budget(200))
    assert torch.equal(keys[0].sort(-1).values, golden["draft_indices"].sort(-1).values.int())


def test_a_loop_of_rounds() -> None:
    """Drafts, verification, choice of keys and retraction of a toy model without MLPs."""
    golden, notes = vectors_and_notes("systems/sparsespec_loop")
    rule = Pillar(
        stride=int(notes["spec_stride"]),
        ratio=float(notes["budget_ratio"]),
        min_budget=int(notes["min_budget"]),
    )
    memories: list[dict[str, Tensor]] = [{}, {}]
    caches = [[torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16)] for _ in range(2)]

    def run(tokens: list[int], phase: str) -> Tensor:
        hidden = golden["embed"][tokens][None]
        for layer in range(2):
            x = normed(hidden)
            start = caches[layer][0].shape[2]
            heads = [
                (x @ golden[f"layer{layer}.{n}"]).unflatten(-1, (-1, 16)).transpose(1, 2)
                for n in "qkv"
            ]
            q, k = (rotate(part, start) for part in heads[:2])
            for at, new in enumerate((k, heads[2])):
                caches[layer][at] = torch.cat([caches[layer][at], new], 2)
            key, value = caches[layer]
            places = torch.arange(key.shape[2])
            call = RuleCall(q, key, places, 0.25, memory=memories[layer])
            mask = places <= call.own[:, None]
            if phase == "draft":
                mask = by_query_head(rule.seen(call)(slice(None)), 4)
            elif phase == "verify":
                rule.watch(call)
            out = softmax_attention(q, key, value, mask.expand(1, 4, -1, -1), OwnAttention(0.25))
            hidden = hidden + out.transpose(1, 2).flatten(2) @ golden[f"layer{layer}.o"]
        return (normed(hidden)[0] @ golden["head"]).softmax(-1)

    def crop(length: int) -> None:
        for layer in range(2):
            caches[layer] = [x[:, :, :length] for x in caches[layer]]

    run(golden["prompt"].tolist(), "prompt")
    text = [*golden["prompt"].tolist(), int(golden["first_token"])]
    for number, told in enumerate(json.loads(notes["rounds"])):
        known = len(text) - 1
        assert known == told["kv_len_before"]
        drafts, at = golden[f"r{number}.draft_ids"].tolist(), [text[-1]]
        likely = []
        for token in drafts:
            likely.append(run(at, "draft")[0])
            at = [token]
        want = golden[f"r{number}.draft_probs"]
        torch.testing.assert_close(torch.stack(likely), want, atol=2e-4, rtol=1e-3)
        if number:  # what this round read was chosen after the one before
            chosen = golden[f"r{number - 1}.selected"]
            for layer in range(2):
                keys = memories[layer][KEYS][0]
                for mine, theirs in zip(keys.tolist(), chosen[layer].tolist(), strict=True):
                    assert set(mine[: len(theirs)]) == set(theirs)
        crop(known)
        target = run([text[-1], *drafts], "verify")
        torch.testing.assert_close(target, golden[f"r{number}.target_probs"], atol=2e-4, rtol=1e-3)
        new = emitted_tokens(
            torch.tensor(drafts),
            want,
            golden[f"r{number}.target_probs"],
            uniform=golden[f"r{number}.uniform"],
            exponential=golden[f"r{number}.exponential"][0],
            bonus=int(golden[f"r{number}.bonus"]),
        )
        assert new == golden[f"r{number}.emitted"].tolist()
        text += new
        crop(known + len(new))
        assert known + len(new) == told["kv_len_after"]
    assert text == golden["tokens"].tolist()


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotate(x: Tensor, start: int) -> Tensor:
    place = torch.arange(start, start + x.shape[2]).float()
    angle = place[:, None] / 10000 ** (torch.arange(0, 16, 2) / 16)
    angle = torch.cat([angle, angle], -1)
    return rotated(x, (angle.cos(), angle.sin()))


def test_what_is_emitted_is_distributed_as_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    draft, target = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.5, 0.4]])
    counts, rounds = torch.zeros(3), 4000
    for _ in range(rounds):
        token = torch.multinomial(draft, 1, generator=generator)
        (first, *_) = emitted_tokens(
            token,
            draft[None],
            target[None],
            uniform=torch.rand(1, generator=generator),
            exponential=torch.empty(3).exponential_(generator=generator),
            bonus=0,
        )
        counts[first] += 1
    assert (counts / rounds - target).abs().max() < 0.03
    assert float(kept_share(draft, target)) == pytest.approx(0.5)


def test_rejection() -> None:
    golden = vectors("systems/sparsespec_rejection")
    start = 0
    for row, many in enumerate(golden["num_draft"].tolist()):
        part = slice(start, start + many)
        found = emitted_tokens(
            golden["draft_token_ids"][part],
            golden["draft_probs"][part],
            golden["target_probs"][part],
            uniform=golden["uniform"][part],
            exponential=golden["exponential"][row],
            bonus=int(golden["bonus_token_ids"][row]),
        )
        want = [x for x in golden["output_token_ids"][row].tolist() if x >= 0]
        assert found == want
        assert len(found) == int(golden["emitted"][row])
        start += many
    kept = kept_share(golden["draft_probs"], golden["target_probs"])
    torch.testing.assert_close(kept, golden["expected_acceptance"])

"""How many drafts of SparseSpec (arXiv 2512.01278) a model would keep on a text, without decoding.

Teacher-forced: the second half of a text is cut into rounds of drafts and one more token, each
verified whole. In one walk over the blocks run the model's own hidden states and, for every
setting, those of its drafts: a draft reads verified keys that the round before chose, and the
drafts' own since. What two distributions of the next token share is how likely its draft is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressor_kernels.attention.verify_attention import critical_keys_ref, key_shares_ref
from torch import Tensor

from compressor.attention.rules.pillar import Pillar
from compressor.numerics.rejection import expected_length, kept_share
from compressor.runner.attention_call import AttentionCall
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Execution, Progress, sweep


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of one setting, means over rounds.

    kept    drafts of a round that are kept, sampled at temperature 1;  greedy  the likeliest tokens
    read    share of the keys that a draft reads, of those that a full step does
    mass    by layer, share of attention that these keys hold for the first draft of a round
    """

    rule: Pillar
    kept: float
    greedy: float
    read: float
    mass: tuple[float, ...]


def measure_acceptance(
    model: SourceModel,
    ids: Tensor,
    settings: Sequence[Pillar],
    *,
    progress: Progress = lambda name, done, total: None,
) -> list[Acceptance]:
    """Measure settings on rows of tokens [rows, length]."""
    drafts = [_Drafts(rule, ids.shape[1]) for rule in settings]
    models = [model] * (1 + len(settings))
    own: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    hidden: list[Tensor] = []
    for step in sweep(models, ids, execution=Execution(1, progress=progress)):
        if step.number == 0:

            def keep(call: AttentionCall) -> Tensor:
                own[call.first_row] = (call.query, call.key, call.value)
                return call.plain(call.query, call.key, call.value)

            step.run(hook=keep)
        else:
            mine, layer = drafts[step.number - 1], step.layout.index

            def draft(call: AttentionCall, mine: _Drafts = mine, layer: int = layer) -> Tensor:
                return mine.attend(call, own[call.first_row], layer)

            step.run(hook=draft)
        hidden = [stream.hidden for stream in step.streams]
    found: list[Acceptance] = []
    with model.logits() as logits:
        for number, mine in enumerate(drafts, 1):
            kept, greedy, rounds = 0.0, 0.0, 0
            for row in range(len(ids)):
                for start in mine.starts:
                    at = slice(start, start + mine.rule.stride)
                    target, draft_of = (
                        logits(hidden[of][row, at]).float().softmax(-1) for of in (0, number)
                    )
                    kept += float(expected_length(kept_share(draft_of, target)))
                    same = (draft_of.argmax(-1) == target.argmax(-1)).float()
                    greedy += float(expected_length(same))
                    rounds += 1
            layers = sorted(mine.mass)
            found.append(
                Acceptance(
                    rule=mine.rule,
                    kept=kept / rounds,
                    greedy=greedy / rounds,
                    read=mine.read / mine.steps,
                    mass=tuple(mine.mass[n] / mine.calls[n] for n in layers),
                )
            )
    return found


class _Drafts:
    """The drafts of one setting in a text of `length` tokens, all rounds at once."""

    def __init__(self, rule: Pillar, length: int) -> None:
        self.rule = rule
        span = rule.stride + 1
        self.starts = range(max(span, length // 2), length - span + 1, span)
        self.mass: dict[int, float] = {}
        self.calls: dict[int, int] = {}
        self.read = 0.0
        self.steps = 0

    def attend(self, call: AttentionCall, own: tuple[Tensor, Tensor, Tensor], layer: int) -> Tensor:
        """Attention of a row, [1, length, heads, head_dim]: drafts where a round is, else the
        model's own, which the rest of the text would have had."""
        query, key, value = own
        out: Tensor = call.plain(call.query, call.key, call.value)
        group, span = call.query.shape[1] // key.shape[1], self.rule.stride + 1
        for start in self.starts:
            before, now = slice(start - span, start), slice(start, start + span)
            shares = key_shares_ref(query[:, :, before], key[:, :, :start], scale=call.scaling)
            chosen = critical_keys_ref(
                shares, length=start, recent=span + 1, budget=self.rule.budget(start)
            )
            past = torch.zeros((*chosen.shape[:2], start), dtype=torch.bool, device=key.device)
            past.scatter_(-1, chosen.long(), True)
            new = torch.ones((span, span), dtype=torch.bool, device=key.device).tril()
            mask = torch.cat(
                [past[:, :, None].expand(-1, -1, span, -1), new.expand(*past.shape[:2], -1, -1)], -1
            ).repeat_interleave(group, dim=1)
            keys, values = (
                torch.cat([old[:, :, :start], mine[:, :, now]], 2)
                for old, mine in ((key, call.key), (value, call.value))
            )
            out[:, now] = call.plain(call.query[:, :, now], keys, values, mask)
            self._note(query[:, :, now], key[:, :, : start + span], mask, call.scaling, layer)
        return out

    def _note(self, query: Tensor, key: Tensor, mask: Tensor, scaling: float, layer: int) -> None:
        """What the first draft of a round reads, and what attention has there."""
        kept = key.shape[2] - query.shape[2] + 1
        keys = key[:, :, :kept].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        share = ((query[:, :, :1] @ keys.transpose(-1, -2)).float() * scaling).softmax(-1)
        seen = mask[:, :, :1, :kept]
        self.mass[layer] = self.mass.get(layer, 0.0) + float((share * seen).sum(-1).mean())
        self.calls[layer] = self.calls.get(layer, 0) + 1
        self.read += float(seen.float().mean())
        self.steps += 1

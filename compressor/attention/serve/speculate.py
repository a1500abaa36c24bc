"""Self-speculative decoding: a model drafts tokens under a policy's rule for drafts and verifies
them with its own attention, so that what it gives is what it would have given without drafts."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.attention.evaluation import check_length
from compressor.attention.serve.attach import Runtime
from compressor.errors import InputError
from compressor.numerics.rejection import emitted_tokens


@dataclass(frozen=True, slots=True)
class Speculated:
    """A text [1, length], prompt included; and how many tokens each round of drafts gave, its
    last, which is the target's own, included."""

    ids: Tensor
    rounds: tuple[int, ...]

    @property
    def kept(self) -> float:
        """Drafts that were kept in a round, on average."""
        return sum(self.rounds) / max(1, len(self.rounds)) - 1


@torch.no_grad()
def speculate(
    runtime: Runtime,
    ids: Tensor,
    *,
    max_new_tokens: int,
    stride: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
) -> Speculated:
    """Continue a prompt [1, length] with rounds of `stride` drafts, each verified at once.

    temperature 0 takes the likeliest token: the text is that of plain greedy decoding, but where
    two tokens are so near that a pass over several positions and one over a single one round them
    apart. Above, tokens are distributed as plain sampling distributes them. Ends after a token of
    `stop`. Raises InputError for more than one row, or numbers that say nothing.
    """
    if stride < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise InputError(
            f"nothing can be drafted with a stride of {stride}, {max_new_tokens} new tokens and "
            f"temperature {temperature}"
        )
    if ids.shape[0] != 1:
        raise InputError(f"{ids.shape[0]} rows cannot be drafted together: they would part")
    model, options = runtime.model, runtime.options()
    (cache,) = options.values()

    def shares(tokens: Tensor) -> Tensor:
        """Distributions after tokens [n], [n, vocabulary]."""
        logits: Tensor = model(tokens[None], **options).logits[0].float()
        if temperature > 0:
            return (logits / temperature).softmax(-1)
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()

    def draw(share: Tensor) -> int:
        if temperature <= 0:
            return int(share.argmax())
        return int((share / _exponential(share, generator)).argmax())

    text = ids[0].tolist()
    wanted = len(text) + max_new_tokens
    check_length(runtime.policy, wanted)
    target = shares(ids[0])[-1]
    text.append(draw(target))
    rounds = []
    while len(text) < wanted and text[-1] not in stop:
        known = len(text) - 1  # tokens whose keys stay: all but the last
        last = torch.tensor(text[-1:], device=ids.device)
        drafts, likely = [], []
        with runtime.drafting():
            for _ in range(min(stride, wanted - len(text))):
                share = shares(last)[-1]
                likely.append(share)
                drafts.append(draw(share))
                last = torch.tensor(drafts[-1:], device=ids.device)
        cache.crop(known)
        with runtime.verifying():
            found = shares(torch.tensor([text[-1], *drafts], device=ids.device))
        new = emitted_tokens(
            torch.tensor(drafts),
            torch.stack(likely),
            found[:-1],
            uniform=torch.rand(len(drafts), generator=generator, device=found.device),
            exponential=_exponential(found[0], generator),
            bonus=draw(found[-1]),
        )
        for place, token in enumerate(new):
            if token in stop:
                new = new[: place + 1]
                break
        text += new
        rounds.append(len(new))
        cache.crop(known + len(new))
    return Speculated(torch.tensor([text[:wanted]], device=ids.device), tuple(rounds))


def _exponential(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).exponential_(generator=generator)

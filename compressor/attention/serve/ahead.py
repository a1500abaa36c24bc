"""What blocks of a running model say of the keys of the blocks after them."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compressor.attention.policy import AttentionPolicy
from compressor.attention.rope import Rotary
from compressor.attention.rule import Rule
from compressor.checkpoint.reader import open_checkpoint
from compressor.errors import InputError


def stored_tensors(folder: Path, policy: AttentionPolicy) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder that a policy's rules read ahead, by name."""
    needs = {need for _, _, need in _needs(policy)}
    if not needs:
        return {}
    checkpoint = open_checkpoint(folder)
    names = [name for name in checkpoint.entries if _place(name, needs) is not None]
    return checkpoint.read(names) if names else {}


class Ahead:
    """What was said for each layer's rules, during one forward pass of a model."""

    def __init__(self, policy: AttentionPolicy, tensors: Mapping[str, Tensor]) -> None:
        """Raises InputError where a rule lacks a tensor."""
        self.policy = policy
        self._weights: dict[tuple[int, str], Tensor] = {}
        self._told: dict[int, list[tuple[int, Rule, tuple[int, str]]]] = {}
        self._said: dict[tuple[int, str], Tensor] = {}
        needs = _needs(policy)
        wanted = {need for _, _, need in needs}
        for name, tensor in tensors.items():
            place = _place(name, wanted)
            if place is not None:
                self._weights[place] = tensor
        for layer, rule, need in needs:
            if need not in self._weights:
                raise InputError(
                    f"layer {layer} attends by {rule.kind}, whose tensor the checkpoint lacks",
                    hint=f"attach the policy of the folder that holds {need[1]} of layer {need[0]}",
                )
            self._told.setdefault(need[0], []).append((layer, rule, need))

    def enter(self, layer: int, hidden: Tensor, rotary: Rotary | None) -> None:
        """Note what layer `layer` says, from what enters its attention [rows, length, hidden];
        rotary [length, channels]."""
        for index, rule, need in self._told.get(layer, ()):
            weight = self._weights[need] = self._weights[need].to(hidden.device, hidden.dtype)
            self._said[index, rule.kind] = rule.look_ahead(
                hidden, weight, kv_heads=self.policy.kv_heads, rotary=rotary
            )

    def take(self, rule: Rule, layer: int) -> Tensor | None:
        """What was said for a rule of this layer, [rows, kv_heads, length, …], once."""
        return self._said.pop((layer, rule.kind), None)


def _needs(policy: AttentionPolicy) -> list[tuple[int, Rule, tuple[int, str]]]:
    """Layer, rule, and the block and name of the tensor that it needs."""
    return [
        (index, rule, need)
        for index, layer in enumerate(policy.layers)
        for rule in layer.rules
        if (need := rule.ahead_tensor(index)) is not None
    ]


def _place(name: str, needs: set[tuple[int, str]]) -> tuple[int, str] | None:
    """The needed tensor that a checkpoint's name means: `….BLOCK.ATTENTION.LAST PART`."""
    for need in needs:
        if re.fullmatch(rf".*\.{need[0]}\.[^.]+\.{re.escape(need[1])}", name):
            return need
    return None

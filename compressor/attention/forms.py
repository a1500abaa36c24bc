"""Forms in which other runtimes read a policy."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from compressor.attention.policy import AttentionPolicy
from compressor.attention.rule import rule_module, rule_names
from compressor.errors import InputError


def policy_forms() -> dict[str, Callable[..., dict[str, bytes]]]:
    """By name: functions of a policy, the tensors stored with it and the model's name. Those of
    one rule are in `FORMS` of its file."""
    modules = [rule_module(name) for name in rule_names()]
    own = {name: form for m in modules for name, form in getattr(m, "FORMS", {}).items()}
    return {"config": config_files, **own}


def config_files(
    policy: AttentionPolicy, tensors: Mapping[str, Tensor], *, model: str
) -> dict[str, bytes]:
    """`config.json` with nothing but what runtimes read there of the rules: ModelOpt's
    `sparse_attention_config` of BLASST, MiniCPM4's `sparse_config` of InfLLM-V2. Raises InputError
    where the rules have no such entry, or layers differ in one."""
    rules = dict.fromkeys(rule for layer in policy.layers for rule in layer.rules)
    entries: dict[str, Any] = {}
    for rule in rules:
        for name, value in rule.config().items():
            if entries.setdefault(name, value) != value:
                raise InputError(f"layers differ in {name}, which config.json says once")
    if mute := {rule.kind for rule in rules if not rule.config()}:
        raise InputError(
            f"no runtime reads {', '.join(sorted(mute))} from config.json",
            hint="in transformers compressor.attention.serve reads attention_policy.json as it is",
        )
    return {"config.json": (json.dumps(entries, indent=2) + "\n").encode()}

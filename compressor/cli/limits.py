"""Limits of a gate on the command line."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from compressor.errors import InputError, Problems
from compressor.evaluate.gate import Gate
from compressor.foreign.bounded_yaml import load_yaml
from compressor.plan.explain import explain


def parse_gate(
    limits: Sequence[str], *, against_original: bool, passkey: bool, tasks: Sequence[str]
) -> Gate | None:
    """The gate of `NAME=LIMIT` options, names as under a recipe's `gate:`; None without any.

    Raises InputError or Problems for limits that are none, or that nothing here measures.
    """
    if not limits:
        return None
    data: dict[str, Any] = {}
    for limit in limits:
        name, separator, value = limit.partition("=")
        if not separator:
            raise InputError(f"--gate {limit!r} has no '='", hint="--gate kl=0.05")
        number = _number(value)
        if name.startswith("tasks."):
            data.setdefault("tasks", {})[name.removeprefix("tasks.")] = number
        else:
            data[name] = number
    try:
        gate = Gate.model_validate(data)
    except ValidationError as error:
        raise Problems([*explain(error, Gate, "--gate ")]) from error
    missing = gate.unmeasured(against_original=against_original, passkey=passkey, tasks=tasks)
    missing += ["layer_error"] if gate.layer_error is not None else []
    if missing:
        raise InputError(
            f"--gate: nothing here measures {', '.join(missing)}",
            hint="ppl_ratio, kl and top1 need --against, passkey --passkey, tasks.NAME --task "
            "NAME; the errors of single layers are a run's",
        )
    return gate


def _number(text: str) -> Any:
    """What YAML reads; what it cannot read as it stands, for the gate to refuse by name."""
    try:
        return load_yaml(text)
    except ValueError:
        return text

"""What a run would die of beyond names and shapes, tried before it begins.

transformers builds the model from its config.json without memory for weights, each kind of block is
held against the checkpoint's tensors and run once on the meta device, and the tokenizer is loaded.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compressor.checkpoint.source import Source
from compressor.errors import CompressError, InputError, Problems, several
from compressor.foreign.calls import foreign
from compressor.ir.layout import UnitLayout, is_bias
from compressor.plan.plan import Plan
from compressor.runner.block_runner import BlockRunner
from compressor.runner.experts import experts_of
from compressor.runner.handed import made, of_tokens, taken
from compressor.runner.tokenizer import GuardedTokenizer, load_tokenizer

Result = TypeVar("Result")

LENGTH = 8
"""Tokens of the one row that is run."""

DTYPE = torch.bfloat16
"""What every kernel for experts takes."""

NO_DATA = ("meta", "data-dependent", "data dependent")
"""Words of what PyTorch says where an operator needs values, which are not there without data."""

REFUSED = "transformers cannot run this model as config.json describes it"
SHOWN = 4


def preflight(plan: Plan) -> tuple[GuardedTokenizer | None, list[CompressError]]:
    """The tokenizer, and all that is wrong with what a run will need of transformers; nothing is
    tried where it runs no token."""
    problems: list[CompressError] = []
    for step in plan.recipe.passes:
        _try(partial(step.params.try_model, plan.source), problems)
    tried = plan.recipe.audit is not None and not plan.recipe.audit.weights_only
    if not plan.calibrated and plan.recipe.evaluate is None and not tried:
        return None, problems
    tokenizer = _try(lambda: load_tokenizer(plan.source.checkpoint.folder), problems)
    observed = frozenset(site for unit in plan.units for site in unit.needs)
    _try(lambda: check_model(plan.source, observed), problems)
    return tokenizer, problems


def _try(check: Callable[[], Result], problems: list[CompressError]) -> Result | None:
    try:
        return check()
    except Problems as error:
        problems += error.problems
    except InputError as error:
        problems.append(error)
    return None


def check_model(source: Source, observed: Collection[str] = ()) -> None:
    """Raises InputError, or Problems, for a config.json whose model is not that of the
    checkpoint's tensors, or does not run, or whose experts have sites that cannot be observed.

    observed  sites of blocks whose inputs a method reads
    """
    runner = BlockRunner(
        source.checkpoint.config,
        source.arch.runtime,
        device=torch.device("cpu"),
        dtype=DTYPE,
    )
    layout = source.layout
    embedding, blocks, head = layout.embedding, layout.blocks, layout.head
    if len(runner.layers) != len(blocks):
        raise InputError(
            f"config.json describes {len(runner.layers)} blocks, the checkpoint has {len(blocks)}"
        )
    kinds: dict[Any, UnitLayout] = {}
    for unit in blocks:
        # What one block fills is read by others, whatever their kind.
        apart = unit.index if "filled" in runner.names.handed.values() else None
        kinds.setdefault((apart, _kind(source, unit)), unit)
    problems: list[CompressError] = []
    ends = [
        *embedding.tensors,
        *(n for n in head.tensors if n.startswith(source.arch.head.norm.name)),
    ]
    whole = runner.model.state_dict()
    state = runner.names.outer_state({name: _stand_in(source, head, name) for name in ends})
    problems += _differences(state, {n: whole[n] for n in whole if n in state}, where="the model")
    for unit in kinds.values():
        layer = runner.layers[unit.index]
        tensors = {name: _stand_in(source, unit, name) for name in unit.tensors}
        with foreign(REFUSED):
            state = runner.names.block_state(unit, tensors)
        differences = _differences(state, layer.state_dict(), where=unit.name)
        problems += differences
        # A layer that is another has no modules to look at.
        for linear in () if differences else unit.linears:
            if linear.role == "expert.down" and linear.site in observed:
                path = runner.names.linear_path(unit, linear)
                _try(partial(experts_of, layer.get_submodule(path)), problems)
                break
    if problems:
        raise Problems(problems)
    with foreign(REFUSED):
        arguments = runner.arguments_of(1, LENGTH, {})
    hidden = torch.empty(1, LENGTH, layout.sizes.hidden, dtype=DTYPE, device="meta")
    handing = runner.names.handed
    handed = of_tokens(handing, arguments)
    with torch.no_grad(), foreign(REFUSED):
        for unit in kinds.values():
            if handing and unit.index and not handed:
                continue  # no block before it ran to its end
            given = {**arguments[unit.index], **taken(handing, unit.index, handed)}
            out = _forward(runner.layers[unit.index], hidden, given)
            if out is not None:
                outputs = out if isinstance(out, tuple) else (out,)
                handed |= made(handing, given, outputs, handed)
        _forward(runner.model.get_submodule(runner.names.norm), hidden, {})


def _kind(source: Source, unit: UnitLayout) -> Any:
    """What is alike in blocks that one check does for: tensors, and what config.json says of each
    block."""
    config, count = source.checkpoint.config, len(source.layout.blocks)
    inner = config.get(source.arch.config or "")
    said = {**config, **(inner if isinstance(inner, dict) else {})}
    lists = {k: v for k, v in said.items() if isinstance(v, list) and len(v) == count}
    named = [(key, lists[key][unit.index]) for key in sorted(lists)]
    shapes = [
        (name.removeprefix(unit.name), tuple(_stand_in(source, unit, name).shape))
        for name in unit.tensors
    ]
    return str(named), tuple(shapes)


def _stand_in(source: Source, unit: UnitLayout, name: str) -> Tensor:
    """A tensor of the checkpoint in its shape, without data; of a packed weight, the weight's."""
    shapes = {linear.weight_name: linear.shape for linear in unit.linears}
    entries = source.checkpoint.entries
    shape = shapes[name] if name in shapes else entries[name].spec.shape
    return torch.empty(shape, device="meta")


def _differences(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str
) -> list[InputError]:
    """What the model of config.json and the checkpoint's tensors disagree on."""
    lacking = sorted(expected.keys() - state.keys())
    beyond = sorted(state.keys() - expected.keys())
    other = sorted(
        f"{name} {list(state[name].shape)}, not {list(expected[name].shape)}"
        for name in state.keys() & expected.keys()
        if state[name].shape != expected[name].shape
    )
    biases = any(is_bias(name) for name in (*lacking, *beyond))
    hint = "biases follow keys such as attention_bias and mlp_bias" if biases else None
    found = [
        (lacking, "needs what the checkpoint does not have"),
        (beyond, "has no place for what the checkpoint has"),
        (other, "has other shapes than the checkpoint"),
    ]
    return [
        InputError(
            f"{where}: the model that config.json describes {what}: {several(names, SHOWN)}",
            hint=hint,
        )
        for names, what in found
        if names
    ]


def _forward(module: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Any:
    """Run a module without data, as far as it goes: experts are chosen by values. Its output, or
    None where it did not go to its end."""
    try:
        return module(hidden, **{name: _on_meta(value) for name, value in arguments.items()})
    except (RuntimeError, NotImplementedError) as error:
        if not any(word in str(error).lower() for word in NO_DATA):
            raise
    return None


def _on_meta(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_on_meta(item) for item in value)
    return value.to("meta") if isinstance(value, Tensor) else value

"""Applies to a loaded block what is stored beside its weights: quantized inputs and KV cache."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.layout import Linear, UnitLayout
from compressor.ir.scheme import ActivationSpec, KVSpec
from compressor.ir.unit import Unit
from compressor.numerics.activations import fake_quantize_activation, fake_quantize_kv
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.block import Block
from compressor.runner.experts import Entering


@dataclass(frozen=True, slots=True)
class StoredInput:
    """How a linear's input is quantized, with its stored multiplier where that is static."""

    spec: ActivationSpec
    scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The input [..., channels] as the linear sees it."""
        return fake_quantize_activation(x, self.spec, self.scale)


def stored_inputs(source: Source, unit: UnitLayout) -> dict[str, StoredInput]:
    """Module path → how its input is quantized, for the unit's linears whose inputs are."""
    found = {}
    for linear in unit.linears:
        spec = source.schemes.linears[linear.name].input
        if spec is not None:
            stored = spec.mode in ("static", "local")
            scale = _input_scale(source, linear) if stored else None
            found[linear.name] = StoredInput(spec, scale)
    return found


def _input_scale(source: Source, linear: Linear) -> Tensor:
    """The stored scale as a multiplier: `input_scale` is one, `input_global_scale` a divisor."""
    for leaf in ("input_scale", "input_global_scale"):
        name = f"{linear.name}.{leaf}"
        if name in source.checkpoint.entries:
            value = source.checkpoint.read([name])[name].float()
            return value if leaf == "input_scale" else 1 / value
    raise InputError(f"the checkpoint has no {linear.name}.input_scale")


@contextmanager
def quantized_inputs(block: Block, inputs: Mapping[str, StoredInput]) -> Iterator[None]:
    """Quantize what enters the named linears of a block, for the length of a `with`."""
    experts: dict[nn.Module, dict[tuple[int, str], StoredInput]] = {}
    with ExitStack() as stack:
        for linear in block.unit.linears:
            if linear.name not in inputs:
                continue
            module = block.module(linear)
            if linear.expert is None:
                hook = partial(_quantize_first, inputs[linear.name])
                stack.enter_context(module.register_forward_pre_hook(hook))
            else:
                part = linear.role.rpartition(".")[2]
                experts.setdefault(module, {})[linear.expert, part] = inputs[linear.name]
        for module, by_part in experts.items():
            before = vars(module).get("forward")
            module.forward = block.experts(module).forward(_entering(by_part))
            if before is None:
                stack.callback(delattr, module, "forward")
            else:
                stack.callback(setattr, module, "forward", before)
        yield


def _quantize_first(stored: StoredInput, module: nn.Module, args: tuple[Any, ...]) -> Any:
    return (stored(args[0]), *args[1:])


def _entering(inputs: Mapping[tuple[int, str], StoredInput]) -> Entering:
    """Quantizes the inputs of experts' linears, by expert and part."""

    def enter(expert: int, part: str, entering: Tensor) -> Tensor:
        stored = inputs.get((expert, part))
        return entering if stored is None else stored(entering)

    return enter


def quantized_kv(spec: KVSpec, unit: Unit, then: AttentionHook | None) -> AttentionHook:
    """Attention over a quantized cache: keys (after the rotary embedding) and values are rounded,
    then `then` attends, or the model's own attention where there is none."""
    scales = {
        leaf: tensor
        for name, tensor in unit.extra.items()
        if (leaf := name.rpartition(".")[2]) in ("k_scale", "v_scale")
    }

    def hook(call: AttentionCall) -> Tensor:
        rounded = replace(
            call,
            key=fake_quantize_kv(call.key, spec, scales.get("k_scale")),
            value=fake_quantize_kv(call.value, spec, scales.get("v_scale")),
        )
        if then is not None:
            return then(rounded)
        return rounded.plain(rounded.query, rounded.key, rounded.value)

    return hook

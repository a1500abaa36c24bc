"""A model on disk that runs with one unit in memory, or whole where gradients need its depth."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.source import Source
from compressor.ir.layout import ModelLayout, UnitLayout, weight_name
from compressor.ir.unit import Unit
from compressor.runner.activations import Activations
from compressor.runner.attention_call import AttentionHook
from compressor.runner.block_runner import Block, BlockRunner
from compressor.runner.simulate import quantized_inputs, quantized_kv, stored_inputs
from compressor.runner.tokenizer import load_tokenizer

Attending = Callable[[Unit], AttentionHook | None]
"""What attends in a block in place of the model's own attention, from the block's tensors."""


class SourceModel:
    """A source whose weights are never changed.


    attention  what attends in its blocks (None: as the model itself does)
    as_stored  run it with its inputs and its cache quantized, as the files say
    activations  where hidden states are kept that its blocks make; nowhere, if None
    experts    how many of a block's are in memory at a time, if not all
    quick      whether its blocks multiply float32 in bfloat16
    """

    def __init__(
        self,
        source: Source,
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: Attending | None = None,
        as_stored: bool = False,
        activations: Activations | None = None,
        experts: Callable[[UnitLayout], int] | None = None,
        quick: bool = False,
    ) -> None:
        self.source = source
        self.layout: ModelLayout = source.layout
        self.config: Mapping[str, Any] = source.checkpoint.config
        self.device = device
        self.dtype = dtype
        self.attention = attention
        self.as_stored = as_stored
        self.activations = activations
        self.experts = experts
        self.quick = quick

    @cached_property
    def runner(self) -> BlockRunner:
        """What runs its units; made when it is first needed."""
        return self._new_runner()

    def _new_runner(self) -> BlockRunner:
        return BlockRunner(
            self.config,
            self.source.arch.runtime,
            device=self.device,
            dtype=self.dtype,
            experts=self.experts,
            quick=self.quick,
        )

    def tokenizer(self) -> Any:
        """The model's own tokenizer. Raises InputError where there is none."""
        return load_tokenizer(self.source.checkpoint.folder)

    def read_unit(self, index: int) -> Unit:
        """A unit's weights without what is carried over: floats on the CPU, and quantized ones on
        the device, which is given their packed bytes and decodes them faster."""
        unit, on_gpu = self.layout.unit(index), self.device.type == "cuda"
        return self.source.read_unit(unit, pin=on_gpu, carried=False, device=self.device)

    def floats(self, unit: Unit) -> dict[str, Tensor]:
        """A unit's tensors in float: packed weights decoded on the device, others as they are."""
        decoded = {
            weight_name(name): q.to(self.device).dequantize(self.dtype)
            for name, q in unit.quantized.items()
        }
        return {**unit.tensors, **decoded}

    def tensors(self, index: int) -> dict[str, Tensor]:
        """A unit's weights in float on the device, as the runner takes them."""
        return self.on_device(self.read_unit(index))

    def on_device(self, unit: Unit) -> dict[str, Tensor]:
        """`tensors` of a unit that has been read."""
        others = set(unit.layout.others)  # correction biases, for one, which stay in float32
        return {
            n: t.to(self.device) if n in others else t.to(self.device, self.dtype)
            for n, t in self.floats(unit).items()
        }

    def hook(self, unit: Unit, attention: Attending | None = None) -> AttentionHook | None:
        """What attends in a block; `attention` in place of the model's own way."""
        attending = attention or self.attention
        hook = attending(unit) if attending else None
        if self.as_stored and self.source.schemes.kv is not None:
            hook = quantized_kv(self.source.schemes.kv, unit, hook)
        return hook

    def inputs(self, block: Block) -> AbstractContextManager[None]:
        """What enters a block's linears as the files say, for the length of a `with`."""
        stored = stored_inputs(self.source, block.unit) if self.as_stored else {}
        return quantized_inputs(block, stored)

    @contextmanager
    def logits(self, *, gradients: bool = False) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from final hidden states [tokens, hidden] to logits [tokens, vocabulary], with
        `gradients` one that they flow through."""
        layout, tied = self.layout.head, self.layout.tied
        tensors = self.floats(self.source.read_unit(layout))
        (linear,) = (x for x in layout.linears if x.role == "lm_head")
        enter = stored_inputs(self.source, layout).get(linear.name) if self.as_stored else None
        # No name here holds the weight as it was read, beside the one that the head computes with.
        with self.runner.head(
            tensors,
            self.source.checkpoint.read([tied])[tied] if tied else tensors.pop(linear.weight_name),
            enter=enter,
            gradients=gradients,
        ) as head:
            yield lambda hidden: head(hidden.unsqueeze(0))[0]

    def whole(self) -> Any:
        """A transformers model with all weights on the device, in evaluation mode; none of its
        parameters requires a gradient."""
        # A model of its own: a pass may hook into it, and the runner's stays as it is.
        runner = self._new_runner()
        runner.fill((unit, self.tensors(i)) for i, unit in enumerate(self.layout.units))
        return runner.model

"""Runs one block of a transformers model at a time.

The model is built on the meta device; a unit's tensors are assigned to its modules, used, and taken
away again. Inputs of a block travel as one tensor of hidden states [rows, length, hidden].
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressor_calibration.stats import KVNeeds, KVStats, SiteStats, StatNeeds
from torch import Tensor, nn

from compressor.arch.load import RuntimeNames
from compressor.foreign.calls import foreign
from compressor.ir.layout import Linear, UnitLayout, bias_name
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.model import build_config, build_model


class _Stop(Exception):
    """Ends a forward pass once the last decoder layer has been reached."""


class _Passed(Tensor):
    """Hidden states that a layer stands in for: some models take them for the layer's output, some
    for the first item of it."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))


@dataclass(slots=True)
class Observation:
    """What running a block over its calibration inputs gave.

    stats        site → statistics; expert sites are computed when they are asked for
    kv           statistics of keys and values, where they were asked for
    """

    stats: Mapping[str, SiteStats]
    module_loss: Callable[[str, Mapping[str, Tensor]], float]
    kv: KVStats | None = None


class BlockRunner:
    """One transformers model of which at most a unit is in memory."""

    def __init__(
        self,
        config: Mapping[str, Any],
        names: RuntimeNames,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.names = names
        self.device = device
        self.dtype = dtype
        with foreign("transformers does not accept this config.json"):
            self.config = build_config(config)
            # Attention logit caps exist in the eager attention only; the fused ones drop them
            # silently.
            text = self.config.get_text_config()
            eager = getattr(text, "attn_logit_softcapping", None) is not None
            with torch.device("meta"):
                self.model = build_model(self.config, dtype, eager=eager)
            self._rebuild_buffers()
        self.layers: list[nn.Module] = list(self.model.get_submodule(names.layers).children())
        self._layer_arguments: dict[int, list[dict[str, Any]]] = {}
        self._by_row: tuple[str, ...] = ()
        self.first_row = 0  # of the rows that run, for hooks that carry something between blocks

    def _rebuild_buffers(self) -> None:
        """Rotary tables and Gemma's embedding scale are buffers that no checkpoint holds; on the
        meta device they are lost."""
        root = self.names.layers.rpartition(".")[0]
        for path, module in list(self.model.named_modules()):
            if not path.startswith(root):
                continue  # a tower beside the text model never runs
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, device=self.device)
            if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
                with torch.device("cpu"):
                    own = getattr(module, "config", self.config.get_text_config())
                    fresh = type(module)(own).to(self.device)
                parent, _, leaf = path.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, fresh)

    def _assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into the model under their full in-memory names."""
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            value = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
            setattr(self.model.get_submodule(path), leaf, value)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            setattr(
                module, leaf, nn.Parameter(getattr(module, leaf).to("meta"), requires_grad=False)
            )

    @torch.no_grad()
    def embed(self, tensors: Mapping[str, Tensor], ids: Tensor, *, batch: int = 8) -> Tensor:
        """Hidden states that enter the first block, [rows, length, hidden], for token ids.

        Also keeps what the model passes to each layer beside them (masks, rotary tables), which
        depends on the length only, since rows are never padded.
        """
        tensors = self.names.outer_state(tensors)
        self._assign(tensors)
        out = []
        arguments: dict[int, dict[str, Any]] = {}
        for start in range(0, ids.shape[0], batch):
            rows = ids[start : start + batch].to(self.device)
            if start == 0:
                self.capture({"input_ids": rows[:1]}, arguments)
                several: dict[int, dict[str, Any]] = {}
                out.append(self.capture({"input_ids": rows}, several))
                self._by_row = _by_row(arguments[0], several[0])
            else:
                out.append(self.capture({"input_ids": rows}, {}))
        self._drop(list(tensors))
        self._layer_arguments[ids.shape[1]] = [arguments[i] for i in range(len(self.layers))]
        return torch.cat(out)

    def capture(self, inputs: Mapping[str, Tensor], arguments: dict[int, dict[str, Any]]) -> Tensor:
        """What enters the first block for inputs of the model; `arguments` gets what each layer is
        passed beside it."""
        found: list[Tensor] = []

        def stand_in(index: int) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
                if index == 0:
                    found.append(hidden_states)
                arguments[index] = {
                    k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")
                }
                if index == len(self.layers) - 1:
                    raise _Stop
                return hidden_states.as_subclass(_Passed)

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = stand_in(index)
        try:
            self.model(**inputs, use_cache=False)
        except _Stop:
            pass
        finally:
            for layer in self.layers:
                del layer.forward
        return found[0]

    @contextmanager
    def block(self, unit: UnitLayout, tensors: Mapping[str, Tensor]) -> Iterator[Block]:
        """Block `unit.index` with these weights, for the length of a `with`."""
        layer = self.layers[unit.index]
        block = Block(runner=self, unit=unit, layer=layer, tensors=tensors)
        block.load(tensors)
        try:
            yield block
        finally:
            layer.to("meta")

    def _final_norm(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the head unit without those of lm_head, as in memory."""
        state = self.names.outer_state(tensors)
        return {k: v for k, v in state.items() if not k.startswith(f"{self.names.lm_head}.")}

    @torch.no_grad()
    def head_stats(
        self, tensors: Mapping[str, Tensor], hidden: Tensor, *, needs: StatNeeds
    ) -> SiteStats:
        """Statistics of what enters lm_head, row by row, for the last block's outputs."""
        norm = self.model.get_submodule(self.names.norm)
        self._assign(self._final_norm(tensors))
        stats = SiteStats(hidden.shape[-1], needs, device=self.device)
        for row in hidden:
            stats.update(norm(row.to(self.device, self.dtype)))
        norm.to("meta")
        return stats

    def fill(self, units: Iterable[tuple[UnitLayout, Mapping[str, Tensor]]]) -> None:
        """Put all units into the model, so that it runs whole: (unit, its tensors in float)."""
        embedding = self.names.embedding
        for unit, tensors in units:
            if unit.kind == "block":
                state = self.names.block_state(unit, tensors)
                ready = {k: v.to(self.device, self.dtype) for k, v in state.items()}
                self.layers[unit.index].load_state_dict(ready, strict=True, assign=True)
            else:
                self._assign(self.names.outer_state(tensors))
        head = self.model.get_submodule(self.names.lm_head)
        if head.weight.is_meta:
            head.weight = self.model.get_submodule(embedding).weight
        self.model.requires_grad_(False)

    def arguments(self, index: int, length: int, *, rows: int = 1) -> dict[str, Any]:
        """What layer `index` gets beside the hidden states, for rows of `length` tokens."""
        found = self._layer_arguments[length][index]
        if rows == 1 or not self._by_row:
            return found
        return found | {n: found[n].repeat(rows, *[1] * (found[n].dim() - 1)) for n in self._by_row}

    @contextmanager
    def attention(self, hook: AttentionHook | None) -> Iterator[None]:
        """Let `hook` attend in place of the model's own attention, for the length of a `with`."""
        if hook is None:
            yield
            return
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config = self.model.config
        usual = config._attn_implementation
        name = f"hooked-{id(self)}"
        entered: dict[int, Tensor] = {}

        def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[id(module)] = args[0] if args else kwargs["hidden_states"]

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, own: Any, **options: Any
        ) -> tuple[Tensor, None]:
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            forward = ALL_ATTENTION_FUNCTIONS.get_interface(usual, eager)

            def plain(
                query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
            ) -> Tensor:
                under = own if mask is None else mask
                found: Tensor = forward(module, query, key, value, under, **options)[0]
                return found

            call = AttentionCall(
                layer=int(module.layer_idx),
                query=query,
                key=key,
                value=value,
                mask=own,
                scaling=float(options["scaling"]),
                plain=plain,
                rotary=self.rotary(int(module.layer_idx), query.shape[2]),
                hidden=entered.pop(id(module), None),
                first_row=self.first_row,
            )
            return hook(call), None

        ALL_ATTENTION_FUNCTIONS[name] = attend
        config._attn_implementation = name
        modules = [m for layer in self.layers for m in layer.modules() if hasattr(m, "layer_idx")]
        watched = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in modules]
        try:
            yield
        finally:
            for handle in watched:
                handle.remove()
            config._attn_implementation = usual
            del ALL_ATTENTION_FUNCTIONS[name]

    def rotary(self, index: int, length: int) -> tuple[Tensor, Tensor] | None:
        """The tables [length, channels] that turn queries and keys of layer `index`, if any."""
        found = self._layer_arguments.get(length)
        tables = found[index].get("position_embeddings") if found else None
        return (tables[0][0], tables[1][0]) if tables is not None else None

    @contextmanager
    def head(
        self,
        tensors: Mapping[str, Tensor],
        lm_head: Tensor,
        *,
        enter: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from hidden states [rows, length, hidden] to logits [..., vocabulary].

        tensors  the final norm's tensors;  lm_head  [vocabulary, hidden], the embedding when tied
        enter    what is done to the input of lm_head
        """
        self._assign(self._final_norm(tensors))
        lm_head = lm_head.to(self.device, self.dtype)
        bias = self.names.outer_state(tensors).get(bias_name(self.names.lm_head))
        bias = None if bias is None else bias.to(self.device, self.dtype)
        norm = self.model.get_submodule(self.names.norm)
        text = self.config.get_text_config()
        cap = getattr(text, "final_logit_softcapping", None)
        scale = getattr(text, "logit_scale", None) or 1 / (
            getattr(text, "logits_scaling", None) or 1
        )

        @torch.no_grad()
        def logits(hidden: Tensor) -> Tensor:
            normed = norm(hidden.to(self.device, self.dtype))
            entering = normed if enter is None else enter(normed)
            out = nn.functional.linear(entering, lm_head, bias).float()
            out = out if scale == 1 else out * scale
            return torch.tanh(out / cap) * cap if cap else out

        try:
            yield logits
        finally:
            norm.to("meta")


@dataclass(slots=True)
class Block:
    """A decoder layer whose weights are in memory."""

    runner: BlockRunner
    unit: UnitLayout
    layer: nn.Module
    tensors: Mapping[str, Tensor]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the layer other weights: checkpoint name → tensor, at least those of the unit."""
        state = self.runner.names.block_state(self.unit, tensors)
        device, dtype = self.runner.device, self.runner.dtype
        ready = {name: tensor.to(device, dtype) for name, tensor in state.items()}
        self.layer.load_state_dict(ready, strict=True, assign=True)

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output for hidden states [rows, length, hidden]."""
        arguments = self.runner.arguments(self.unit.index, hidden.shape[1], rows=hidden.shape[0])
        out = self.layer(hidden.to(self.runner.device, self.runner.dtype), **arguments)
        # Decoder layers return a tensor in new transformers and a tuple in old ones.
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def forward_rows(self, hidden: Tensor, *, batch: int, out: Tensor | None = None) -> Tensor:
        """`forward` over all rows, `batch` at a time, into `out` (which may be `hidden`)."""
        result = torch.empty_like(hidden) if out is None else out
        for start in range(0, hidden.shape[0], batch):
            rows = hidden[start : start + batch]
            result[start : start + batch] = self.forward(rows).to(result.dtype)
        return result

    def observe(
        self,
        hidden: Tensor,
        *,
        needs: Mapping[str, StatNeeds],
        batch: int,
        out: Tensor | None = None,
        kv: KVNeeds | None = None,
    ) -> Observation:
        """Statistics of the named sites over all rows, and with `kv` of keys and values; with
        `out`, the block's outputs too."""
        from compressor.runner.observe import Observer, Seen, watch_kv

        shape = self.unit.attention
        seen = None
        if kv is not None and shape is not None:
            sides = (shape.kv_heads, shape.head_dim)
            seen = KVStats(*sides, heads=shape.heads, needs=kv, device=self.runner.device)
        hook = None if seen is None else watch_kv(seen)
        with self.runner.attention(hook), Observer(self, needs=needs) as observer:
            if out is None:
                observer.stop_after_last()
            for start in range(0, hidden.shape[0], batch):
                with suppress(Seen):
                    result = self.forward(hidden[start : start + batch])
                    if out is not None:
                        out[start : start + batch] = result.to(out.dtype)
            found = observer.finish()
            if seen is not None:
                seen.all_reduce()
            return replace(found, kv=seen)

    def module(self, linear: Linear) -> nn.Module:
        """The module that plays a linear in memory."""
        return self.layer.get_submodule(self.runner.names.linear_path(self.unit, linear))


def _by_row(one: Mapping[str, Any], several: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a layer's arguments that grow with the rows and do not spread over them."""
    return tuple(
        name
        for name, value in one.items()
        if isinstance(value, Tensor)
        and value.dim()
        and value.shape[0] != 1
        and isinstance(several.get(name), Tensor)
        and several[name].shape[0] != value.shape[0]
    )

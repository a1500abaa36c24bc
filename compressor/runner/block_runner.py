"""Runs one block of a transformers model at a time.

The model is built on the meta device; a unit's tensors are assigned to its modules, used, and taken
away again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from compressor_calibration.stats import SiteStats, StatNeeds
from torch import Tensor, nn

from compressor.arch.load import RuntimeNames
from compressor.foreign.calls import foreign
from compressor.ir.layout import UnitLayout, bias_name
from compressor.numerics.processor import products_of_bfloat16
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.attention_call import AttentionHook, Rotary, hooked
from compressor.runner.block import Block as Block
from compressor.runner.buffers import rebuild_buffers
from compressor.runner.handed import of_tokens
from compressor.runner.layer_inputs import by_row, layer_inputs, no_values
from compressor.runner.model import build_config, build_model, layers_of
from compressor.runner.recorded import Recorder
from compressor.runner.rounds import rounds


class BlockRunner:
    """One transformers model of which at most a unit is in memory."""

    def __init__(
        self,
        config: Mapping[str, Any],
        names: RuntimeNames,
        *,
        device: torch.device,
        dtype: torch.dtype,
        experts: Callable[[UnitLayout], int] | None = None,
        quick: bool = False,
    ) -> None:
        # `experts`: how many of a block's are in memory at a time, if not all.
        # `quick`: whether float32 is multiplied in bfloat16.
        self.names, self.device, self.dtype = names, device, dtype
        self.recorder = Recorder(device)
        self.experts, self.quick = experts, quick
        with foreign("transformers does not accept this config.json"):
            self.config = build_config(
                config, twin=names.twin, within=names.within, beside=names.twin_config
            )
            self.model = build_model(self.config, dtype)
            self._attention = self.model.config._attn_implementation
            text = self.model.get_submodule(names.layers.rpartition(".")[0])
            rebuild_buffers(text, self.config.get_text_config(), device)
        self.layers = layers_of(self.model, names)
        self._whole_rows: dict[int, list[dict[str, Any]]] = {}
        self._by_row: tuple[str, ...] = ()
        self._beside: list[dict[str, Any]] | None = None
        self.handed: dict[str, Tensor] = {}  # by the embedding for rows that entered last
        self.first_row = 0  # of the rows that run, for hooks that carry something between blocks

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a layer's tensor: float32 of routers and corrections, as the family says."""
        wide = self.model._keep_in_fp32_modules_strict or ()
        return torch.float32 if any(f".{x}." in f".{name}." for x in wide) else self.dtype

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

    def embed(self, tensors: Mapping[str, Tensor], ids: Tensor, *, batch: int = 8) -> Tensor:
        """Hidden states that enter the first block, [rows, length, hidden], for token ids."""
        found, handed = [], []
        with self.embedding(tensors) as embed:
            for start in range(0, ids.shape[0], batch):
                found.append(embed(ids[start : start + batch]))
                handed.append(self.handed)
        self.handed = {name: torch.cat([part[name] for part in handed]) for name in handed[0]}
        return torch.cat(found)

    @contextmanager
    def embedding(self, tensors: Mapping[str, Tensor]) -> Iterator[Callable[..., Tensor]]:
        """A function from token ids [rows, length], and what rows have beside them, to hidden
        states that enter the first block.

        It keeps what the model passes to each layer beside those (masks, rotary tables), which
        depends on the length only where rows have nothing of their own.
        """
        tensors = self.names.outer_state(tensors)
        self._assign(tensors)

        @torch.no_grad()
        def embed(ids: Tensor, side: Mapping[str, Tensor] | None = None) -> Tensor:
            inputs = {"input_ids": ids.to(self.device), **self.here(side or {})}
            several: dict[int, dict[str, Any]] = {}
            hidden = self.capture(inputs, several)
            self.handed = of_tokens(self.names.handed, several)
            if not side and ids.shape[1] not in self._whole_rows:
                one: dict[int, dict[str, Any]] = {}
                self.capture({"input_ids": inputs["input_ids"][:1]}, one)
                self._whole_rows[ids.shape[1]] = self._of_all_blocks(one)
            if not side and ids.shape[0] > 1:
                self._by_row = by_row(self._whole_rows[ids.shape[1]][0], several[0])
            return hidden

        try:
            yield embed
        finally:
            self._drop(list(tensors))

    def capture(self, inputs: Mapping[str, Tensor], arguments: dict[int, dict[str, Any]]) -> Tensor:
        """What enters the first block for inputs of the model; `arguments` gets what each layer is
        passed beside it."""
        with self.products():
            return layer_inputs(self.model, self.layers, inputs, arguments)

    def products(self) -> AbstractContextManager[None]:
        """How matrices are multiplied, for the length of a `with`."""
        return products_of_bfloat16() if self.quick else nullcontext()

    def arguments_of(
        self, rows: int, length: int, side: Mapping[str, Tensor]
    ) -> dict[int, dict[str, Any]]:
        """What the model passes to each layer for rows with something of their own, where it
        depends on no token and no weight."""
        found: dict[int, dict[str, Any]] = {}
        ids = torch.zeros(rows, length, device=self.device, dtype=torch.long)
        # A model around the text model asks for images or sounds.
        text = self.model.get_submodule(self.names.layers.rpartition(".")[0])
        with torch.no_grad(), no_values(text, self.layers, self.device):
            layer_inputs(text, self.layers, {"input_ids": ids, **self.here(side)}, found)
        return found

    def _of_all_blocks(self, arguments: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same in order, without what is handed."""
        return [
            {name: value for name, value in arguments[i].items() if name not in self.names.handed}
            for i in range(len(self.layers))
        ]

    @contextmanager
    def loaded(self, unit: UnitLayout, tensors: Mapping[str, Tensor]) -> Iterator[Block]:
        """Block `unit.index` with these weights, for the length of a `with`."""
        layer = self.layers[unit.index]
        block = Block(runner=self, unit=unit, layer=layer, tensors=tensors)
        block.load(tensors)
        try:
            yield block
        finally:
            block.unload()

    def _final_norm(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the head unit without those of lm_head, as in memory."""
        state = self.names.outer_state(tensors)
        return {k: v for k, v in state.items() if not k.startswith(f"{self.names.lm_head}.")}

    @torch.no_grad()
    def head_stats(
        self,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        *,
        needs: StatNeeds,
        batch: int = 1,
        ranks: Ranks = ALONE,
    ) -> SiteStats:
        """Statistics of what enters lm_head, row by row, for the last block's outputs.

        batch  rows of a chunk;  ranks  as in `observe.observe`
        """
        norm = self.model.get_submodule(self.names.norm)
        self._assign(self._final_norm(tensors))
        stats = SiteStats(hidden.shape[-1], needs, device=self.device)

        def forward(start: int, stop: int) -> list[Tensor]:
            rows = [norm(row.to(self.device, self.dtype)) for row in hidden[start:stop]]
            return [torch.cat(rows)]

        for chunks in rounds(ranks, hidden.shape[0], batch, forward):
            for (entering,) in chunks:
                for row in entering.view(-1, *hidden.shape[1:]):
                    stats.update(row)
        norm.to("meta")
        return stats

    def fill(self, units: Iterable[tuple[UnitLayout, Mapping[str, Tensor]]]) -> None:
        """Put all units into the model, so that it runs whole: (unit, its tensors in float)."""
        embedding = self.names.embedding
        for unit, tensors in units:
            if unit.kind == "block":
                state = self.names.block_state(unit, tensors)
                ready = {k: v.to(self.device, self.dtype_of(k)) for k, v in state.items()}
                self.layers[unit.index].load_state_dict(ready, strict=True, assign=True)
            else:
                self._assign(self.names.outer_state(tensors))
        head = self.model.get_submodule(self.names.lm_head)
        if head.weight.is_meta:
            head.weight = self.model.get_submodule(embedding).weight
        self.model.requires_grad_(False)

    def arguments(
        self,
        index: int,
        length: int,
        side: Mapping[str, Tensor] | None = None,
        *,
        rows: int = 1,
    ) -> dict[str, Any]:
        """What layer `index` gets beside the hidden states, for rows of `length` tokens: what the
        model makes of what these rows have beside them, or else of whole rows."""
        self._beside = self._made_of(side, length) if side else None
        if self._beside is not None:
            return self._beside[index]
        found = self._whole_rows[length][index]
        if rows == 1 or not self._by_row:
            return found
        return found | {n: found[n].repeat(rows, *[1] * (found[n].dim() - 1)) for n in self._by_row}

    def _made_of(self, side: Mapping[str, Tensor], length: int) -> list[dict[str, Any]]:
        """What the model passes to each layer for rows with something of their own."""
        rows = next(iter(side.values())).shape[0]
        config = self.model.config
        hooked = config._attn_implementation
        config._attn_implementation = self._attention  # masks are of its form
        try:
            return self._of_all_blocks(self.arguments_of(rows, length, side))
        finally:
            config._attn_implementation = hooked

    def here(self, side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors on the runner's device."""
        return {name: tensor.to(self.device) for name, tensor in side.items()}

    def attention(self, hook: AttentionHook | None) -> AbstractContextManager[None]:
        """Let `hook` attend in place of the model's own attention, for the length of a `with`."""
        return nullcontext() if hook is None else hooked(self, hook)

    def rotary(self, index: int, length: int) -> Rotary | None:
        """The tables that turn queries and keys of layer `index`, if any: [length, channels], or
        [rows, 1, length, channels] for rows with positions of their own."""
        found = self._beside or self._whole_rows.get(length)
        tables = found[index].get("position_embeddings") if found else None
        if tables is None:
            return None
        cos, sin = tables
        return (cos[0], sin[0]) if cos.shape[0] == 1 else (cos[:, None], sin[:, None])

    @contextmanager
    def head(
        self,
        tensors: Mapping[str, Tensor],
        lm_head: Tensor,
        *,
        enter: Callable[[Tensor], Tensor] | None = None,
        gradients: bool = False,
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from hidden states [rows, length, hidden] to logits [..., vocabulary].

        tensors    the final norm's tensors;  lm_head  [vocabulary, hidden], the embedding when tied
        enter      what is done to the input of lm_head
        gradients  whether they flow through it
        """
        self._assign(self._final_norm(tensors))
        # Once: autocast would for each part of the logits.
        kind = self.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        lm_head = lm_head.to(self.device, cast)
        bias = self.names.outer_state(tensors).get(bias_name(self.names.lm_head))
        bias = None if bias is None else bias.to(self.device, self.dtype)
        norm = self.model.get_submodule(self.names.norm)
        text = self.config.get_text_config()
        cap = getattr(text, "final_logit_softcapping", None)
        scale = getattr(text, "logit_scale", None) or 1 / (
            getattr(text, "logits_scaling", None) or 1
        )
        scale = scale if self.names.logit_scale is None else self.names.logit_scale

        @torch.set_grad_enabled(gradients)
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

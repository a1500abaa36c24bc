"""Sets a loaded transformers model up to attend by a policy."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from compressor.attention.policy import AttentionPolicy, LayerPolicy, read_policy
from compressor.attention.rope import Rotary
from compressor.attention.serve import fused
from compressor.attention.serve.attend import Rule, by_slot, full, streaming
from compressor.attention.serve.blocks import ForecastsInUse, over_blocks, stored_forecasts
from compressor.attention.serve.cache import HeadLayer, Held, PolicyCache
from compressor.errors import InputError

NAME = "attention_policy"
"""The name under which the attention function is registered."""

_RUNTIMES: weakref.WeakKeyDictionary[nn.Module, Runtime] = weakref.WeakKeyDictionary()


def attach(
    model: Any,
    policy: AttentionPolicy | Path | str | None = None,
    *,
    forecasts: Mapping[str, Tensor] | None = None,
    kernels: bool | None = None,
) -> Runtime:
    """Have a loaded model attend by a policy: a value, or that of a checkpoint folder (the one that
    the model was loaded from, if none is given).

    forecasts  tensors that choose blocks, by name, if not those of the folder
    kernels    whether the kernels of full and streaming heads are used; None: on a GPU, in half
               precision
    Raises InputError where there is no policy, or it is not for this model.
    """
    if not isinstance(policy, AttentionPolicy):
        folder = Path(policy if policy is not None else model.name_or_path)
        found = read_policy(folder) if folder.is_dir() else None
        if found is None:
            raise InputError(f"{folder} carries no attention policy")
        policy = found
        forecasts = stored_forecasts(folder) if forecasts is None else forecasts
    return Runtime(model, policy, forecasts, kernels=kernels)


class Runtime:
    """A model that attends by a policy, until `detach`.

    Its cache comes from `new_cache`, one for each text (or batch of texts of one length); without a
    cache a text is attended to in one pass under the same mask.
    """

    def __init__(
        self,
        model: Any,
        policy: AttentionPolicy,
        forecasts: Mapping[str, Tensor] | None = None,
        *,
        kernels: bool | None = None,
    ) -> None:
        self.policy = policy
        self.kernels = kernels
        self._forecasts = ForecastsInUse(policy, forecasts or {})
        self.modules = _attention_modules(model)
        _check(model, policy, len(self.modules))
        self.rotary = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
        if policy.positions == "slot" and self.rotary is None:
            raise InputError("slot positions need a rotary embedding, which this model has not")
        self._model = model
        names = inspect.signature(model.forward).parameters
        self._keyword = "cache" if "cache" in names else "past_key_values"
        self._usual = model.config._attn_implementation
        self._caches: dict[int, PolicyCache | None] = {}
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _no_mask)
        model.set_attn_implementation(NAME)
        self._hooks = [
            module.register_forward_pre_hook(self._before, with_kwargs=True)
            for module in self.modules
        ]
        for module in self.modules:
            _RUNTIMES[module] = self

    def new_cache(self) -> PolicyCache:
        """An empty cache."""
        return PolicyCache(self.policy)

    def options(self) -> dict[str, PolicyCache]:
        """An empty cache as the keyword argument that `generate` and `forward` take it by."""
        return {self._keyword: self.new_cache()}

    def detach(self) -> None:
        """Let the model attend as it did before."""
        for hook in self._hooks:
            hook.remove()
        for module in self.modules:
            _RUNTIMES.pop(module, None)
        self._model.set_attn_implementation(self._usual)

    def _before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note the cache of the coming call; hold the rotary embedding back for slot positions."""
        cache = _behind(kwargs.get("cache", kwargs.get("past_key_values")))
        if cache is not None and not isinstance(cache, PolicyCache):
            raise InputError(
                f"this model attends by a policy, and {type(cache).__name__} is not its cache",
                hint="call generate(..., **runtime.options()), or pass use_cache=False",
            )
        self._caches[module.layer_idx] = cache
        tables = kwargs.get("position_embeddings")
        self._forecasts.enter(
            module.layer_idx,
            args[0] if args else kwargs["hidden_states"],
            None if tables is None else (tables[0][0], tables[1][0]),
        )
        if self.policy.positions == "slot":
            cos, sin = kwargs["position_embeddings"]
            still = (torch.ones_like(cos), torch.zeros_like(sin))
            return args, {**kwargs, "position_embeddings": still}
        return None

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """One call of a layer's attention: [rows, heads, length, head_dim]."""
        layer = self.policy.layers[module.layer_idx]
        forecast = self._forecasts.take(module.layer_idx)
        cache = self._caches[module.layer_idx]
        held = cache.layers[module.layer_idx] if cache is not None else None
        assert held is None or isinstance(held, HeadLayer)
        if layer.streaming is None:
            whole = (held.keys, held.values) if held else (key, value)
            return self._attend_full(layer, query, *whole, rule, forecast)
        kind = HeadLayer(layer, kv_heads=self.policy.kv_heads)
        if held is not None:
            whole, step = (held.keys, held.values), held.take()
        else:
            places = torch.arange(key.shape[2], device=key.device)
            whole = (key[:, kind.full], value[:, kind.full])
            step = Held(key[:, kind.streaming], value[:, kind.streaming], places)
        sinks, window = layer.streaming.sinks, layer.streaming.window
        if self._fused(layer, query, rule) and kind.full:
            heads = {"streaming": kind.streaming, "full": kind.full}
            if query.shape[2] == 1:
                return fused.decode(query, whole, step, rule, **heads)
            if query.shape[2] == step.places.shape[0]:
                return fused.prefill(
                    query, key, value, rule,
                    streaming=kind.streaming, sinks=sinks, window=window,
                )  # fmt: skip
        group = query.shape[1] // self.policy.kv_heads
        few, many = (_query_heads(heads, group) for heads in (kind.streaming, kind.full))
        out = torch.empty((*query.shape[:3], value.shape[-1]), dtype=query.dtype, device=key.device)
        kept = (step.keys, step.values, step.places, rule)
        if self.policy.positions == "slot":
            tables = self._tables(query, step.places.shape[0] + sinks + window)
            out[:, few] = by_slot(query[:, few], *kept, tables, sinks=sinks, window=window)
        else:
            out[:, few] = streaming(query[:, few], *kept, sinks=sinks, window=window)
        if many:
            said = None if forecast is None else forecast[:, kind.full]
            out[:, many] = self._attend_full(layer, query[:, many], *whole, rule, said)
        return out

    def _fused(self, layer: LayerPolicy, query: Tensor, rule: Rule) -> bool:
        wanted = query.is_cuda if self.kernels is None else self.kernels
        ordinary = layer.blocks is None and self.policy.positions == "text"
        return wanted and ordinary and fused.fits(query, rule)

    def _attend_full(
        self,
        layer: LayerPolicy,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: Rule,
        forecast: Tensor | None,
    ) -> Tensor:
        """Heads that do not stream: over the blocks they choose, or over everything."""
        if layer.blocks is None or k.shape[2] < layer.blocks.dense_below:
            return full(q, k, v, rule)
        return over_blocks(q, k, v, layer.blocks, rule, forecast=forecast)

    def _tables(self, like: Tensor, slots: int) -> Rotary:
        assert self.rotary is not None
        cos, sin = self.rotary(like, torch.arange(slots, device=like.device)[None])
        return cos[0], sin[0]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """The registered attention function."""
    runtime = _RUNTIMES.get(module)
    if runtime is None:
        raise InputError(
            f"a model that was not set up attends by {NAME!r}", hint="call attach(model) on it"
        )
    if mask is not None:
        raise InputError("attention masks of one's own are not supported under a policy")
    rule = Rule(
        scaling=float(options["scaling"]),
        softcap=options.get("softcap"),
        window=options.get("sliding_window"),
    )
    return runtime.attend(module, query, key, value, rule).transpose(1, 2).contiguous(), None


def _behind(cache: Any) -> Any:
    """The cache that is filled: compressed-tensors puts a module before it, which rounds keys and
    values to the scheme of the checkpoint and passes them on."""
    if not isinstance(cache, nn.Module):
        return cache
    held = getattr(cache, "past_key_values", None)
    return held() if isinstance(held, weakref.ReferenceType) else held


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> None:
    """The registered mask function: the policy is the mask; rows must not be padded."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise InputError(
            "padded rows are not supported under an attention policy",
            hint="give texts of one length, or one at a time",
        )


def _query_heads(kv_heads: list[int], group: int) -> list[int]:
    return [head * group + member for head in kv_heads for member in range(group)]


def _attention_modules(model: Any) -> list[Any]:
    """The decoder layers' attention modules, in order."""
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")]
    found = found or [
        m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "qkv_proj")
    ]
    return sorted(found, key=lambda module: int(module.layer_idx))


def _check(model: Any, policy: AttentionPolicy, layers: int) -> None:
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if (len(policy.layers), policy.heads, policy.kv_heads) != (layers, heads, kv_heads):
        raise InputError(
            f"the attention policy is for {len(policy.layers)} layers of {policy.heads}/"
            f"{policy.kv_heads} heads, the model has {layers} of {heads}/{kv_heads}"
        )

"""Sets a loaded transformers model up to attend by a policy."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from compressor.attention.evaluation import check_length, query_heads
from compressor.attention.masked import OwnAttention, full
from compressor.attention.policy import AttentionPolicy, Group, read_policy
from compressor.attention.rope import Rotary
from compressor.attention.rule import Held, Rule, RuleCall, past_fit
from compressor.attention.serve.ahead import Ahead, stored_tensors
from compressor.attention.serve.cache import HeadLayer, PolicyCache, split
from compressor.attention.serve.stored_cache import loaded_from, stored_cache
from compressor.errors import InputError

NAME = "attention_policy"
"""The name under which the attention function is registered."""

_RUNTIMES: weakref.WeakKeyDictionary[nn.Module, Runtime] = weakref.WeakKeyDictionary()


def attach(
    model: Any,
    policy: AttentionPolicy | Path | str | None = None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    kernels: bool | None = None,
    length: int = 0,
) -> Runtime:
    """Have a loaded model attend by a policy: a value, or that of a checkpoint folder (the one that
    the model was loaded from, also in the Hub's cache, if none is given).

    tensors  those that rules read a block ahead, by name, if not those of the folder
    kernels  whether kernels of heads with a rule and without are used; None: on a GPU
    length   tokens of the longest text to come, answer included
    Raises InputError where there is no policy, or it is not for this model or this length. A longer
    prompt than a rule was calibrated on is refused when it comes, too; a text that grows past that
    goes on with a warning.
    """
    if not isinstance(policy, AttentionPolicy):
        folder = loaded_from(model) if policy is None else Path(policy)
        found = read_policy(folder) if folder is not None and folder.is_dir() else None
        if folder is None or found is None:
            raise InputError(
                f"{folder or model.name_or_path or 'this model'} carries no attention policy",
                hint="attach(model, FOLDER) takes that of another folder; of a model from the Hub "
                "`hf download` brings it, which loaders leave there",
            )
        policy = found
        tensors = stored_tensors(folder, policy) if tensors is None else tensors
    check_length(policy, length)
    return Runtime(model, policy, tensors, kernels=kernels)


class Runtime:
    """A model that attends by a policy, until `detach`.

    Its cache comes from `new_cache`, one for each text (or batch of texts of one length); without a
    cache a text is attended to in one pass under the same mask.
    """

    def __init__(
        self,
        model: Any,
        policy: AttentionPolicy,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        kernels: bool | None = None,
    ) -> None:
        self.policy = policy
        self.kernels = kernels
        self._ahead = Ahead(policy, tensors or {})
        self._groups = [layer.groups(policy.kv_heads) for layer in policy.layers]
        self._drafting = self._verifying = False
        self.modules = _attention_modules(model)
        _check(model, policy, len(self.modules))
        self._rounding = stored_cache(model)
        self.rotary = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
        if policy.positions == "slot" and self.rotary is None:
            raise InputError("slot positions need a rotary embedding, which this model has not")
        self.model = model
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
        return PolicyCache(self.policy, self._rounding)

    def options(self) -> dict[str, PolicyCache]:
        """An empty cache as the keyword argument that `generate` and `forward` take it by."""
        return {self._keyword: self.new_cache()}

    def detach(self) -> None:
        """Let the model attend as it did before."""
        for hook in self._hooks:
            hook.remove()
        for module in self.modules:
            _RUNTIMES.pop(module, None)
        self.model.set_attn_implementation(self._usual)

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
        self._ahead.enter(
            module.layer_idx,
            args[0] if args else kwargs["hidden_states"],
            None if tables is None else (tables[0][0], tables[1][0]),
        )
        if self.policy.positions == "slot":
            cos, sin = kwargs["position_embeddings"]
            still = (torch.ones_like(cos), torch.zeros_like(sin))
            return args, {**kwargs, "position_embeddings": still}
        return None

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """For the length of a `with`, tokens are only proposed: rules for drafts act."""
        self._drafting = True
        try:
            yield
        finally:
            self._drafting = False

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """For the length of a `with`, tokens that were proposed are run: rules learn from them."""
        self._verifying = True
        try:
            yield
        finally:
            self._verifying = False

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, own: OwnAttention
    ) -> Tensor:
        """One call of a layer's attention: [rows, heads, length, head_dim]."""
        layer = module.layer_idx
        groups, cache = self._groups[layer], self._caches[layer]
        rules = self.policy.layers[layer].rules
        ahead = {rule.kind: self._ahead.take(rule, layer) for rule in rules}
        held = cache.layers[layer] if cache is not None else None
        if isinstance(held, HeadLayer):
            steps = held.take()
        else:
            if self._rounding is not None:
                key, value = self._rounding[layer](key, value)
            steps = split(key, value, groups)
        if len(groups) == 1:
            return self._attend_heads(groups[0], query, steps[0], own, ahead)
        out = self._in_one_kernel(query, Held(key, value), groups, steps, own)
        if out is not None:
            return out
        out = torch.empty((*query.shape[:3], value.shape[-1]), dtype=query.dtype, device=key.device)
        for group, step in zip(groups, steps, strict=True):
            mine = query_heads(group.heads, query.shape[1] // self.policy.kv_heads)
            out[:, mine] = self._attend_heads(group, query[:, mine], step, own, ahead)
        return out

    def _attend_heads(
        self,
        group: Group,
        query: Tensor,
        step: Held,
        own: OwnAttention,
        ahead: Mapping[str, Tensor | None],
    ) -> Tensor:
        """Heads of one group, over what is held for them."""
        told = {
            kind: said[:, group.heads] if len(group.heads) < said.shape[1] else said
            for kind, said in ahead.items()
            if said is not None
        }
        for rule in group.rules:
            step = replace(step, keys=rule.own_keys(step.keys, told.get(rule.kind)))
            if self._verifying:
                at = step.on_device()
                rule.watch(RuleCall(query, step.keys, at, own.scaling, memory=step.memory))
        acting = self._acting(group, query)
        if acting is None or not acting.acts(step.keys.shape[2]):
            return full(query, step.keys, step.values, own)
        self._in_fit(acting, int(step.on_device()[-1]) + 1, begun=query.shape[2] == 1)
        said = told.get(acting.kind)
        call = RuleCall(query, step.keys, step.on_device(), own.scaling, said, step.memory)
        if self.policy.positions == "slot":
            return acting.attend_by_slot(call, step.values, own, partial(self._tables, query))
        return acting.attend(call, step.values, own)

    def _in_fit(self, rule: Rule, length: int, *, begun: bool) -> None:
        """Refuse a prompt that a rule was not calibrated for; a text that grew so long is not lost
        for it: once for all layers and steps it is said."""
        if problem := past_fit(rule, length):
            if not (begun or self._verifying):
                raise problem
            warnings.warn(
                f"{rule.kind}: the text has grown past the {rule.fitted} tokens that its "
                "thresholds were calibrated on; nothing is promised beyond",
                stacklevel=2,
            )

    def _acting(self, group: Group, query: Tensor) -> Rule | None:
        if self._drafting:
            return group.acting("draft")
        return group.acting("decode" if query.shape[2] == 1 else "prefill")

    def _in_one_kernel(
        self, query: Tensor, new: Held, groups: Sequence[Group], steps: Sequence[Held],
        own: OwnAttention,
    ) -> Tensor | None:  # fmt: skip
        """Heads without a rule and heads with one, where the rule has a kernel for both."""
        if not (query.is_cuda if self.kernels is None else self.kernels) or len(groups) != 2:
            return None
        rules = [self._acting(group, query) for group in groups]
        whole = 0 if rules[0] is None else 1
        rule = rules[1 - whole]
        if rules[whole] is not None or rule is None:
            return None
        heads = (groups[whole].heads, groups[1 - whole].heads)
        return rule.beside_full(query, new, steps[whole], steps[1 - whole], heads, own)

    def _tables(self, like: Tensor, slots: int) -> Rotary:
        if self.rotary is None:
            raise InputError("slot positions need a rotary embedding, which this model has not")
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
    own = OwnAttention(
        scaling=float(options["scaling"]),
        softcap=options.get("softcap"),
        window=options.get("sliding_window"),
    )
    return runtime.attend(module, query, key, value, own).transpose(1, 2).contiguous(), None


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

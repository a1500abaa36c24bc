"""Generating in transformers under a policy: the same numbers as the mask, from a smaller cache."""

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.attention.policy import AttentionPolicy, LayerPolicy, policy_files
from compressor.attention.rule import Phase, Rule
from compressor.attention.rules.streaming import StreamingHeads, head_layers
from compressor.attention.serve import Runtime, attach
from compressor.attention.serve.stored_cache import LayerRounding, loaded_from
from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.evaluate.perplexity import evaluate
from compressor.ir.scheme import KVSpec

FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "phi3", "opt", "mixtral"]
IDS = torch.randint(2, 256, (2, 60), generator=torch.Generator().manual_seed(5))


def mixed(layers: int, heads: int, kv_heads: int) -> AttentionPolicy:
    """Streaming heads that differ from layer to layer; in the last one, none."""
    rows = torch.tensor([[(i + g) % 2 == 1 for g in range(kv_heads)] for i in range(layers)])
    rows[-1] = False
    return AttentionPolicy(
        heads=heads, kv_heads=kv_heads, layers=head_layers(rows, sinks=3, window=9)
    )


def slots(layers: int, heads: int, kv_heads: int) -> AttentionPolicy:
    rows = torch.ones(layers, kv_heads, dtype=torch.bool)
    held = head_layers(rows, sinks=3, window=9)
    return AttentionPolicy(heads=heads, kv_heads=kv_heads, positions="slot", layers=held)


def prepared(folder: Path, make: Callable[..., AttentionPolicy]) -> tuple[Any, Runtime]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shape = open_source(folder).layout.units[1].attention
    assert shape is not None
    runtime = attach(model, make(2, shape.heads, shape.kv_heads))
    return model, runtime


@torch.no_grad()
def logits_in(model: Any, runtime: Runtime, chunks: list[int]) -> Tensor:
    options, start, found = runtime.options(), 0, []
    for length in chunks:
        part = IDS[:, start : start + length]
        found.append(model(part, **options, use_cache=True).logits)
        start += length
    assert start == IDS.shape[1]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("make", [mixed, slots])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_decoding_give_what_one_pass_gives(
    family: str, make: Callable[..., AttentionPolicy], tiny_model: Callable[..., Path]
) -> None:
    if make is slots and family == "opt":
        pytest.skip("learned positions")
    model, runtime = prepared(tiny_model(family), make)
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
    for chunks in ([60], [7, 30, 23], [1] * 60, [45, *[1] * 15]):
        torch.testing.assert_close(logits_in(model, runtime, chunks), whole, atol=2e-5, rtol=1e-4)
    runtime.detach()
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, whole, atol=1e-3)


@pytest.mark.parametrize("make", [mixed, slots])
def test_numbers_are_those_of_the_evaluation(
    make: Callable[..., AttentionPolicy], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The evaluation masks a whole text; this decodes it from the small cache."""
    folder = tiny_model("llama")
    model, runtime = prepared(folder, make)
    logits = logits_in(model, runtime, [20, *[1] * 40])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 256), IDS[:, 1:].ravel())
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, data in policy_files(runtime.policy).items():
        (tmp_path / name).write_bytes(data)
    found = evaluate(open_source(tmp_path), IDS, device=torch.device("cpu"), dtype=torch.float32)
    assert found.nll.value == pytest.approx(float(loss), abs=1e-5)


def test_the_cache_holds_what_the_policy_says(tiny_model: Callable[..., Path]) -> None:
    model, runtime = prepared(tiny_model("llama"), mixed)
    options = runtime.options()
    (cache,) = options.values()
    assert cache.nbytes == 0
    with torch.no_grad():
        for length in range(1, 61):
            model(IDS[:, length - 1 : length], **options, use_cache=True)
            pairs = runtime.policy.cached_tokens(length)
            assert cache.nbytes == pairs * 2 * 16 * 4 * IDS.shape[0]
            assert cache.get_seq_length() == length
    stored = sum(t.untyped_storage().nbytes() for t in storages(cache))
    assert stored == cache.nbytes, "a view keeps the evicted keys alive"
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


def storages(cache: Any) -> list[Tensor]:
    held = [held for layer in cache.layers for held in layer.held]
    return [tensor for x in held for tensor in (x.keys, x.values) if tensor.numel()]


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_takes_the_cache(beams: int, tiny_model: Callable[..., Path]) -> None:
    """`generate` from the small cache picks the tokens that whole passes pick."""
    model, runtime = prepared(tiny_model("llama"), mixed)
    options: dict[str, Any] = {
        "max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": None,
        "pad_token_id": 1, "attention_mask": torch.ones(1, 30, dtype=torch.long),
    }  # fmt: skip
    small = runtime.options()
    (cache,) = small.values()
    out = model.generate(IDS[:1, :30], **small, **options)
    again = model.generate(IDS[:1, :30], use_cache=False, **options)
    assert torch.equal(out, again)
    assert cache.nbytes < 41 * 4 * 2 * 16 * 4 * 2 * beams * 0.75


class Rounding(torch.nn.Module):
    """What compressed-tensors puts before the cache of a layer, for a scheme of keys and values."""

    past_key_values: weakref.ref[Any] | None = None

    def update(self, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        key, value = (key * 4).round() / 4, (value * 4).round() / 4
        if self.past_key_values is None:
            return key, value
        return self.past_key_values().update(key, value, *args, **options)


def rounding(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = "cache" if "cache" in kwargs else "past_key_values"
    held = kwargs.get(name)
    module.kv_cache.past_key_values = None if held is None else weakref.ref(held)
    return args, {**kwargs, name: module.kv_cache}


def test_keys_rounded_on_their_way_into_the_cache_are_attended_to(
    tiny_model: Callable[..., Path],
) -> None:
    """With a cache or without one, and the cache is no larger for it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    policy = mixed(2, 4, 2)
    plain = attach(model, policy)
    before = logits_in(model, plain, [60])
    plain.detach()
    for layer in model.model.layers:
        layer.self_attn.kv_cache = Rounding()
        layer.self_attn.register_forward_pre_hook(rounding, with_kwargs=True)
    runtime = attach(model, policy)
    whole = logits_in(model, runtime, [60])
    torch.testing.assert_close(logits_in(model, runtime, [20, *[1] * 40]), whole)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, use_cache=False).logits, whole)
    assert not torch.allclose(whole, before, atol=1e-3)


@pytest.mark.parametrize("element", ["int8", "fp8_e4m3"])
def test_a_cache_of_codes_gives_what_rounding_gives(element: Any) -> None:
    """Step by step, a byte for each number, rows of tokens taken out as a video stream does."""
    keys, values = torch.randn(2, 1, 2, 9, 8, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([0.01, 0.02]), torch.tensor([0.015])
    rounding = LayerRounding(KVSpec(element, "head"), *scales)
    layer = rounding.codes_layer()
    layer.update(keys[:, :, :5], values[:, :, :5])
    found = layer.update(keys[:, :, 5:], values[:, :, 5:])
    for mine, once, twice in zip(
        found, rounding(keys, values), rounding(*rounding(keys, values)), strict=True
    ):
        assert torch.equal(mine, once) and torch.equal(once, twice)
    assert not torch.equal(found[0], keys)
    assert layer.keys.element_size() == 1
    layer.keys, layer.values = layer.keys[:, :, [0, 3, 8]], layer.values[:, :, [0, 3, 8]]
    again, _ = layer.update(keys[:, :, :0], values[:, :, :0])
    assert torch.equal(again, found[0][:, :, [0, 3, 8]])


def test_files_of_a_model_from_the_hub_are_in_its_cache(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / commit
    shutil.copytree(tiny_model("llama"), snapshot)
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    model.name_or_path = "me/tiny"
    assert loaded_from(model) == snapshot
    model.name_or_path = "me/other"
    assert loaded_from(model) is None
    model.name_or_path = ""  # made from a config
    assert loaded_from(model) is None
    with pytest.raises(InputError, match="this model carries no attention policy"):
        attach(model)


def test_what_is_not_supported_says_so(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with pytest.raises(InputError, match="carries no attention policy"):
        attach(model)
    with pytest.raises(InputError, match="2 layers of 8/2 heads, the model has 2 of 4/2"):
        attach(model, mixed(2, 8, 2))
    with pytest.raises(InputError, match="rotary"):
        opt = AutoModelForCausalLM.from_pretrained(tiny_model("opt")).eval()
        attach(opt, slots(2, 4, 4))
    runtime = attach(model, mixed(2, 4, 2))
    with pytest.raises(InputError, match="DynamicCache is not its cache"):
        model(IDS, use_cache=True)
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    with pytest.raises(InputError, match="padded rows"):
        model(IDS, attention_mask=padded, **runtime.options())


class Prefill(StreamingHeads):
    """A window in prompts alone."""

    phases: ClassVar[frozenset[Phase]] = frozenset(("prefill",))


class Draft(StreamingHeads):
    """A window for drafts alone."""

    phases: ClassVar[frozenset[Phase]] = frozenset(("draft",))


def of_every_head(rule: Rule) -> AttentionPolicy:
    return AttentionPolicy(heads=4, kv_heads=2, layers=(LayerPolicy(rules=(rule,)),) * 2)


@torch.no_grad()
def test_rules_act_in_their_phase(tiny_model: Callable[..., Path]) -> None:
    """What a phase computes is what the same window in all phases does, or full attention."""
    window = {"heads": (0, 1), "sinks": 2, "window": 9}

    def logits(rule: Rule, chunks: list[int]) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
        return logits_in(model.eval(), attach(model, of_every_head(rule)), chunks)

    always, nowhere = StreamingHeads(**window), Draft(**window)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    torch.testing.assert_close(logits(Prefill(**window), [60]), logits(always, [60]))
    whole = plain(IDS).logits
    for rule, chunks in ((Prefill(**window), [1] * 60), (nowhere, [50, *[1] * 10])):
        torch.testing.assert_close(logits(rule, chunks), whole, atol=2e-5, rtol=1e-4)
    runtime = attach(plain, of_every_head(nowhere))
    with runtime.drafting():
        drafted = logits_in(plain, runtime, [60])
    torch.testing.assert_close(drafted, logits(always, [60]))
    torch.testing.assert_close(logits_in(plain, runtime, [60]), whole, atol=2e-5, rtol=1e-4)

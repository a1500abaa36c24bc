"""AWQ's group quantizer and searches against vectors made with the reference implementations."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from compressor.ir.qtensor import QuantSpec
from compressor.numerics import fake_quantize, quantize
from compressor.numerics.awq_clip import search_clip_gram
from compressor.numerics.awq_search import (
    search_scales_gram,
    search_scales_reference,
)
from compressor.numerics.gram import gram_error
from tests.support.clipping import search_clip_reference
from tests.support.golden_files import vectors, vectors_and_notes

NORMS = ("input_layernorm", "post_attention_layernorm")


def group_spec(bits, group, dtype=torch.float32):
    if group == "chan":
        return QuantSpec("int", bits, "channel", zero="subtract", scale_dtype=dtype)
    return QuantSpec("int", bits, "group", int(group), zero="subtract", scale_dtype=dtype)


@pytest.mark.parametrize(
    "kind",
    ["gauss_fp32", "gauss_fp16", "gauss_bf16", "positive_fp32", "negative_fp32", "const_rows_fp32"],
)
@pytest.mark.parametrize("bits", [4, 3, 8])
@pytest.mark.parametrize("group", [128, 64, 32, "chan"])
def test_group_quantizer(kind, bits, group):
    """Theirs has no zero in the grid of a group of one sign, whose far end it cuts off. These
    groups alone may differ, and there ours is closer to the weight."""
    golden = vectors(f"quant/awq_pseudoquant_{kind}")
    weight, key = golden["input"], f"w{bits}_g{group}"
    spec = group_spec(bits, group, weight.dtype)
    q = quantize(weight, spec, arithmetic=weight.dtype, from_range=True)
    scales, zeros = golden[f"{key}.scales"], golden[f"{key}.zeros_u8"]
    codes = golden[f"{key}.codes_u8"]
    groups = weight.float().view(*scales.shape, -1)
    one_sign = (groups.amin(-1) > 0) | (groups.amax(-1) < 0)
    theirs = (codes.view(groups.shape).float() - zeros[..., None].float()) * scales[..., None]
    ours = q.dequantize().view(groups.shape)
    errors = [(values.float() - groups).square().sum(-1) for values in (ours, theirs)]
    assert bool((errors[0] < errors[1])[one_sign].all())
    usual = ~one_sign
    off = (q.codes.int() - codes.int()).view(groups.shape)[usual].abs()
    exact = weight.dtype == torch.float32
    assert (off <= (0 if exact else 1)).all()
    assert off.count_nonzero() <= off.numel() // 1000
    rtol = 0 if exact else 2e-3
    torch.testing.assert_close(q.scales[usual], scales[usual], atol=0, rtol=rtol)
    assert (q.zeros != zeros)[usual].sum() <= (0 if exact else 1e-3 * zeros.numel())
    if f"{key}.dequant" in golden:
        step = 0 if exact else float(scales.max())
        made, expected = q.dequantize(weight.dtype), golden[f"{key}.dequant"]
        made, expected = (x.view(groups.shape)[usual] for x in (made, expected))
        torch.testing.assert_close(made, expected, atol=step, rtol=0)


class Block:
    """The decoder layer behind a golden file, and what the searches need of it."""

    def __init__(self, name):
        self.golden, meta = vectors_and_notes(f"quant/{name}")
        weights = {key[3:]: t.float() for key, t in self.golden.items() if key.startswith("in.")}
        self.hidden = weights.pop("hidden")
        self.spec = group_spec(int(meta["w_bit"]), meta["group"])
        rows = weights["self_attn.k_proj.weight"].shape[0]
        kv_heads = int(meta.get("kv_heads", 4))
        config = LlamaConfig(
            hidden_size=self.hidden.shape[-1],
            intermediate_size=weights["mlp.up_proj.weight"].shape[0],
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=rows // kv_heads,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            attn_implementation="eager",
        )
        self.layer = LlamaDecoderLayer(config, 0).eval()
        self.layer.load_state_dict(weights)
        positions = torch.arange(self.hidden.shape[1])[None]
        causal = torch.full((positions.shape[1], positions.shape[1]), torch.finfo().min).triu(1)
        self.kwargs = {
            "position_embeddings": LlamaRotaryEmbedding(config)(self.hidden, positions),
            "attention_mask": causal[None, None],
        }
        splits = [meta[f"scale{i}"].split(" -> ") for i in range(4) if f"scale{i}" in meta]
        self.groups = [(previous, names.split(",")) for previous, names in splits]
        self.inputs = self._capture()

    def _capture(self):
        found = {}

        def keep(name):
            return lambda module, args: found.setdefault(name, args[0].detach())

        linears = [(n, m) for n, m in self.layer.named_modules() if isinstance(m, torch.nn.Linear)]
        hooks = [module.register_forward_pre_hook(keep(name)) for name, module in linears]
        self.layer(self.hidden, **self.kwargs)
        for hook in hooks:
            hook.remove()
        return found

    def weight(self, name):
        return self.layer.get_submodule(name).weight.data

    def module_loss(self, names):
        """Mean squared change of the inspected module's output, for replaced weights."""
        x = self.inputs[names[0]]
        inspected = names[0].rpartition(".")[0] if len(names) > 1 else names[0]
        module = self.layer.get_submodule(inspected)
        kwargs = self.kwargs if inspected == "self_attn" else {}

        def output():
            out = module(x, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        target = output()
        originals = [self.weight(name).clone() for name in names]

        def put(weights):
            for name, weight in zip(names, weights, strict=True):
                self.weight(name).copy_(weight)

        def loss(weights):
            put(weights)
            found = float((target - output()).square().mean())
            put(originals)
            return found

        return loss

    def fold(self, found):
        """Apply all scales, in the order of the groups; inputs become those of the scaled layer."""
        for (previous, names), scales in zip(self.groups, found, strict=True):
            rows = self.weight(previous)
            rows.div_(scales[:, None] if rows.dim() == 2 else scales)
            for name in names:
                self.weight(name).mul_(scales)
                self.inputs[name] = self.inputs[name] / scales

    def absmean(self, names):
        return self.inputs[names[0]].flatten(0, -2).abs().mean(0)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


BLOCKS = [
    "awq_block_mha_w4g32_layer0",
    "awq_block_mha_w4g32_layer1",
    "awq_block_gqa_w3g64_layer0",
    "awq_block_gqa_w3g64_layer1",
    "autoawq_block_duo",
    "autoawq_block_noduo",
]


def clip_error(weight, inputs, bounds, spec):
    """The clipping search's objective, summed over all groups, in float64."""
    chosen = inputs[:: max(1, inputs.shape[0] // 512)].double()
    delta = fake_quantize(weight, spec, clip_max=bounds, from_range=True).double() - weight.double()
    size = spec.group_size
    parts = [
        (chosen[:, i : i + size] @ delta[:, i : i + size].t()).square().mean(0).sum()
        for i in range(0, weight.shape[1], size)
    ]
    return float(sum(parts))


@pytest.mark.parametrize("name", BLOCKS)
def test_block_searches(name):
    block = Block(name)
    golden, duo = block.golden, name.endswith("_duo")
    found = []
    for i, (_, names) in enumerate(block.groups):
        result = search_scales_reference(
            [block.weight(n) for n in names],
            block.absmean(names),
            block.module_loss(names),
            block.spec,
            duo=duo,
        )
        losses = torch.tensor(result.losses, dtype=torch.float64)
        torch.testing.assert_close(losses, golden[f"scale{i}.loss_grid"], rtol=5e-3, atol=0)
        torch.testing.assert_close(result.scales, golden[f"scale{i}.scales"], rtol=1e-4, atol=0)
        if f"scale{i}.best_idx" in golden:
            assert round(result.ratio * 20) == int(golden[f"scale{i}.best_idx"])
        found.append(result.scales)
    block.fold(found)
    for norm in NORMS:
        if f"final.{norm}" in golden:
            torch.testing.assert_close(
                block.weight(norm), golden[f"final.{norm}"], rtol=1e-5, atol=0
            )
    clipped = {key[5:] for key in golden if key.startswith("clip.")}
    for linear in block.inputs:
        weight, inputs = block.weight(linear), block.inputs[linear].flatten(0, -2)
        bounds = None
        if linear in clipped:
            expected = golden[f"clip.{linear}"]
            bounds = search_clip_reference(weight, inputs, block.spec)
            equal = torch.isclose(bounds, expected, rtol=1e-4, atol=0).float().mean()
            assert equal >= 0.9, (linear, equal)
            ours = clip_error(weight, inputs, bounds, block.spec)
            assert ours <= 1.01 * clip_error(weight, inputs, expected, block.spec), linear
        if f"final.{linear}.codes" in golden:
            q = quantize(weight, block.spec, clip_max=bounds, from_range=True)
            same = (q.codes == golden[f"final.{linear}.codes"]).float().mean()
            assert same >= (0.9 if linear in clipped else 0.999), (linear, same)


@pytest.mark.parametrize("name", BLOCKS[:4])
def test_gram_searches_are_as_good_as_running_tokens(name):
    """Judged by what each search minimises: the linears' own output error, over all tokens."""
    block = Block(name)
    for i, (_, names) in enumerate(block.groups):
        weights = [block.weight(n) for n in names]
        x = block.inputs[names[0]].flatten(0, -2)
        gram = x.t() @ x
        result = search_scales_gram(weights, gram, block.absmean(names), block.spec)
        published = block.golden[f"scale{i}.scales"]

        def error(scales, weights=weights, x=x):
            deltas = [
                fake_quantize(w * scales, block.spec, from_range=True) / scales - w for w in weights
            ]
            return sum(float((x @ d.t()).square().sum()) for d in deltas)

        assert min(result.losses) == pytest.approx(error(result.scales), rel=1e-3)
        assert error(result.scales) <= error(published) * (1 + 1e-4)
        scaled = weights[0] * result.scales
        found = search_clip_gram(scaled, gram, block.spec, scales=result.scales)
        clip = fake_quantize(scaled, block.spec, **found.options()) / result.scales - weights[0]
        plain = fake_quantize(scaled, block.spec, from_range=True) / result.scales - weights[0]
        assert gram_error(clip, gram) < gram_error(plain, gram) * 1.1

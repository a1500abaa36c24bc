"""What is checked of a family: its tensors, linears, folds, and what a method writes of it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.pytorch_utils import Conv1D

from compressor.arch.load import ArchMap, find_map
from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.source import Source, open_source
from compressor.ir.layout import ModelLayout
from compressor.numerics.folding import fold
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.draft import draft
from compressor.runner.sweep import FinalStates, StreamedModel, run_blocks
from tests.support.recipes import short_recipe

CPU = choose_device("cpu")
IDS = torch.randint(2, 256, (2, 48), generator=torch.Generator().manual_seed(1))


def streamed(source: Source) -> FinalStates:
    (stream,) = run_blocks([StreamedModel(source)], IDS, device=CPU, dtype=torch.float32)
    return stream


def logits(source: Source) -> Tensor:
    stream = streamed(source)
    with stream.logits() as head:
        return torch.stack([head(hidden) for hidden in stream.hidden])


@torch.no_grad()
def logits_of_transformers(folder: Path) -> Tensor:
    config = AutoConfig.from_pretrained(folder)
    wraps = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    if config.model_type == "llama4":
        model = model.language_model  # the whole asks its text model for what came of images
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    if config.model_type in ("aya_vision", "cohere2_vision"):
        # transformers forgets there what the text model alone multiplies its logits with.
        found *= config.text_config.logit_scale
    return found


def compiled(model: Path, output: Path, passes: list[Any]) -> Source:
    recipe = short_recipe(model, output, passes)
    return open_source(compile_checkpoint(prepare(recipe, device=CPU)).output)


def every_tensor_has_one_place(source: Source, folder: Path) -> None:
    placed = [name for unit in source.layout.units for name in source.names(unit)]
    assert len(placed) == len(set(placed))
    weights = sum(math.prod(source.checkpoint.entries[name].spec.shape) for name in placed)
    stored = [load_file(path) for path in folder.glob("*.safetensors")]
    assert weights == sum(t.numel() for tensors in stored for t in tensors.values())


KEPT = {
    *("mlp.gate", "mlp.router", "mlp.shared_expert_gate", "router.proj", "feed_forward.gate"),
    *("feed_forward.router", "block_sparse_moe.gate", "block_sparse_moe.router.layer"),
    *("mixer.gate", "linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.in_proj_ba"),
    *(f"self_attn.indexer.{name}" for name in ("wq_b", "wk", "weights_proj")),
    *("mlp.gate.wg", "feed_forward.router", "mamba.x_proj", "mamba.dt_proj"),
    *("block_sparse_moe.router", "mixer.x_proj", "mixer.dt_proj", "mlp.router.gate"),
    *("self_attn.g_proj", "linear_attn.a_proj", "linear_attn.b_proj"),
    *(f"self_attn.{name}_proj" for name in ("b", "f_a", "f_b", "g_a", "g_b")),
}
"""Linears of blocks that no method rounds, of all families: routers, gates, indexers, and what
decides on the steps of a Mamba."""


def every_linear_is_one(source: Source, stream: FinalStates) -> None:
    """What transformers multiplies with in a block are the linears of the map; routers may be
    modules of their own. None but those that are kept by name is left alone."""
    for unit in source.layout.blocks:
        kept = {x.name.removeprefix(f"{unit.name}.") for x in unit.linears if x.role == "router"}
        assert kept <= KEPT, kept - KEPT
    for unit in source.layout.blocks:
        layer = stream.model.runner.layers[unit.index]
        theirs = {n for n, m in layer.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
        path = stream.model.runner.names.linear_path
        own = [linear for linear in unit.linears if linear.expert is None]
        ours = {path(unit, linear) for linear in own if linear.role != "router"}
        routers = {path(unit, linear) for linear in own if linear.role == "router"}
        assert ours <= theirs <= ours | routers
        stacks = {n.rpartition(".")[0] for n, p in layer.named_parameters() if p.dim() == 3}
        experts = {path(unit, linear) for linear in unit.linears if linear.expert is not None}
        assert experts == {n for n in stacks if "conv" not in n}


def no_fold_changes_what_a_block_computes(source: Source, stream: FinalStates) -> None:
    runner = stream.model.runner
    hidden = runner.embed(stream.model.tensors(0), IDS)
    handed = runner.handed
    generator = torch.Generator().manual_seed(3)
    for unit in source.layout.blocks:
        tensors = stream.model.floats(source.read_unit(unit))
        with runner.loaded(unit, tensors) as block:
            expected = block.forward(hidden, handed)
            after = block.handed
        assert unit.folds
        for how in unit.folds:
            source_weight = tensors[f"{how.source}.weight"]
            channels = how.rows.total if how.rows else source_weight.shape[0]
            scale = torch.rand(channels, generator=generator) * 1.5 + 0.5
            changed = fold(tensors, how, unit, scale, dtype=torch.float64)
            with runner.loaded(unit, {**tensors, **changed}) as block:
                found = block.forward(hidden, handed)
            where = f"{unit.name}: {how.source} into {how.site}"
            assert (found - expected).abs().max() < 2e-5 * expected.abs().max(), where
        hidden, handed = expected, after


def compiled_and_loaded(source: Source, before: Tensor, folder: Path, step: dict[str, Any]) -> None:
    """A method runs from end to end; what it wrote loads in transformers with our logits."""
    original = source.checkpoint.folder
    written = compiled(original, folder / "out", [step])
    assert {linear.name for linear in written.layout.linears if packed(written, linear.name)} == {
        linear.name
        for linear in source.layout.linears
        if linear.role not in ("router", "lm_head") and not linear.beside
    }
    ours = logits(written)
    # The median token: in a random model, rounding sends some tokens to another expert.
    errors = (ours - before).norm(dim=-1) / before.norm(dim=-1)
    assert errors.median() < 0.2
    for name in written.layout.carried:
        kept = written.checkpoint.read([name])[name]
        assert torch.equal(kept, source.checkpoint.read([name])[name])
    for unit in source.layout.blocks:
        for name in unit.others:
            assert written.checkpoint.entries[name].spec == source.checkpoint.entries[name].spec
    if holds_no_packed_weights(source):
        theirs = logits_of_transformers(make_dense(written, original, folder / "dense"))
    else:
        theirs = logits_of_transformers(written.checkpoint.folder)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def holds_no_packed_weights(source: Source) -> bool:
    """Whether transformers keeps weights of this model in what is no linear of its own: stacked
    experts, linears that lie [in, out], Falcon's; or fails while it initializes their modules."""
    stacked = any(unit.stacks for unit in source.layout.blocks)
    fails = {"falcon", "gpt_bigcode", "mamba", "mamba2", "falcon_mamba"}
    fails |= {"kimi_linear", "olmo_hybrid"}
    return stacked or source.arch.model_type in fails


def said(layout: ModelLayout) -> list[Any]:
    """What a map says of a checkpoint, in no order."""
    return [
        (
            unit.name,
            {(x.name, x.role, x.site, x.shape, x.rows, x.fused, x.bias) for x in unit.linears},
            {(x.name, x.role, x.offset, x.kind, x.bias) for x in unit.norms},
            {(x.site, x.source, x.repeat, x.rows, x.norm_offset) for x in unit.folds},
            set(unit.others),
        )
        for unit in layout.units
    ]


def marks_of_an_equal_draft(checkpoint: Checkpoint) -> int | None:
    """How many places a drafted map marks that says of a checkpoint what its own map says; None
    where it says another thing."""
    config, headers = checkpoint.config, checkpoint.shapes
    found = draft(config, headers)
    data = {"model_type": config["model_type"], **found.data}
    drafted = ArchMap.model_validate_json(json.dumps(data)).layout(config, headers)
    own = find_map(config, headers).layout(config, headers)
    return len(found.unsure) if said(drafted) == said(own) else None


def packed(source: Source, name: str) -> bool:
    return source.schemes.linears[name].weight is not None


def make_dense(source: Source, model: Path, folder: Path) -> Path:
    """What a packed checkpoint stands for, in the layout of the model that it was made from."""
    shutil.copytree(model, folder)
    state: dict[str, Tensor] = {}
    for unit in source.layout.units:
        tensors = source.read_unit(unit).dequantized()
        if unit.kind == "block":
            built = source.arch.runtime.block_state(unit, tensors)
            tensors = {f"{unit.name}.{n}": t.contiguous() for n, t in built.items()}
        state |= tensors
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

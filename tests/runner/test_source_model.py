"""The source as model passes see it: whole, it gives the logits transformers gives."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.checkpoint.source import open_source
from compressor.runner.source_model import SourceModel

TYPES = ("llama", "qwen2", "gemma2", "opt", "mixtral", "phi3")


@pytest.mark.parametrize("model_type", TYPES)
def test_the_whole_model_is_the_model(model_type, tiny_model):
    folder = tiny_model(model_type)
    model = SourceModel(open_source(folder), device=torch.device("cpu"), dtype=torch.float32)
    whole = model.whole()
    # Soft caps exist in the eager attention only, which is what the runner takes for them.
    eager = "eager" if model_type == "gemma2" else "sdpa"
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=eager).eval()
    ids = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, loaded(ids).logits)
    assert not any(parameter.requires_grad for parameter in whole.parameters())


def test_blocks_that_multiply_bfloat16_keep_all_else_in_float32(tiny_model):
    source = open_source(tiny_model("llama"))
    ids = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for quick in (False, True):
        model = SourceModel(source, device=torch.device("cpu"), dtype=torch.float32, quick=quick)
        entering = model.runner.embed(model.tensors(0), ids)
        with model.runner.loaded(source.layout.blocks[0], model.tensors(1)) as block:
            found.append(block.forward(entering))
        assert not torch.is_autocast_enabled("cpu")
    wide, narrow = found
    assert narrow.dtype == torch.float32 and not torch.equal(wide, narrow)
    assert float((narrow - wide).norm() / wide.norm()) < 0.02

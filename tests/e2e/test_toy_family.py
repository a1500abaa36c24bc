"""A family unlike all others runs from end to end: the linears of its experts are slices of one
stacked, transposed tensor without `.weight` in its name, and two mixers stand side by side."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from compressor.checkpoint.source import Source, open_source
from compressor.errors import InputError
from compressor.evaluate.perplexity import evaluate
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.verify import verify
from tests.support.tiny_models import tokenizer

CPU = choose_device("cpu")
HIDDEN, EXPERTS = 64, 3
MAP = """
sizes:
  layers: num_hidden_layers
  hidden: hidden_size
  vocab: vocab_size
  heads: num_attention_heads
  kv_heads: num_key_value_heads
  experts: num_local_experts
embedding: {token: model.embed_tokens}
layer: model.layers.{i}
attention:
  mixer: [self, linear]
  norms:
    - {name: input_layernorm, role: norm.attn, size: hidden}
  linears:
    - {name: self_attn.q_proj, role: attn.q, site: attn.in, shape: [q, hidden]}
    - {name: self_attn.k_proj, role: attn.k, site: attn.in, shape: [kv, hidden]}
    - {name: self_attn.v_proj, role: attn.v, site: attn.in, shape: [kv, hidden]}
    - {name: self_attn.o_proj, role: attn.o, site: attn.out, shape: [hidden, q]}
    - {name: average.in_proj, role: linear.in, site: attn.in, shape: [hidden, hidden]}
    - {name: average.out_proj, role: linear.out, site: linear.out, shape: [hidden, hidden]}
  folds:
    - {site: attn.in, source: input_layernorm}
    - {site: attn.out, source: self_attn.v_proj, per_head: true}
mlp:
  - norms:
      - {name: post_attention_layernorm, role: norm.mlp, size: hidden}
    linears:
      - {name: mlp.router, role: router, site: expert.in, shape: [experts, hidden]}
      - {name: "mlp.experts.{e}.gate", role: expert.gate, site: expert.in, shape: [hidden, hidden]}
      - {name: "mlp.experts.{e}.up", role: expert.up, site: expert.in, shape: [hidden, hidden]}
      - name: "mlp.experts.{e}.down"
        role: expert.down
        site: "expert.{e}.out"
        shape: [hidden, hidden]
head:
  norm: {name: model.norm, role: norm.final, size: hidden}
  linear: lm_head
runtime:
  layers: model.layers
  embedding: model.embed_tokens
  norm: model.norm
  lm_head: lm_head
  stacks:
    - into: mlp.experts.matrices
      sources: ["mlp.experts.{e}.gate", "mlp.experts.{e}.up", "mlp.experts.{e}.down"]
      transposed: true
"""


class ToyConfig(LlamaConfig):
    model_type = "toy_stacked"


class Matrices(nn.Module):
    """All experts' matrices [experts, in, gate and up and down]."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.empty(EXPERTS, HIDDEN, 3 * HIDDEN))

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            gate, up, down = self.matrices[expert].split(HIDDEN, dim=1)
            out = out + shares[..., expert, None] * ((torch.sigmoid(x @ gate) * (x @ up)) @ down)
        return out


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Matrices()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x).softmax(-1))


class Average(nn.Module):
    """What came before, on average."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.out_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        return self.out_proj(self.in_proj(x).cumsum(1) / count[:, None])


class ToyLayer(LlamaDecoderLayer):
    def __init__(self, config: ToyConfig, index: int) -> None:
        super().__init__(config, index)
        self.mlp = Experts()
        self.average = Average()

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **options)
        hidden_states = hidden_states + attended + self.average(normed)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        layers = (ToyLayer(config, i) for i in range(config.num_hidden_layers))
        self.model.layers = nn.ModuleList(layers)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    AutoConfig.register("toy_stacked", ToyConfig)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
    folder = tmp_path_factory.mktemp("toy")
    config = ToyConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=128,
        num_local_experts=EXPERTS,
        architectures=["ToyForCausalLM"],
    )
    model, generator = ToyForCausalLM(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / HIDDEN**0.5 if parameter.dim() > 1 else 1 + 0.2 * noise)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    yield folder
    CONFIG_MAPPING._extra_content.pop("toy_stacked")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(ToyConfig)


@pytest.fixture(autouse=True)
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "toy_stacked.yaml").write_text(MAP)
    monkeypatch.setattr("compressor.arch.load.MAPS", tmp_path / "maps")


def compiled(model: Path, output: Path, *passes: Any) -> Source:
    data = {
        "model": str(model),
        "output": str(output),
        "passes": list(passes),
        "calibration": {"samples": 8, "length": 32},
    }
    compile_checkpoint(prepare(make_recipe(data), device=CPU))
    return open_source(output)


def test_all_of_it_is_rounded_verified_and_evaluated(toy: Path, tmp_path: Path) -> None:
    source = open_source(toy)
    block = source.layout.blocks[0]
    assert [mixer.kind for mixer in block.mixers] == ["self", "linear"]
    assert [mixer.path.rpartition(".")[2] for mixer in block.mixers] == ["self_attn", "average"]
    assert block.attention is not None and block.mixers[1].shape is None
    written = compiled(toy, tmp_path / "out", {"rtn": {"bits": 8, "group_size": 32}})
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.mlp.experts.2.down.weight_packed" in names
    assert not [name for name in names if name.endswith("matrices")]
    found = verify(tmp_path / "out", against=source, device=CPU)
    assert found.ok, [check for check in found.checks if not check.ok]
    outputs = next(check for check in found.checks if check.name == "outputs to the original")
    assert "2 blocks" in outputs.detail
    ids = torch.randint(2, 256, (3, 40), generator=torch.Generator().manual_seed(1))
    result = evaluate(written, ids, device=CPU, dtype=torch.float32, against=source)
    assert result.kl is not None and 0 < result.kl.value < 1e-3
    # The slices that were read are what the model itself multiplies with.
    whole = AutoModelForCausalLM.from_pretrained(toy).eval()
    with torch.no_grad():
        theirs = float(whole(ids, labels=ids).loss)
    assert result.original_nll is not None
    assert result.original_nll.value == pytest.approx(theirs, rel=1e-5)


def test_mixers_are_calibrated_and_experts_stay_in_their_stack(toy: Path, tmp_path: Path) -> None:
    targets = ["attn.*", "linear.*"]
    step = {"gptq": {"bits": 4, "group_size": 32, "correction": 0.5, "targets": targets}}
    written = compiled(toy, tmp_path / "out", step)
    before, after = (load_file(x / "model.safetensors") for x in (toy, tmp_path / "out"))
    stacks = [name for name in before if name.endswith("matrices")]
    assert len(stacks) == 2 and all(torch.equal(before[name], after[name]) for name in stacks)
    assert "model.layers.0.average.out_proj.weight_packed" in after
    assert verify(tmp_path / "out", against=open_source(toy), device=CPU).ok
    assert {x.role for x in written.layout.linears if written.schemes.linears[x.name].weight} == {
        *("attn.q", "attn.k", "attn.v", "attn.o", "linear.in", "linear.out"),
    }


def test_experts_that_cannot_be_observed_are_refused_before_the_run(
    toy: Path, tmp_path: Path
) -> None:
    data = {"model": str(toy), "output": str(tmp_path / "out")}
    step = {"awq": {"bits": 4, "group_size": 32}}
    with pytest.raises(InputError, match="Matrices keeps its experts in a form"):
        prepare(make_recipe({**data, "passes": [step]}), device=CPU)

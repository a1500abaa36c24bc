"""One base, several fine-tunes: generate with a different fine-tune in each row of a batch.

    python docs/examples/multi_tenant.py BASE DELTA DELTA ... --prompt "Call me"

BASE is a checkpoint folder, each DELTA what a recipe with the pass `bitdelta` wrote. The base's
weights are in memory once; a fine-tune adds one bit for each of them, and its own embeddings, norms
and head. In every linear the base's product is one matrix product over all rows, and each row adds
alpha * (S x) of its own fine-tune: the Triton kernel on a GPU, its plain reference on a CPU.

It works for dense architectures whose modules are named as in the checkpoint (Llama, Mistral, Qwen,
Gemma, Phi-3, OPT), and for fine-tunes with the base's rotary settings.
"""

import argparse
import copy
from pathlib import Path

import torch
from compressor_kernels.linear.bitdelta import delta_matmul, delta_matmul_ref
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compressor.checkpoint.delta.source import Delta, merged_source, open_delta
from compressor.checkpoint.source import open_source
from compressor.errors import CompressError, InputError


class TenantLinear(nn.Module):
    """A linear of the base, plus each row's own delta.

    signs [bits, rows, ceil(in / 32), out] and alpha [bits, rows]; a row whose fine-tune has the
    base's weight has alpha 0. bias [rows, 1, out], or None.
    """

    def __init__(self, base: nn.Linear, signs: Tensor, alpha: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = base.weight
        self.register_buffer("signs", signs)
        self.register_buffer("alpha", alpha)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, tokens, in] → [rows, tokens, out]."""
        y = nn.functional.linear(x, self.weight)
        product = delta_matmul if x.is_cuda else delta_matmul_ref
        for signs, alpha in zip(self.signs, self.alpha, strict=True):
            y = product(x, signs, alpha, base_out=y)
        return y if self.bias is None else y + self.bias


class TenantModules(nn.Module):
    """A small module of which every row has its own: a norm, the embedding, the head.

    Outputs of another width (a resized vocabulary) are filled up with -inf.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.rows = nn.ModuleList(modules)
        self.weight = modules[0].weight  # models ask for its dtype and device

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, ...], each row through its own module."""
        out = [module(x[i : i + 1]) for i, module in enumerate(self.rows)]
        width = max(y.shape[-1] for y in out)
        full = [nn.functional.pad(y, (0, width - y.shape[-1]), value=-torch.inf) for y in out]
        return torch.cat(full)


def load_tenants(
    base: Path, folders: list[Path], *, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The base in transformers, set up so that row i of a batch runs with delta i.

    Raises InputError where a delta is not one of this base, or needs other rotary settings.
    """
    deltas = [open_delta(folder) for folder in folders]
    source = open_source(base)
    for delta in deltas:
        merged_source(delta, source)  # refuses what does not fit together
        _require_same_rotary(source.checkpoint.config, delta)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device).eval()
    full = {_path(name) for delta in deltas for name in _full_names(delta)}
    coded = {name for delta in deltas for name in delta.bits}
    _require_same_targets(deltas, coded)
    for name in sorted(coded):
        _replace(model, name, _linear(model.get_submodule(name), name, deltas, dtype))
    for path in sorted(full - coded):
        module = model.get_submodule(path)
        _replace(model, path, TenantModules([_own(module, path, d, dtype) for d in deltas]))
    if model.config.tie_word_embeddings:
        # A tied head is the embedding: every row's head follows its own.
        embedding = model.get_input_embeddings()
        if isinstance(embedding, TenantModules):
            model.set_output_embeddings(TenantModules([_head(x) for x in embedding.rows]))
    return model


def generate(
    model: PreTrainedModel, tokenizers: list, prompts: list[str], *, max_new_tokens: int
) -> list[str]:
    """One greedy continuation per row, row i by fine-tune i with its own tokenizer."""
    rows = [t(prompt).input_ids for t, prompt in zip(tokenizers, prompts, strict=True)]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return [t.decode(row[longest:]) for t, row in zip(tokenizers, out.tolist(), strict=True)]


def _linear(base: nn.Module, name: str, deltas: list[Delta], dtype: torch.dtype) -> TenantLinear:
    assert isinstance(base, nn.Linear)
    bits = max(delta.bits.get(name, 0) for delta in deltas)
    words, device = -(-base.in_features // 32), base.weight.device
    signs = torch.zeros(bits, len(deltas), words, base.out_features, dtype=torch.int32)
    alpha = torch.zeros(bits, len(deltas))
    for row, delta in enumerate(deltas):
        if name in delta.bits:
            stored = delta.checkpoint.read([f"{name}.delta_signs", f"{name}.delta_scales"])
            count = delta.bits[name]
            signs[:count, row] = stored[f"{name}.delta_signs"]
            alpha[:count, row] = stored[f"{name}.delta_scales"]
    bias = None
    if base.bias is not None:
        own = [_tensor(f"{name}.bias", delta, base.bias, dtype) for delta in deltas]
        bias = torch.stack(own).unsqueeze(1)
    return TenantLinear(base, signs.to(device), alpha.to(device), bias)


def _own(module: nn.Module, path: str, delta: Delta, dtype: torch.dtype) -> nn.Module:
    """A copy of a module with what the delta stores of it in full."""
    copied = copy.deepcopy(module)
    for leaf, value in list(copied.named_parameters(recurse=False)):
        tensor = _tensor(f"{path}.{leaf}", delta, value, dtype)
        setattr(copied, leaf, nn.Parameter(tensor, requires_grad=False))
    return copied


def _tensor(name: str, delta: Delta, base: Tensor, dtype: torch.dtype) -> Tensor:
    if name not in delta.checkpoint.entries:
        return base.detach()
    return delta.checkpoint.read([name])[name].to(base.device, dtype)


def _head(embedding: nn.Module) -> nn.Linear:
    weight = embedding.weight
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = weight
    return head


def _full_names(delta: Delta) -> list[str]:
    """Tensors stored as they are."""
    leaves = (".delta_signs", ".delta_scales")
    return [name for name in delta.checkpoint.entries if not name.endswith(leaves)]


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _require_same_targets(deltas: list[Delta], coded: set[str]) -> None:
    for delta in deltas:
        whole = [name for name in sorted(coded) if f"{name}.weight" in delta.checkpoint.entries]
        if whole:
            raise InputError(
                f"{delta.checkpoint.folder} holds {whole[0]} in full, another delta as signs",
                hint="make both with the same targets",
            )


def _require_same_rotary(config, delta: Delta) -> None:
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        if config.get(key) != delta.checkpoint.config.get(key):
            raise InputError(
                f"{delta.checkpoint.folder} has another {key} than the base",
                hint="serve it alone, after compress delta apply",
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("deltas", type=Path, nargs="+")
    parser.add_argument("--prompt", default="The")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else open_source(options.base).checkpoint.dtype
    try:
        model = load_tenants(options.base, options.deltas, device=device, dtype=dtype)
    except CompressError as error:
        parser.error(f"{error.message}" + (f" ({error.hint})" if error.hint else ""))
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in options.deltas]
    prompts = [options.prompt] * len(tokenizers)
    texts = generate(model, tokenizers, prompts, max_new_tokens=options.max_new_tokens)
    for folder, text in zip(options.deltas, texts, strict=True):
        print(f"{folder.name}: {options.prompt}{text}")


if __name__ == "__main__":
    main()

"""Damages of written checkpoints, whose manifests are signed again, and whether `verify --against`
sees them.

Every damage is measured: the mean KL divergence of the damaged file's next tokens to the undamaged
one's, beside that of the undamaged to the original's, which is what rounding did.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.checkpoint.delta.source import is_delta, open_model
from compressor.checkpoint.manifest import MANIFEST_NAME, Manifest, hash_file, read_manifest
from compressor.checkpoint.safetensors import tensor_bytes
from compressor.checkpoint.source import open_source
from compressor.errors import CompressError
from compressor.evaluate.perplexity import evaluate
from compressor.plan.recipe import make_recipe
from compressor.run.session import compile_checkpoint, prepare
from compressor.verify.compare_outputs import held_out_rows
from compressor.verify.verify import verify
from tests.support.tiny_models import build

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]
Change = Callable[[Path], None]
"""Damages the checkpoint in a folder."""

G4 = {"bits": 4, "group_size": 32}
W8A8 = {"bits": 8, "group_size": None, "activations": "token"}

CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "rtn4": ("llama", [{"rtn": {**G4, "symmetric": False}}], {}),
    "rtn8": ("qwen2", [{"rtn": {"bits": 8, "group_size": 32}}], {"format": "gptq"}),
    "awq4": ("llama", [{"awq": {**G4, "symmetric": False}}], {"format": "autoawq"}),
    "gptq4": ("qwen3", [{"gptq": G4}], {}),
    "smoothquant": ("opt", [{"smoothquant": {}}, {"rtn": W8A8}], {}),
    "fp8": ("gemma2", [{"fp8": {}}], {}),
    "nvfp4": ("mixtral", [{"nvfp4": {}}], {}),
    "rotate8": ("llama", [{"rotate": {"seed": 1}}, {"rtn": {"bits": 8, "group_size": 32}}], {}),
    "qoq": ("llama", [{"qoq": {"group_size": 32}}], {"format": "qserve"}),
    "kv8": ("llama", [{"kv_cache": {"element": "int8"}}], {"format": "compressed-tensors"}),
    "streaming": ("llama", [{"streaming": {"sinks": 2, "window": 16}}, {"rtn": G4}], {}),
    "quest": (
        "llama",
        [{"quest": {"page_size": 4, "token_budget": 16, "dense_layers": [0]}}],
        {},
    ),
    "delta": ("llama", [{"bitdelta": {"distill": "none"}}], {}),
}


def in_tensors(change: Callable[[Tensors], object]) -> Change:
    """Change the tensors of the one shard."""

    def damage(folder: Path) -> None:
        (file,) = folder.glob("model*.safetensors")
        found = load_file(file)
        change(found)
        ready = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(ready, file, metadata={"format": "pt"})

    return damage


def of(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """Change one tensor."""
    return in_tensors(lambda found: found.update({name: change(found[name].clone())}))


def scaled(name: str, by: float) -> Change:
    return of(name, lambda t: (t.float() * by).to(t.dtype))


def swapped(one: str, two: str) -> Change:
    return in_tensors(lambda x: x.update({one: x[two].clone(), two: x[one].clone()}))


def two_rows(tensor: Tensor) -> Tensor:
    tensor[[1, 5]] = tensor[[5, 1]]
    return tensor


def in_json(
    name: str, change: Callable[[dict[str, Any]], object] | None = None, **new: Any
) -> Change:
    """Change a JSON file, or set keys of it."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (change or (lambda found: found.update(new)))(data)
        (folder / name).write_text(json.dumps(data))

    return damage


def written(name: str, text: str) -> Change:
    """A file that was not there, or said something else."""
    return lambda folder: (folder / name).write_text(text) and None


def sign(folder: Path) -> None:
    """Write a manifest that fits what lies there now."""
    old = read_manifest(folder)
    assert old is not None
    hashes: dict[str, str] = {}
    for file in folder.glob("model*.safetensors"):
        for name, tensor in load_file(file).items():
            hashes[name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    files = {n: hash_file(folder / n) for n in old.files if (folder / n).is_file()}
    (folder / MANIFEST_NAME).write_bytes(Manifest(files, hashes, old.about).to_bytes())


def weight_damages(names: dict[str, Tensor]) -> Iterator[tuple[str, Change]]:
    """Of what holds weights, biases and scales."""
    layers = sorted({n.split(".layers.")[1].split(".")[0] for n in names if ".layers." in n})
    for name, tensor in names.items():
        leaf = name.rpartition(".")[2]
        if ".experts." in name and ".experts.1." not in name:
            continue
        small = leaf in ("k_scale", "v_scale", "input_scale", "input_global_scale")
        if small:
            yield f"{name} / 8", scaled(name, 1 / 8)
            yield f"{name} * 64", scaled(name, 64.0)
        elif "scale" in leaf and tensor.is_floating_point() and f".{layers[-1]}." in name:
            yield from ((f"{name} * {by}", scaled(name, by)) for by in (1.02, 1.1, 4.0, -1.0))
        elif "norm" in name and leaf == "weight" and f".{layers[0]}." not in name:
            yield f"{name} * 1.02", scaled(name, 1.02)
            yield f"{name} * 1.5", scaled(name, 1.5)
        elif leaf == "bias" and f".{layers[-1]}." in name:
            yield f"{name} * -1", scaled(name, -1.0)
        elif leaf in ("weight", "weight_packed", "qweight", "signs") and f".{layers[0]}." in name:
            yield f"{name} zeroed", of(name, lambda t: torch.zeros_like(t))
            if tensor.dim() > 1 and tensor.shape[0] > 5:
                yield f"{name} two rows swapped", of(name, two_rows)
            other = name.replace(f".{layers[0]}.", f".{layers[-1]}.", 1)
            if other in names and names[other].shape == tensor.shape:
                yield f"{name} swapped with layer {layers[-1]}", swapped(name, other)
        elif leaf in ("weight_zero_point", "qzeros") and f".{layers[0]}." in name:
            # One more in each of eight zero points of four bits.
            yield f"{name} + 1", of(name, lambda t: t + 0x11111111)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        full = next((n for n in names if n.endswith(name)), None)
        if full is not None:
            yield f"{full} two rows swapped", of(full, two_rows)
            yield f"{full} * 1.1", scaled(full, 1.1)
            yield f"{full} rolled", of(full, lambda t: t.roll(1, 0))


CONFIG: dict[str, Any] = {
    "rms_norm_eps": 0.1, "layer_norm_eps": 0.1, "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 4, "sliding_window": 4,
    "num_experts_per_tok": 1, "hidden_act": "gelu", "activation_function": "gelu",
    "hidden_activation": "gelu",
}  # fmt: skip
"""Keys of config.json and what they are changed to; `relu` where they say gelu."""


def config_damages(config: dict[str, Any]) -> Iterator[tuple[str, Change]]:
    """Of config.json."""
    if rope := config.get("rope_parameters"):
        for name, new in (
            ("rope theta", {"rope_theta": 500.0}),
            ("rope scaling", {"rope_type": "linear", "factor": 4.0}),
        ):
            yield name, in_json("config.json", rope_parameters={**rope, **new})
    for key, value in CONFIG.items():
        if config.get(key) is not None:
            new = "relu" if value == "gelu" == config[key] else value
            yield key, in_json("config.json", **{key: new})
    yield "bos and eos", in_json("config.json", bos_token_id=1, eos_token_id=0)


POLICY = "attention_policy.json"
RULES = {
    ("streaming", "window"): 4, ("streaming", "sinks"): 0, ("streaming", "heads"): [0],
    ("blocks", "top_k"): 1, ("blocks", "block_size"): 2,
}  # fmt: skip
"""Fields of a layer's policy and what they are changed to."""


def file_damages(folder: Path) -> Iterator[tuple[str, Change]]:
    """Of tokenizer, generation ids and policy."""

    def swap_tokens(data: dict[str, Any]) -> None:
        words = data["model"]["vocab"]
        a, b = list(words)[10:12]
        words[a], words[b] = words[b], words[a]

    yield "tokenizer.json: two tokens swapped", in_json("tokenizer.json", swap_tokens)
    config = "tokenizer_config.json"
    yield f"{config}: add_bos_token", in_json(config, add_bos_token=True)
    yield "stray chat template", written("chat_template.jinja", "{{ messages }}")
    if (folder / "generation_config.json").is_file():
        yield "generation_config.json: eos", in_json("generation_config.json", eos_token_id=7)
    if not (folder / POLICY).is_file():
        streaming = {"streaming": {"heads": [0, 1], "sinks": 1, "window": 2}}
        policy = {"version": 1, "heads": 4, "kv_heads": 2, "layers": [streaming, streaming]}
        yield "stray policy", written(POLICY, json.dumps(policy))
        return
    yield "policy lost", lambda copy: (copy / POLICY).unlink()
    for place, which in ((0, "first"), (-1, "last")):
        lose = in_json(POLICY, lambda data, at=place: data["layers"].__setitem__(at, {}))
        yield f"policy: {which} layer full", lose
    last = json.loads((folder / POLICY).read_text())["layers"][-1]
    for (part, key), value in RULES.items():
        if part in last:
            new = {**last, part: {**last[part], key: value}}
            change = in_json(POLICY, lambda data, new=new: data["layers"].__setitem__(-1, new))
            yield f"policy: {part}.{key}", change
    yield "policy: positions", in_json(POLICY, positions="text")


NOT_LOGITS = ("tokenizer", "generation", "stray chat", "bos and eos")
"""Damages that change what is computed, but not from given token ids."""


@dataclass(frozen=True)
class Outcome:
    """One damage; `rounding` is what the run itself did.

    kl  None where the file cannot be run, or logits do not show the damage: it has to be seen
    """

    case: str
    damage: str
    seen: bool
    kl: float | None
    rounding: float

    @property
    def missed(self) -> bool:
        """Not seen though it is large; or seen where there is none."""
        if self.damage == "none":
            return self.seen
        return not self.seen and (self.kl is None or self.kl > self.rounding)


class Case:
    """Its original, the written checkpoint, and copies of that."""

    def __init__(self, case: str, work: Path) -> None:
        kind, passes, top = CASES[case]
        self.case, self.work = case, work / case
        shutil.rmtree(self.work, ignore_errors=True)
        self.model = build(kind, self.work / "model", dtype=torch.bfloat16)
        self.base: str | None = None
        if case == "delta":
            self.base = str(build(kind, self.work / "base", dtype=torch.bfloat16))
            passes = [{"bitdelta": {**passes[0]["bitdelta"], "base": self.base}}]
            self._fine_tune()
        tied = open_source(self.model).layout.tied is not None
        recipe = {
            "model": str(self.model),
            "output": str(self.work / "out"),
            "passes": passes,
            "calibration": {"samples": 16, "length": 64},
            "untie": tied and case in ("rotate8", "qoq"),
            **top,
        }
        self.output = compile_checkpoint(prepare(make_recipe(recipe), device=CPU)).output
        self.ids = held_out_rows(open_source(self.model))[0]
        self.rounding = self.kl(self.output, self.model)

    def _fine_tune(self) -> None:
        file = self.model / "model.safetensors"
        found = load_file(file)
        generator = torch.Generator().manual_seed(7)
        for name, tensor in found.items():
            noise = torch.randn(tensor.shape, generator=generator) * 0.02
            found[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(found, file, metadata={"format": "pt"})

    def kl(self, ours: Path, theirs: Path) -> float:
        """Mean KL divergence of the next tokens, in nats."""
        one, other = (
            open_model(f, base=self.base if is_delta(f) else None) for f in (ours, theirs)
        )
        found = evaluate(one, self.ids, device=CPU, dtype=torch.float32, against=other).kl
        assert found is not None
        return found.value

    def verified(self, folder: Path) -> bool:
        against = open_source(self.model)
        try:
            return verify(folder, base=self.base, against=against, device=CPU).ok
        except CompressError:
            return False

    def damages(self) -> Iterator[tuple[str, Change]]:
        (file,) = self.output.glob("model*.safetensors")
        yield from weight_damages(load_file(file))
        yield from config_damages(json.loads((self.output / "config.json").read_text()))
        yield from file_damages(self.output)

    def run(self, every: int = 1) -> Iterator[Outcome]:
        """An undamaged copy first, signed again, which has to pass."""
        for number, (name, change) in enumerate(
            [("none", in_tensors(lambda found: None)), *self.damages()]
        ):
            if number % every:
                continue
            copy = Path(shutil.copytree(self.output, self.work / "copy"))
            try:
                change(copy)
                sign(copy)
                seen = not self.verified(copy)
                try:
                    kl = None if name.startswith(NOT_LOGITS) else self.kl(copy, self.output)
                except (CompressError, RuntimeError, ValueError, AssertionError):
                    kl = None
            finally:
                shutil.rmtree(copy)
            yield Outcome(self.case, name, seen, kl, self.rounding)

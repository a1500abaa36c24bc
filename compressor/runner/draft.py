"""A first map of a family that has none, from transformers' model of it and the names in the files.

What follows from names alone, and is not seen on a block that runs, is marked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compressor.arch.runtime_names import RuntimeNames
from compressor.errors import InputError
from compressor.ir.layout import bias_name, is_weight, weight_name
from compressor.runner.block_runner import BlockRunner
from compressor.runner.draft_block import Around, DraftBlock, is_norm, norm_row, stored_in
from compressor.runner.layer_inputs import layer_inputs
from compressor.runner.model import build_config, build_model

LENGTH = 12
SIZES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "vocab": ("vocab_size",),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "ff": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "moe_ff": ("moe_intermediate_size",),
    "shared_ff": ("shared_expert_intermediate_size",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}


@dataclass(slots=True)
class Draft:
    """A map as plain data, and what in it is not certain."""

    data: dict[str, Any]
    unsure: list[str] = field(default_factory=list)


def draft(config: Mapping[str, Any], headers: Mapping[str, Sequence[int]]) -> Draft:
    """A first map of a model with this config and these tensors (name → shape).

    Raises InputError where transformers does not know the type, or its blocks are not found.
    """
    return _Drafting(config, headers).draft()


class _Drafting:
    def __init__(self, config: Mapping[str, Any], headers: Mapping[str, Sequence[int]]) -> None:
        self.config, self.headers = config, headers
        self.unsure: list[str] = []
        built = build_config(config)
        text = built.get_text_config()
        if text is not built:
            raise InputError(
                f"{built.model_type} holds a text model, {text.model_type}, inside",
                hint=f"its map says where: text: {{model_type: {text.model_type}, names: …}}, as "
                "those of llava and gemma3 do (compressor/arch/maps)",
            )
        model = build_model(built, torch.float32)
        paths = {module: path for path, module in model.named_modules()}
        lists = [m for m in paths if isinstance(m, nn.ModuleList) and _has_linears(m)]
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if not lists or None in ends:
            raise InputError("transformers' model of this type has no list of blocks that is found")
        blocks = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
        root = paths[blocks].rpartition(".")[0]
        norms = [n for n, m in model.get_submodule(root).named_children() if is_norm(m)]
        self.names = RuntimeNames(
            layers=paths[blocks],
            embedding=paths[ends[0]],
            norm=f"{root}.{norms[-1]}" if norms else "",
            lm_head=paths[ends[1]],
        )
        if len(norms) != 1:
            self.unsure.append(f"which norm is the last one: {', '.join(norms) or 'none found'}")
        self.runner = BlockRunner(
            config, self.names, device=torch.device("cpu"), dtype=torch.float32
        )
        self.layer = self._on_disk()

    def draft(self) -> Draft:
        """The map."""
        kinds = self._kinds()
        if len(kinds) > 1:
            self.unsure.append("blocks of several kinds: `has:` tells them apart by one module")
        torch.manual_seed(0)
        arguments: dict[int, dict[str, Any]] = {}
        hidden = torch.randn(1, LENGTH, self._key("hidden_size", "n_embd", "d_model"))
        root = self.runner.model.get_submodule(self.names.layers.rpartition(".")[0])
        for module in root.children():
            if not isinstance(module, nn.ModuleList) and any(
                p.is_meta for p in module.parameters()
            ):
                module.to_empty(device="cpu")
        layer_inputs(root, self.runner.layers, {"inputs_embeds": hidden}, arguments)
        data = self._outside()
        attention, mlp, between = [], [], []
        for index in kinds:
            kind = DraftBlock(self._around(index, data), hidden, arguments[index])
            parts = kind.sections()
            attention.append(parts[0])
            mlp.append(parts[1])
            between += [row for row in parts[2] if row not in between]
            data["biases"] |= kind.biases
        data["attention"] = _told_apart(attention)
        data["mlp"] = _told_apart(mlp)
        if between:
            data["folds"] = between
        if not data["biases"]:
            del data["biases"]
        return Draft(data, self.unsure)

    def _key(self, *keys: str) -> Any:
        found = (getattr(self.runner.config.get_text_config(), key, None) for key in keys)
        return next((value for value in found if value is not None), None)

    def _on_disk(self) -> str:
        """The prefix of blocks in the files, with {i} for the number."""
        local = next(n for n, p in self.runner.layers[0].named_parameters() if is_weight(n))
        found = [n for n in self.headers if n.endswith(f".0.{local}")]
        if not found:
            raise InputError(f"no tensor of the files is called ….0.{local}")
        return min(found, key=len).removesuffix(f".0.{local}") + ".{i}"

    def _around(self, index: int, data: dict[str, Any]) -> Around:
        runner = self.runner
        text = runner.config.get_text_config()
        measures = {k: getattr(text, key, None) for k, key in data["sizes"].items()}
        return Around(
            module=runner.layers[index],
            index=index,
            blocks=len(runner.layers),
            config=self.config,
            headers=self.headers,
            layer=self.layer,
            measures={k: v for k, v in measures.items() if isinstance(v, int)},
            outside=data,
            unsure=self.unsure,
        )

    def _kinds(self) -> list[int]:
        """The first block of each kind."""
        seen: dict[tuple[str, ...], int] = {}
        for index in range(len(self.runner.layers)):
            seen.setdefault(tuple(sorted(stored_in(self.headers, self.layer, index))), index)
        return list(seen.values())

    def _outside(self) -> dict[str, Any]:
        names, base = self.names, self.layer.partition(".{i}")[0]
        # What differs between files and memory in front of the blocks differs elsewhere too.
        here, there = base.rpartition(".")[0], names.layers.rpartition(".")[0]

        def stored(path: str) -> str:
            moved = path.replace(there, here, 1) if path.startswith(there) else path
            return moved if weight_name(moved) in self.headers else path

        sizes = {name: found for name, keys in SIZES.items() if (found := self._named(keys))}
        paths = (names.embedding, names.norm, names.lm_head)
        outside = {stored(path): path for path in paths if stored(path) != path}
        tied = bool(getattr(self.runner.config, "tie_word_embeddings", False))
        biases = {stored(path): True for path in paths if bias_name(stored(path)) in self.headers}
        norm = self.runner.model.get_submodule(names.norm)
        return {
            "sizes": sizes,
            **({"defaults": {"tie_word_embeddings": True}} if tied else {}),
            "biases": biases,
            "embedding": {"token": stored(names.embedding)},
            "layer": self.layer,
            "head": {
                "norm": norm_row(stored(names.norm), "norm.final", "hidden", norm),
                "linear": stored(names.lm_head),
            },
            "runtime": {
                **{k: getattr(names, k) for k in ("layers", "embedding", "norm", "lm_head")},
                **({"outside": outside} if outside else {}),
            },
        }

    def _named(self, keys: Sequence[str]) -> str | None:
        return next((key for key in keys if self.config.get(key)), None)


def _told_apart(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sections of several kinds of blocks, each with a module that only it has."""
    found: list[dict[str, Any]] = []
    for section in sections:
        if section not in found:
            found.append(section)
    own = {}
    for section in found:
        rest = [other for other in found if other is not section]
        others = {row["name"] for other in rest for row in other["linears"]}
        own[id(section)] = [r["name"] for r in section["linears"] if r["name"] not in others]
    found.sort(key=lambda section: not own[id(section)])  # those that nothing tells apart come last
    for section in found[:-1]:
        names = own[id(section)]
        section["has"] = next((n for n in names if "{e}" not in n), names[0] if names else "")
    return found


def _has_linears(modules: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) or "Conv1D" in type(m).__name__ for m in modules.modules())

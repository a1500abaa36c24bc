"""One block of a family without a map, run on one random row.

Linears that read one tensor share a site, a norm that made it feeds it, and a fold is in the map
where the block computes the same with it and without.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.arch.load import ArchMap
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout, bias_name, is_weight, weight_name
from compressor.numerics.folding import fold
from compressor.runner.draft_roles import FUSED, ROLES, SHAPES, site_of

TOLERANCE = 2e-4
"""Difference of a block's output, as a share of its largest, that rounding explains."""

EXPERT = re.compile(r"(.*)\.0\.([^.]+)")


@dataclass(frozen=True, slots=True)
class Around:
    """The model that a block stands in.

    module    its module;  index  its number;  blocks  how many there are
    headers   name → shape of all tensors in the files;  layer  the blocks' prefix there, with {i}
    measures  sizes by their names in a map
    outside   the map but for its sections;  unsure  what is not certain, added to
    """

    module: nn.Module
    index: int
    blocks: int
    config: Mapping[str, Any]
    headers: Mapping[str, Sequence[int]]
    layer: str
    measures: Mapping[str, int]
    outside: dict[str, Any]
    unsure: list[str]


def stored_in(
    headers: Mapping[str, Sequence[int]], layer: str, index: int
) -> dict[str, Sequence[int]]:
    """A block's tensors by their names in it."""
    prefix = layer.format(i=index) + "."
    return {n.removeprefix(prefix): s for n, s in headers.items() if n.startswith(prefix)}


class DraftBlock:
    """A block with random weights.

    hidden     [1, length, hidden];  arguments  what the model passes beside it
    """

    def __init__(self, around: Around, hidden: Tensor, arguments: Mapping[str, Any]) -> None:
        self.around, self.hidden, self.arguments = around, hidden, arguments
        self.layer, self.outside = around.module, around.outside
        self.stored = stored_in(around.headers, around.layer, around.index)
        self.biases: dict[str, bool] = {}
        self.layer.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in self.layer.parameters():
                spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
                parameter.normal_(0 if parameter.dim() > 1 else 1, spread)
        self.read: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}
        self._watch()

    @torch.no_grad()
    def _watch(self) -> None:
        with ExitStack() as hooks:
            for path, module in self.layer.named_modules():

                def hook(module: nn.Module, args: Any, out: Any, path: str = path) -> None:
                    if args and isinstance(args[0], Tensor):
                        self.read[path] = args[0]
                    if isinstance(out, Tensor):
                        self.made[path] = out

                hooks.enter_context(module.register_forward_hook(hook))
            self.expected = self._run()

    @torch.no_grad()
    def _run(self) -> Tensor:
        out = self.layer(self.hidden, **self.arguments)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def sections(self) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
        """Attention, MLP, and the folds between them."""
        rows = [*self._linears(), *self._experts()]
        norms = list(self._norms(rows))
        taken = {weight_name(row["name"]) for row in (*rows, *norms)}
        taken |= {bias_name(row["name"]) for row in (*rows, *norms)}
        experts = [row["name"] for row in rows if "{e}" in row["name"]]
        others = [
            name
            for name in self.stored
            if name not in taken
            and not any(re.fullmatch(_numbered(e), name.rpartition(".")[0]) for e in experts)
        ]
        if others:
            self.around.unsure.append(f"what these are (kept as they are): {', '.join(others)}")
        attends = ("attn.", "norm.attn", "norm.q", "norm.k")
        parts = []
        for ours in (True, False):
            section: dict[str, Any] = {
                "norms": [n for n in norms if n["role"].startswith(attends) is ours],
                "linears": [r for r in rows if r["role"].startswith(attends) is ours],
            }
            if not ours and others:
                section["others"] = others
            parts.append({k: v for k, v in section.items() if v or k == "linears"})
        return parts[0], parts[1], self._proved(parts[0], parts[1], rows, norms)

    def _linears(self) -> Iterator[dict[str, Any]]:
        found = [
            (path, module)
            for path, module in self.layer.named_modules()
            if weight_name(path) in self.stored and getattr(module, "weight", Tensor()).dim() == 2
        ]
        sites: dict[int, list[str]] = {}
        for path, _ in found:
            if path in self.read:
                sites.setdefault(self.read[path].data_ptr(), []).append(path)
        for path, _ in found:
            role = self._role(path)
            mates = sites.get(self.read[path].data_ptr(), [path]) if path in self.read else [path]
            yield self._row(path, role, site_of({self._role(p) for p in mates}))
            if bias_name(path) in self.stored:
                self.biases[path] = True

    def _role(self, path: str) -> str:
        for pattern, role in ROLES:
            if re.search(rf"(^|\.){pattern}$", path):
                shared = "shared" in path and role.startswith("mlp.")
                return role.replace("mlp.", "shared.") if shared else role
        note = f"the role of {path}, by name"
        if note not in self.around.unsure:
            self.around.unsure.append(note)
        return "linear"

    def _row(self, name: str, role: str, site: str) -> dict[str, Any]:
        stored = weight_name(name.replace("{e}", "0"))
        measures: tuple[str, ...] = SHAPES.get(
            role.replace("shared.", "mlp.").replace("expert.", "mlp."), ()
        )
        swap = {"shared.": "shared_ff", "expert.": "moe_ff"}
        wide = next((s for p, s in swap.items() if role.startswith(p)), "ff")
        wide = wide if wide in self.outside["sizes"] else "ff"
        measures = tuple(wide if m == "ff" else m for m in measures)
        shape = [
            measures[i] if i < len(measures) and self._measures(measures[i]) == size else str(size)
            for i, size in enumerate(self.stored[stored])
        ]
        row: dict[str, Any] = {"name": name, "role": role, "site": site, "shape": shape}
        if role == "attn.qkv":
            row["parts"] = {"attn.q": "q", "attn.k": "kv", "attn.v": "kv"}
            self.around.unsure.append(f"that rows of {name} are q, k and v one after the other")
        if role == "mlp.gate_up":
            row["parts"] = {"mlp.gate": "ff", "mlp.up": "ff"}
        parent = name.rpartition(".")[0]
        if role.startswith("expert."):
            row["fused"] = name.partition(".{e}")[0]
        elif fused := self._fused(role, parent):
            row["fused"] = fused
        return row

    def _fused(self, role: str, parent: str) -> str:
        """The module that runtimes make of a linear and those beside it, which are there."""
        plain = role.replace("shared.", "mlp.")
        if plain not in FUSED:
            return ""
        beside = {p for p, other in FUSED.items() if other == FUSED[plain]}
        roles = {
            self._role(path).replace("shared.", "mlp.")
            for path in (n.rpartition(".")[0] for n in self.stored if is_weight(n))
            if path.startswith(f"{parent}.") and path.endswith("proj")
        }
        return f"{parent}.{FUSED[plain]}" if beside <= roles else ""

    def _measures(self, name: str) -> int | None:
        values = self.around.measures
        heads, hidden = values["heads"], values["hidden"]
        kv_heads = values.get("kv_heads") or heads
        head_dim = values.get("head_dim") or hidden // heads
        derived = {"q": heads * head_dim, "kv": kv_heads * head_dim, "head_dim": head_dim}
        derived["qkv"] = derived["q"] + 2 * derived["kv"]
        derived["gate_up"] = 2 * (values.get("ff") or 0)
        return values.get(name) or derived.get(name)

    def _experts(self) -> Iterator[dict[str, Any]]:
        """Linears of experts that files hold one by one and memory in stacks."""
        parts: dict[str, list[str]] = {}
        for name in self.stored:
            if is_weight(name) and (found := EXPERT.fullmatch(name.rpartition(".")[0])):
                parts.setdefault(found[1], []).append(found[2])
        for base, leaves in parts.items():
            roles = {leaf: self._role(f"x.{leaf}").replace("mlp.", "expert.") for leaf in leaves}
            order = [r for r in ("expert.gate", "expert.up", "expert.down") if r in roles.values()]
            by_role = {role: leaf for leaf, role in roles.items()}
            for role in order:
                site = "expert.{e}.out" if role == "expert.down" else "expert.in"
                yield self._row(f"{base}.{{e}}.{by_role[role]}", role, site)
            module = next((n for n, p in self.layer.named_parameters() if p.dim() == 3), base)
            memory = module.rpartition(".")[0]
            sources = [f"{base}.{{e}}.{by_role[r]}" for r in order if r != "expert.down"]
            down = [f"{base}.{{e}}.{by_role[r]}" for r in order if r == "expert.down"]
            first = "gate_up_proj" if len(sources) > 1 else "up_proj"
            self.outside["runtime"]["stacks"] = [
                {"into": f"{memory}.{first}", "sources": sources},
                {"into": f"{memory}.down_proj", "sources": down},
            ]

    def _norms(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        readers: dict[int, str] = {}
        for row in rows:
            if row["name"] in self.read:
                readers.setdefault(self.read[row["name"]].data_ptr(), row["site"])
        for path, module in self.layer.named_modules():
            if not is_norm(module) or weight_name(path) not in self.stored:
                continue
            size = self.stored[weight_name(path)][0]
            site = readers.get(self.made[path].data_ptr()) if path in self.made else None
            which = "q" if re.search(r"q_(layer)?norm", path) else "k"
            if re.search(r"[qk]_(layer)?norm", path):
                whole = size != self._measures("head_dim")
                role = f"norm.{which}.all" if whole else f"norm.{which}"
                measure = {"q": "q", "k": "kv"}[which] if whole else "head_dim"
            else:
                attends = site in ("attn.in", "block.in") if site else "att" in path
                role = ("norm.attn" if attends else "norm.mlp") + ("" if site else ".out")
                measure = "hidden"
            yield norm_row(path, role, measure, module)
            if bias_name(path) in self.stored:
                self.biases[path] = True

    def _proved(
        self,
        attention: dict[str, Any],
        mlp: dict[str, Any],
        rows: Sequence[Mapping[str, Any]],
        norms: Sequence[dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """Put the folds that hold into both sections; those between them."""
        between = []
        for row in self._candidates(rows, norms):
            norm = next((n for n in norms if n["name"] == row["source"]), None)
            if not self._holds(attention, mlp, row):
                if norm is not None:
                    self.around.unsure.append(f"why {row['source']} does not fold")
                continue
            for section in (attention, mlp):
                inside = [*section.get("norms", ()), *section["linears"]]
                names = {part["name"] for part in inside}
                sites = {part["site"] for part in section["linears"]}
                others = attention if section is mlp else mlp
                spread = row["site"] in {part["site"] for part in others["linears"]}
                if row["source"] in names and row["site"] in sites and not spread:
                    section.setdefault("folds", []).append(row)
                    break
            else:
                between.append(row)
        return between

    def _candidates(
        self, rows: Sequence[Mapping[str, Any]], norms: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        made = {self.made[n["name"]].data_ptr(): n["name"] for n in norms if n["name"] in self.made}
        seen = set()
        for row in rows:
            source = made.get(self.read[row["name"]].data_ptr()) if row["name"] in self.read else ""
            if source and row["site"] not in seen:
                seen.add(row["site"])
                yield {"site": row["site"], "source": source}
        outs = {"attn.v": "attn.out", "attn.qkv": "attn.out", "mlp.up": "mlp.out"}
        outs |= {"mlp.gate_up": "mlp.out", "shared.up": "shared.out", "expert.up": "expert.{e}.out"}
        for row in rows:
            if site := outs.get(row["role"]):
                found: dict[str, Any] = {"site": site, "source": row["name"]}
                if "parts" in row:
                    found["part"] = "attn.v" if row["role"] == "attn.qkv" else "mlp.up"
                if site == "attn.out":
                    found["per_head"] = True
                yield found

    @torch.no_grad()
    def _holds(self, attention: Any, mlp: Any, row: dict[str, Any]) -> bool:
        """Whether the block computes the same with this fold as without."""
        data = {**self.outside, "attention": [attention], "mlp": [mlp], "folds": [row]}
        data["biases"] = {**self.outside["biases"], **self.biases}
        try:
            arch = ArchMap.model_validate_json(json.dumps({"model_type": "draft", **data}))
            unit = self._unit(arch)
        except (ValueError, InputError):
            return False
        state = {f"{unit.name}.{n}": t.clone() for n, t in self._floats(arch, unit).items()}
        folds = [how for how in unit.folds if how.site == row["site"].replace("{e}", "0")]
        for how in folds:
            channels = how.rows.total if how.rows else state[weight_name(how.source)].shape[0]
            scale = torch.rand(channels) * 1.5 + 0.5
            state |= fold(state, how, unit, scale, dtype=torch.float64)
        before = {n: p.detach().clone() for n, p in self.layer.state_dict().items()}
        try:
            self.layer.load_state_dict(arch.runtime.block_state(unit, state), strict=False)
        except KeyError as error:
            note = f"what {error} is called in memory (`renames` of `runtime`): no fold is proved"
            if note not in self.around.unsure:
                self.around.unsure.append(note)
            return False
        found = self._run()
        self.layer.load_state_dict(before)
        difference = (found - self.expected).abs().max()
        return bool(folds) and bool(difference < TOLERANCE * self.expected.abs().max())

    def _unit(self, arch: ArchMap) -> UnitLayout:
        """This block as the map has it."""
        layout = arch.layout(self.around.config, dict(self._headers()))
        return layout.blocks[self.around.index]

    def _headers(self) -> Iterator[tuple[str, Sequence[int]]]:
        """All blocks as this one is: only its own layout is looked at."""
        around = self.around
        blocks = re.compile(re.escape(around.layer).replace(r"\{i\}", r"\d+\."))
        for name, shape in around.headers.items():
            if not blocks.match(name):
                yield name, shape
        for index in range(around.blocks):
            for name, shape in self.stored.items():
                yield f"{around.layer.format(i=index)}.{name}", shape

    def _floats(self, arch: ArchMap, unit: UnitLayout) -> dict[str, Tensor]:
        """The random block's tensors by their names in the files: stacks taken apart."""
        state = dict(self.layer.state_dict())
        for stack in arch.runtime.stacks:
            whole = state.pop(stack.into, None)
            for expert in range(whole.shape[0] if whole is not None else 0):
                assert whole is not None
                for source, part in zip(
                    stack.sources, whole[expert].chunk(len(stack.sources)), strict=True
                ):
                    state[weight_name(source.format(e=expert))] = part
        return state


def norm_row(name: str, role: str, size: str, module: nn.Module) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "role": role, "size": size}
    before = {n: p.detach().clone() for n, p in module.state_dict().items()}
    bare = any(parameter.is_meta for parameter in before.values())
    if bare:
        module.to_empty(device="cpu")
    with torch.no_grad(), suppress(TypeError):  # some take more than what they normalise
        for parameter in module.parameters():
            parameter.zero_()
        x = torch.randn(4, next(p.shape[0] for p in module.parameters()))
        if module(x).any():
            row["offset"] = 1.0  # it multiplies by (1 + weight)
        for parameter in module.parameters():
            parameter.fill_(1.0)
        if torch.allclose(module(x), module(x + 1), atol=1e-3):
            row["kind"] = "layer"  # it subtracts the mean
    if not bare:
        module.load_state_dict(before)
    return row


def is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own["weight"].dim() == 1 and "norm" in type(module).__name__.lower()


def _numbered(path: str) -> str:
    return re.escape(path).replace(r"\{e\}", r"\d+")

"""What each low-bit method is worth on a checkpoint such as SmolLM2, by whole runs.

    python scripts/measure/run.py low_bit ~/.cache/compressor/smollm2-135m --json rows.json

Every row is a recipe. Rows of "outliers" are measured on a copy of the checkpoint whose norms are
multiplied by 64 in a few channels, and whose weights are divided by it there: a power of two, so
that the copy computes the same function to the last bit.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from variant import Bench, Variant

from compressor.checkpoint.source import open_source
from compressor.numerics.folding import fold
from recipes import Recipes, text_options

CHANNELS, FACTOR, SEED = 6, 64.0, 17
BASELINE = "baseline"
OUTLIERS = "outliers: "


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--evaluation", default="bundled/fiction", help="held-out data")
    text_options(parser)


def rows_of(group: int) -> dict[str, tuple[Any, ...]]:
    """Name → passes, for groups of `group` where a method has groups."""

    def rtn(bits: int, size: int | None = group, **more: Any) -> dict[str, Any]:
        return {"rtn": {"bits": bits, "group_size": size, **more}}

    def gptq(bits: int, size: int | None = group, **more: Any) -> dict[str, Any]:
        return {"gptq": {"bits": bits, "group_size": size, **more}}

    def four(rule: str, activations: str = "none") -> dict[str, Any]:
        return {"nvfp4": {"rule": rule, "activations": activations}}

    def smooth(**more: Any) -> dict[str, Any]:
        return {"smoothquant": {"bits": 8, **more}}

    searched, folded = {"alpha": "search"}, {"alpha": "search", "fold_up": True}
    naive, gptq8 = rtn(8, None, activations="token"), gptq(8, None, activations="token")
    static = smooth(weights="tensor", activations="static")
    w4a8 = {"progressive": {"group_size": group, "gptq": False, "clip": False}}
    found: dict[str, tuple[Any, ...]] = {
        "w8a8 naive": (naive,),
        "w8a8 smoothquant, published alpha": (smooth(),),
        "w8a8 smoothquant, alpha 0.5": (smooth(alpha=0.5),),
        "w8a8 smoothquant, searched": (smooth(**searched),),
        "w8a8 smoothquant, searched, with up": (smooth(**folded),),
        "w8a8 smoothquant O1": (smooth(weights="tensor"),),
        "w8a8 smoothquant O3": (static,),
        "w8a8 smoothquant + gptq": ({"smoothquant": searched}, gptq8),
        "w8a8 smoothquant + gptq, with up": ({"smoothquant": folded}, gptq8),
        "fp8 dynamic": ("fp8",),
        "fp8 static": ({"fp8": {"scales": "static"}},),
        "fp8 dynamic, fp8 cache": ("fp8", "kv_cache"),
    }
    for rule in ("static_6", "static_4", "mse", "mae", "abs_max"):
        found[f"nvfp4 rtn {rule}"] = (four(rule),)
    for rule in ("static_6", "mse"):
        found[f"nvfp4 awq {rule}"] = ("awq", four(rule))
        found[f"nvfp4 gptq {rule}"] = ({"gptq": {"grid": "nvfp4", "rule": rule}},)
        found[f"nvfp4 w4a4 {rule}"] = (four(rule, "calibrated"),)
    found["nvfp4 w4a4 awq mse"] = ({"awq": {"search": "inputs"}}, four("mse", "calibrated"))
    for bits in (4, 3):
        found[f"int{bits} rtn"] = (rtn(bits),)
        found[f"int{bits} gptq"] = (gptq(bits),)
        found[f"int{bits} awq"] = ({"awq": {}}, rtn(bits))
    searched_qoq = {"group_size": group, "attention_alpha": "search"}
    return {
        **found,
        "int4 rotated gptq": ("rotate", gptq(4)),
        "w4a8kv4 naive": (w4a8, {"kv_cache": {"element": "int4"}}),
        "w4a8kv4 qoq": ({"qoq": {"group_size": group}},),
        "w4a8kv4 qoq, searched attention": ({"qoq": searched_qoq},),
        f"{OUTLIERS}w8a8 naive": (naive,),
        f"{OUTLIERS}w8a8 smoothquant": (smooth(**searched),),
        f"{OUTLIERS}fp8 dynamic": ("fp8",),
        f"{OUTLIERS}nvfp4 w4a4 mse": (four("mse", "calibrated"),),
    }


CLAIMS = (
    ("w8a8 smoothquant, searched", "w8a8 naive"),
    ("w8a8 smoothquant, searched, with up", "w8a8 naive"),
    ("w8a8 smoothquant + gptq", "w8a8 smoothquant, searched"),
    ("w8a8 smoothquant + gptq, with up", "w8a8 smoothquant, searched, with up"),
    ("w8a8 smoothquant, searched, with up", "w8a8 smoothquant, searched"),
    *((f"nvfp4 {how} mse", f"nvfp4 {how} static_6") for how in ("rtn", "awq", "gptq", "w4a4")),
    ("nvfp4 w4a4 awq mse", "nvfp4 w4a4 mse"),
    ("int4 gptq", "int4 rtn"),
    ("int3 gptq", "int3 rtn"),
    ("int4 awq", "int4 rtn"),
    ("int4 rotated gptq", "int4 gptq"),
    ("w4a8kv4 qoq", "w4a8kv4 naive"),
    ("w4a8kv4 qoq, searched attention", "w4a8kv4 qoq"),
    (f"{OUTLIERS}w8a8 smoothquant", f"{OUTLIERS}w8a8 naive"),
)


def recipe_keys(name: str) -> dict[str, Any]:
    """What a row's recipe needs beside its passes: QServe's format, and a head of its own where
    passes rotate."""
    turned = "rotated" in name or "qoq" in name
    qserve = name.startswith("w4a8kv4")
    return {"format": "qserve" if qserve else "compressed-tensors", "untie": turned}


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    recipes = Recipes(bench, options.model, {"": (options.evaluation, options.windows)})

    def planted() -> Path:
        folder = bench.work / "outliers"
        if not folder.exists():
            plant_outliers(recipes.model, folder)
        return folder

    yield recipes.itself(BASELINE)
    for name, passes in rows_of(options.group_size).items():
        model = planted if name.startswith(OUTLIERS) else None
        more = recipe_keys(name)
        yield recipes.variant(name, passes, baseline=BASELINE, model=model, **more)


def plant_outliers(checkpoint: Path, folder: Path) -> None:
    """A copy of a checkpoint whose norms before linears are multiplied by FACTOR in CHANNELS
    channels of each block, with the columns of what reads them divided by it: exactly equivalent,
    since FACTOR is a power of two."""
    source = open_source(checkpoint)
    generator = torch.Generator().manual_seed(SEED)
    tensors: dict[str, Tensor] = {}
    for unit in source.layout.units:
        found = dict(source.read_unit(unit).tensors)
        for site_fold in unit.folds:
            if unit.kind == "block" and site_fold.kind == "norm":
                width = found[f"{site_fold.source}.weight"].shape[0]
                scales = torch.ones(width)
                scales[torch.randperm(width, generator=generator)[:CHANNELS]] = 1 / FACTOR
                found |= fold(found, site_fold, unit, scales)
        tensors |= found
    unwanted = shutil.ignore_patterns("*.safetensors*", "manifest.json")
    shutil.copytree(checkpoint, folder, ignore=unwanted)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})

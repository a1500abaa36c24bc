"""How a format is read elsewhere, for people: what its folder's `loading.py` says."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from compressor.formats.base import ModelSchemes

GPTQMODEL = "pip install gptqmodel optimum"


@dataclass(frozen=True, slots=True)
class Loading:
    """What docs/formats.md and a model card say of a format.

    holds      what it holds, in a line;  proof  who reads it again in the tests
    install, imports, arguments, note  how transformers reads it, where `transformers` is set
    vllm       whether vLLM documents the format
    with_zeros the same of weights with zero points, where they are read otherwise
    """

    holds: str = ""
    proof: str = "**reader**"
    install: str = ""
    imports: str = ""
    arguments: str = ""
    note: str = ""
    transformers: bool = True
    vllm: bool = True
    with_zeros: Loading | None = None


def loading_of(name: str, schemes: ModelSchemes | None = None) -> Loading:
    """How the format called `name` is read, or a checkpoint in it with these schemes."""
    path = f"compressor.formats.{name.replace('-', '_')}.loading"
    if importlib.util.find_spec(path) is None:
        return Loading(transformers=False, vllm=False)
    found: Loading = importlib.import_module(path).LOADING
    weights = [] if schemes is None else [scheme.weight for scheme in schemes.linears.values()]
    zeros = any(spec is not None and not spec.symmetric for spec in weights)
    return found.with_zeros if zeros and found.with_zeros is not None else found

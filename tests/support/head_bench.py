"""Needles, models and contexts that tests of which heads stream have in common."""

from pathlib import Path
from typing import Any

import torch
from compressor_calibration.tokens import TokenSet
from torch import Tensor

from compressor.checkpoint.records import Records
from compressor.checkpoint.source import open_source
from compressor.methods.common.context import LearnContext
from compressor.methods.common.needles import Needles
from compressor.runner.source_model import SourceModel

CPU = torch.device("cpu")
TINY = Needles(
    keys=2, words=1, min_length=180, max_length=200, lengths=2, prefix="", suffix="", separator="",
    needle=" {ordinal} key: {passkey}.", question=" {ordinal}? {passkey}",
)  # fmt: skip
OWN = Needles(
    keys=4, words=4, min_length=512, max_length=512, lengths=1, prefix="", suffix="", separator="",
    needle="\n\nRemember this, the {ordinal} passkey is: {passkey}.\n\n",
    question="\n\nWhat is the {ordinal} passkey? It is: {passkey}",
)  # fmt: skip


def frozen(folder: Path) -> SourceModel:
    return SourceModel(open_source(folder), device=CPU, dtype=torch.float32)


def context(ids: Tensor, scratch: Path, **options: Any) -> LearnContext:
    tokens = TokenSet(ids=ids, sha256="", source="", sampling="random")
    return LearnContext(tokens=tokens, seed=7, batch=2, scratch=Records(scratch, "test"), **options)

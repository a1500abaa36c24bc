"""What a run recorded of its forecasts, so that anyone can measure it again from the files.

The text is the bundled held-out one, cut by the model's own tokenizer, so nothing but the
checkpoint is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor_calibration.tokens import TokenSet
from compressor_kernels.attention.block_windows import WindowRule
from torch import Tensor

from compressor.attention.key_blocks import KeyBlocks
from compressor.attention.quality_record import held_out
from compressor.attention.rule import make_rule
from compressor.attention.rules.infllm import InfLLMBlocks
from compressor.attention.rules.quest import QuestPages
from compressor.errors import InputError
from compressor.foreign.untrusted import parse_json, read_file
from compressor.methods.sparda.choice_quality import RECENT, LayerQuality, means, measure_choices
from compressor.methods.sparda.teacher import Teacher
from compressor.runner.source_model import SourceModel

RECORD_NAME = "forecast_recall.json"
FORECAST = "forecast"
TOLERANCE, QUANTIZED_TOLERANCE = (0.02, 0.04), (0.1, 0.2)
"""How far recall may be from the recorded one, the mean over layers and that of each: with the
weights that it was measured with, only rounding differs; later passes that quantize them change
what attention sees."""


@dataclass(frozen=True, slots=True)
class ChoiceRecord:
    """Recall and attention mass of scorers by layer, and what they were measured on.

    teacher  what chooses the blocks that recall is of
    sha256   of the tokens
    """

    teacher: Teacher
    rows: int
    length: int
    sha256: str
    layers: tuple[LayerQuality, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "version": 1,
            "selection": self.teacher.selection.to_json(),
            "teacher": {**asdict(self.teacher.fine), "pooling": self.teacher.pooling},
            "text": "bundled novel, consecutive rows",
            "rows": self.rows,
            "length": self.length,
            "sha256": self.sha256,
            "means": means(self.layers),
            "layers": [asdict(quality) for quality in self.layers],
        }


def scorers(selection: KeyBlocks) -> dict[str, KeyBlocks | None]:
    """The forecast, what it imitates, and what else could choose at the same budget. Quest is given
    the same blocks and forced ones, so that only its scores are compared."""
    budget = selection.model_dump()
    return {
        FORECAST: selection,
        "infllm": InfLLMBlocks(**budget),
        "quest": QuestPages(**{**budget, "per": "query_head"}),
        RECENT: None,
    }


def record_choices(
    model: SourceModel,
    teacher: Teacher,
    forecasts: Mapping[str, Tensor] | None,
    tokens: TokenSet,
) -> ChoiceRecord:
    """Measure forecasts (by full name; None: the model's own) on held-out rows."""
    found = measure_choices(
        model, tokens.ids, teacher, scorers(teacher.selection), forecasts=forecasts
    )
    return ChoiceRecord(
        teacher=teacher,
        rows=tokens.ids.shape[0],
        length=tokens.ids.shape[1],
        sha256=tokens.sha256,
        layers=tuple(found),
    )


def read_record(folder: Path) -> ChoiceRecord | None:
    """The record beside a checkpoint, or None. Raises InputError for one that is not valid."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        data = parse_json(read_file(path, what="record"))
        teacher, selection = data["teacher"], make_rule(KeyBlocks.part, data["selection"])
        if not isinstance(selection, KeyBlocks):
            raise TypeError(f"{selection.kind} chooses no blocks of keys")
        fine = WindowRule(kernel_size=teacher["kernel_size"], stride=teacher["stride"])
        return ChoiceRecord(
            teacher=Teacher(selection=selection, fine=fine, pooling=teacher["pooling"]),
            rows=int(data["rows"]),
            length=int(data["length"]),
            sha256=str(data["sha256"]),
            layers=tuple(LayerQuality(**layer) for layer in data["layers"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a record of forecasts: {error}") from error


def check_record(model: SourceModel, record: ChoiceRecord, *, quantized: bool) -> list[str]:
    """Measure a stored forecast again; what is wrong with it, nothing where recall is as recorded.

    quantized  whether the checkpoint's weights are rounded, unlike those of the record
    """
    tokens = held_out(model.tokenizer(), rows=record.rows, length=record.length)
    if tokens.sha256 != record.sha256:
        return ["the held-out text gives other tokens than when recall was recorded"]
    found = measure_choices(model, tokens.ids, record.teacher, {FORECAST: record.teacher.selection})
    of_mean, of_layer = QUANTIZED_TOLERANCE if quantized else TOLERANCE
    now, then = _recalls(found), _recalls(record.layers)
    if now.keys() != then.keys():
        return [f"{len(now)} layers choose by a forecast, {len(then)} are recorded"]
    what = "recall of the teacher's blocks"
    off = [layer for layer in now if not abs(now[layer] - then[layer]) <= of_layer]
    problems = [
        f"{what} in layer {layer} is {now[layer]:.4f}, recorded were {then[layer]:.4f}"
        for layer in off[:3]
    ]
    mean_now, mean_then = (sum(x.values()) / max(1, len(x)) for x in (now, then))
    if len(off) > 3 or not (off or abs(mean_now - mean_then) <= of_mean):
        problems.append(f"{what} is {mean_now:.4f}, recorded were {mean_then:.4f}")
    return problems


def _recalls(qualities: Sequence[LayerQuality]) -> dict[int, float]:
    return {q.layer: q.recall for q in qualities if q.scorer == FORECAST}

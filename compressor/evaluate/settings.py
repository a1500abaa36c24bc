"""What a recipe says of evaluation."""

from typing import Self

from pydantic import Field, model_validator

from compressor.evaluate.passkey import Passkey
from compressor.evaluate.text import Mixture


class Evaluation(Mixture):
    """Held-out text that the written files are measured on, and probes of what they can do."""

    windows: int = Field(16, ge=1, description="rows of tokens")
    length: int = Field(512, ge=8, description="tokens per row")
    stride: int | None = Field(
        None, ge=1, description="windows overlap and score only what the one before did not"
    )
    against_original: bool = Field(True, description="also measure the source, KL and agreement")
    force: bool = Field(False, description="allow text that overlaps the calibration tokens")
    passkey: Passkey | None = Field(None, description="retrieval of a hidden sentence; {} will do")
    tasks: tuple[str, ...] = Field(
        (), description="multiple-choice tasks of lm-evaluation-harness (the extra `harness`)"
    )
    task_limit: int | None = Field(None, ge=1, description="documents of each task")

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.stride is not None and self.stride >= self.length:
            raise ValueError(f"stride {self.stride} skips tokens: it must be below length")
        return self

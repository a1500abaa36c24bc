"""Sections of a recipe that stand for themselves: data, evaluation, card, publishing."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from compressor.ir.frozen import Strict
from compressor.passkey import Passkey

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Calibration(Strict):
    """The tokens that statistics are taken over."""

    data: str = Field(
        "bundled", description="bundled, a text/JSONL/parquet file, a folder, a Hub id"
    )
    split: str = Field("train", description="split of a Hub data set")
    text_field: str = Field("text", description="field or column that holds the text")
    samples: int = Field(128, ge=1, description="rows of tokens")
    length: int = Field(512, ge=8, description="tokens per row")
    sampling: Literal["random", "consecutive"] = Field(
        "random", description="windows drawn with the seed, or the first rows one after the other"
    )


class Evaluation(Strict):
    """Held-out text that the written files are measured on, and probes of what they can do."""

    data: str = Field("bundled", description="as in calibration; bundled is another work")
    split: str = Field("test", description="split of a Hub data set")
    text_field: str = Field("text", description="field or column that holds the text")
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


class CardSection(Strict):
    """What the model card cannot know by itself."""

    base_model: str | None = Field(None, description="Hub id of the source, where it is a folder")
    license: str | None = Field(None, description="the source's licence, where it names none")


class Publish(Strict):
    """Where a checkpoint goes that passed everything."""

    repo: str = Field(description="user/name on the Hub; created if it is not there")
    private: bool = Field(True, description="a repository that is created is private")
    revision: str = Field("main", min_length=1, description="branch to commit to")
    message: str | None = Field(None, description="message of the commit")

    @field_validator("repo")
    @classmethod
    def _is_repository(cls, value: str) -> str:
        if not REPOSITORY.fullmatch(value):
            raise ValueError("a Hub repository is user/name")
        return value

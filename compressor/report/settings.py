"""What a recipe says of the model card and of publishing."""

import re

from pydantic import Field, field_validator

from compressor.ir.frozen import Strict

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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

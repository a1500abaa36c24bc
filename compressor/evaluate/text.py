"""What a recipe says of where text comes from: the same for calibration and evaluation."""

from collections.abc import Iterator
from typing import Any, Self

from compressor_calibration.bundled import BUNDLED, BUNDLED_NAMES, Part
from compressor_calibration.documents import BadRows, Document
from compressor_calibration.sources import read_documents
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from compressor.ir.frozen import Strict


class Data(Strict):
    """Where text comes from, and which part of it."""

    data: str = Field(
        BUNDLED, description="bundled, bundled/code …, a file, a folder or a Hub id: docs/data.md"
    )
    config: str | None = Field(None, description="configuration of a Hub data set, or of a folder")
    split: str | None = Field(
        None, description="of a Hub data set or a folder; train, in evaluate test, if not given"
    )
    text_field: str | None = Field(
        None, description="field with text, messages or token ids; looked for if not given"
    )
    columns: tuple[str, ...] = Field(
        (), description="fields of text that are joined, in place of one text_field"
    )
    revision: str | None = Field(None, description="commit, tag or branch of a Hub data set")
    streaming: bool = Field(
        True, description="read no more of a Hub data set than is needed; false downloads it"
    )
    skip_bad_rows: bool = Field(
        False, description="pass over rows that cannot be used; the report counts them"
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _names_fields_once(self) -> Self:
        if self.columns and self.text_field is not None:
            raise ValueError("text_field and columns both name fields: give one of them")
        return self

    @property
    def name(self) -> str:
        """What is read, for people."""
        return ", ".join(filter(None, (self.data, self.config)))

    def documents(self, part: Part, bad_rows: BadRows) -> Iterator[Document]:
        """Its documents, as they are asked for. Raises DataError."""
        return read_documents(
            self.data,
            part=part,
            config=self.config,
            split=self.split,
            text_field=self.text_field,
            columns=self.columns,
            revision=self.revision,
            streaming=self.streaming,
            bad_rows=bad_rows,
        )


class Weighted(Data):
    """One of several sources."""

    weight: float = Field(1.0, gt=0, description="its share of the rows, relative to the others'")


class Mixture(Data):
    """Text of one source, or of several by weight."""

    mix: tuple[Weighted, ...] = Field(
        (), description="several sources, each with keys as here and a weight, in place of data"
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.mix and (alone := sorted(self.model_fields_set & set(Data.model_fields))):
            raise ValueError(f"mix holds whole sources: move {', '.join(alone)} into its entries")
        return self

    @model_serializer(mode="wrap")
    def _what_counts(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = inner(self)
        unused = Data.model_fields if self.mix else ("mix",)
        return {key: value for key, value in found.items() if key not in unused}

    def sources(self) -> list[Weighted]:
        """What is mixed; `bundled` is all bundled kinds in equal parts."""
        named = {name: getattr(self, name) for name in Data.model_fields}
        found: list[Weighted] = []
        for source in self.mix or (Weighted(**named),):
            kinds = tuple(BUNDLED_NAMES) if source.data == BUNDLED else (source.data,)
            share = source.weight / len(kinds)
            found += [source.model_copy(update={"data": k, "weight": share}) for k in kinds]
        return found

    @property
    def name(self) -> str:
        """What is read, for people."""
        return " + ".join(source.name for source in self.mix) or super().name

"""What a recipe says of the tokens that statistics are taken over."""

from typing import Literal, Self

from pydantic import Field, model_validator

from compressor.evaluate.text import Mixture
from compressor.ir.frozen import Strict


class Sufficiency(Strict):
    """Windows whose context decides most of their loss."""

    candidates: int = Field(4, ge=2, description="windows looked at for each that is taken")
    reference_length: int | None = Field(
        None, description="tokens of context that count as all there is; null: twice the length"
    )
    context: int = Field(16, ge=1, description="tokens that count as no context")
    scored: int = Field(64, ge=1, description="tokens at a window's end whose loss counts")
    min: float = Field(
        0.6, ge=0, le=1, description="share of what a longer context says that a window has to hold"
    )


class Select(Strict):
    """How windows are chosen among more of them."""

    sufficiency: Sufficiency = Field(description="by how much their context decides their loss")


class Calibration(Mixture):
    """The tokens that statistics are taken over."""

    samples: int = Field(128, ge=1, description="rows of tokens")
    length: int = Field(512, ge=8, description="tokens per row")
    sampling: Literal["random", "consecutive"] = Field(
        "random", description="windows drawn with the seed, or the first rows one after the other"
    )
    select: Select | None = Field(
        None, description="take the informative ones of more windows: docs/sufficiency.md"
    )
    all_experts: bool = Field(
        False,
        description="statistics of every expert over all tokens; the router still decides what "
        "flows on",
    )

    @model_validator(mode="after")
    def _room_to_select(self) -> Self:
        if self.select is None:
            return self
        wanted = self.select.sufficiency
        if self.sampling != "random":
            raise ValueError("select takes some of many windows: sampling has to be random")
        if wanted.context + wanted.scored > self.length:
            raise ValueError(
                f"select: {wanted.context} tokens of context and {wanted.scored} that are scored "
                f"are more than the length of {self.length}"
            )
        if self.looked_at[1] <= self.length:
            raise ValueError(
                f"select: reference_length {wanted.reference_length} is no longer than the length "
                f"of {self.length}"
            )
        return self

    @property
    def looked_at(self) -> tuple[int, int]:
        """Windows that are cut from the text, and the tokens of each."""
        if self.select is None:
            return self.samples, self.length
        wanted = self.select.sufficiency
        return wanted.candidates * self.samples, wanted.reference_length or 2 * self.length

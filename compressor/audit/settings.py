"""What a recipe says of audits."""

from typing import Literal

from compressor_calibration.bundled import BUNDLED
from pydantic import Field

from compressor.ir.frozen import Strict


class AuditSettings(Strict):
    """Whether the model, or what was written, shows signs of a planted backdoor or of damage."""

    of: Literal["model", "written", "both"] = Field(
        "model", description="the model, before any work; what was written; or both"
    )
    fail_on: Literal["suspect", "never"] = Field(
        "suspect", description="suspect ends the run with exit 1; never only reports"
    )
    weights_only: bool = Field(False, description="tensors alone, without a forward pass")
    text: str = Field(BUNDLED, description="bundled, a file, a folder or a Hub id")
    contexts: int = Field(24, ge=4, description="texts of the sweep over tokens")
    length: int = Field(32, ge=10, le=512, description="tokens of each")
    position: int = Field(
        0, ge=0, description="token that is replaced; 0 is the first after what begins every text"
    )
    tokens: int | None = Field(
        None, ge=1, description="tokens tried, drawn at random beside special ones; null: all"
    )

    def looks_at(self, what: Literal["model", "written"]) -> bool:
        """Whether that is audited."""
        return self.of in (what, "both")

    @property
    def fails(self) -> bool:
        """Whether a suspect finding ends the run."""
        return self.fail_on == "suspect"

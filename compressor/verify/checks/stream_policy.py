"""What stays of an endless video, where a checkpoint says so."""

from compressor.attention.token_classes import FAMILIES, POLICY_NAME, read_sizes
from compressor.errors import InputError
from compressor.verify.checks.base import Check


class StreamPolicy(Check):
    """Its sizes go together, and the model is one that streams videos."""

    def begin(self) -> None:
        try:
            sizes = read_sizes(self.subject.folder)
        except InputError as error:
            self.found.add(POLICY_NAME, [error.message], "")
            return
        if sizes is None:
            return
        family = self.subject.source.checkpoint.config.get("model_type")
        problems = [] if family in FAMILIES else [f"{POLICY_NAME} is not for {family}"]
        self.found.add("video stream", problems, sizes.describe())

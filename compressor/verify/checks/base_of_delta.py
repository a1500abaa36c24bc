"""What a delta takes from its base."""

from compressor.verify.checks.base import Check


class BaseOfDelta(Check):
    """The base's tensors are those that the delta was made from: reading them compares hashes."""

    def unread(self, problem: str) -> None:
        self.problems.append(problem)

    def conclude(self) -> None:
        if (count := self.subject.from_base) is not None:
            detail = f"{count} tensors have the hashes the delta knows them by"
            self.found.add("the base", self.problems, detail)

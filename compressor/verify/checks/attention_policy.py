"""The attention policy, where there is one."""

from compressor.attention.policy import (
    check_policy,
    describe,
    read_policy,
    read_policy_tensors,
    tensor_problems,
)
from compressor.errors import InputError
from compressor.verify.checks.base import Check


class AttentionPolicy(Check):
    """It is valid, and for this model, and its tensors are whole."""

    def begin(self) -> None:
        folder = self.subject.folder
        try:
            policy = read_policy(folder)
            if policy is None:
                return
            check_policy(policy, self.subject.source.layout)
            problems = tensor_problems(policy, read_policy_tensors(folder))
        except InputError as error:
            self.found.add("attention policy", [error.message], "")
            return
        self.found.add("attention policy", problems, "; ".join(describe(policy)))

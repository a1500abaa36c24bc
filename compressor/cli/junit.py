"""JUnit XML: what was checked, as the test reports that CI systems show."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import click

from compressor.cli.written import write_file
from compressor.errors import CheckError, CompressError, Problems
from compressor.ranks.place import place_of

if TYPE_CHECKING:
    from compressor.evaluate.gate import GateResult
    from compressor.evaluate.passkey import PasskeyResult
    from compressor.evaluate.perplexity import EvaluationResult, TaskScore
    from compressor.run.judge import Verdict
    from compressor.verify.findings import VerifyReport

ENDED = "ran to its end"
"""The case that says whether a command did."""

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that was checked.

    group    what it belongs to: plan, compress, verify, gate …
    failure  why a check did not hold;  error  why it could not be made;  output  what it found
    """

    group: str
    name: str
    seconds: float = 0.0
    failure: str = ""
    error: str = ""
    output: str = ""


@contextmanager
def junit(path: Path | None, command: str) -> Iterator[list[Case]]:
    """A list of cases that is written to `path` when the context ends, however it ends.

    An error that ends it becomes a case of its own; one that ends well has a case at least.
    Without a path nothing is written.
    """
    cases: list[Case] = []
    started = time.perf_counter()
    try:
        yield cases
        if not cases:
            cases.append(Case(command, ENDED, seconds=time.perf_counter() - started))
    except click.exceptions.Exit:
        # A command's own exit code, after it said why.
        raise
    except BaseException as error:
        cases += error_cases(error, command)
        raise
    finally:
        if path is not None:
            write_cases(path, cases, command)


def error_cases(error: BaseException, command: str) -> list[Case]:
    """One case for each thing that ended a command."""
    if not isinstance(error, CompressError):
        text = f"{type(error).__name__}: {error}"
        return [Case(command, ENDED, error=text)]
    cases = []
    for problem in error.problems if isinstance(error, Problems) else [error]:
        said = problem.message + (f"\nhint: {problem.hint}" if problem.hint else "")
        failed = isinstance(problem, CheckError)
        name = (problem.message.splitlines() or [ENDED])[0]
        cases.append(
            Case(command, name, failure=said if failed else "", error="" if failed else said)
        )
    return cases


def checked(group: str, name: str, text: str, *, ok: bool, seconds: float = 0.0) -> Case:
    """A check that held or did not, and what it found."""
    return Case(group, name, seconds, **{"output" if ok else "failure": text})


def verify_cases(found: VerifyReport, *, seconds: float = 0.0) -> list[Case]:
    """One case for each check of a verification."""
    each = seconds / max(len(found.checks), 1)
    return [checked("verify", c.name, c.detail, ok=c.ok, seconds=each) for c in found.checks]


def verdict_cases(verdict: Verdict) -> list[Case]:
    """One case for each check, measurement and limit of a verdict."""
    cases: list[Case] = []
    if verdict.verified is not None:
        cases += verify_cases(verdict.verified, seconds=verdict.seconds.get("verify", 0.0))
    cases += evaluation_cases(verdict.evaluation, verdict.passkey, verdict.tasks)
    return cases + gate_cases(verdict.gate)


def evaluation_cases(
    found: EvaluationResult | None,
    passkey: PasskeyResult | None = None,
    tasks: Mapping[str, TaskScore] | None = None,
) -> list[Case]:
    """One case for each measurement; they hold whatever was found, limits are the gate's."""
    cases: list[Case] = []
    if found is not None:
        text = f"perplexity {found.perplexity.value:.4f} ± {found.perplexity.error:.4f}"
        if found.kl is not None:
            text += f", KL {found.kl.value:.5f} ± {found.kl.error:.5f}"
        text += f", over {found.tokens} tokens"
        cases.append(Case("evaluate", "perplexity", seconds=found.seconds, output=text))
    if passkey is not None:
        text = f"accuracy {passkey.accuracy.value:.4f} ± {passkey.accuracy.error:.4f}"
        cases.append(Case("evaluate", "passkey", output=f"{text}, over {passkey.tokens} tokens"))
    for name, value in (tasks or {}).items():
        text = f"accuracy {value.value:.4f} ± {value.error:.4f}, over {value.documents} documents"
        cases.append(Case("evaluate", name, output=text))
    return cases


def gate_cases(gate: GateResult | None) -> list[Case]:
    """One case for each limit."""
    checks = gate.checks if gate is not None else ()
    return [checked("gate", c.name, c.message, ok=c.passed) for c in checks]


def write_cases(path: Path, cases: Sequence[Case], command: str) -> None:
    """Write a test report, and the folders above it; of several ranks the first does."""
    if (place := place_of()) is not None and place.rank > 0:
        return
    suite = ElementTree.Element(
        "testsuite",
        name=f"compress {command}",
        tests=str(len(cases)),
        failures=str(sum(bool(case.failure) for case in cases)),
        errors=str(sum(bool(case.error) for case in cases)),
        skipped="0",
        time=f"{sum(case.seconds for case in cases):.3f}",
    )
    for case in cases:
        element = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"compress.{_clean(case.group)}",
            name=_clean(case.name),
            time=f"{case.seconds:.3f}",
        )
        for tag, text in (("failure", case.failure), ("error", case.error)):
            if text:
                child = ElementTree.SubElement(element, tag, message=_clean(text.splitlines()[0]))
                child.text = _clean(text)
        if case.output:
            ElementTree.SubElement(element, "system-out").text = _clean(case.output)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    write_file(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _clean(text: str) -> str:
    """Text without what XML cannot hold."""
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)

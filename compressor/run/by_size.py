"""Where a finished checkpoint stands by size and quality, from what was measured before: reports
of other checkpoints of its model beside it, and sensitivities."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from compressor.errors import InputError
from compressor.evaluate.perplexity import EvaluationResult
from compressor.foreign.untrusted import read_file
from compressor.ir.layout import Linear
from compressor.ir.scheme import Scheme
from compressor.report.data import JSON_NAME, Mixes, Peer, read_report
from compressor.run.allocate import (
    Group,
    Option,
    Sensitivity,
    error_of,
    frontier,
    parse_sensitivity,
    uniform,
)
from compressor.runtimes.contract import kind_of

MOST = 64
"""Reports that are read."""
SAME = 1e-3
"""By which the same model's perplexity on the same tokens differs at most, relative: batches and
devices round differently."""


def sensitivity_file(output: Path) -> Path:
    """Where what was measured for a checkpoint lies: beside it."""
    return output.with_name(f"{output.name}.sensitivity.json")


def find_peers(
    output: Path, source: Mapping[str, object], evaluation: EvaluationResult | None
) -> tuple[Peer, ...]:
    """Other checkpoints in the same folder that were made from the same weights and measured on
    the same tokens, by what their reports say."""
    if evaluation is None or evaluation.original_perplexity is None:
        return ()
    ours = evaluation.original_perplexity.value
    found = []
    others = sorted(path.parent for path in output.resolve().parent.glob(f"*/{JSON_NAME}"))
    for folder in [x for x in others if x != output.resolve()][:MOST]:
        report = read_report(folder)
        if report is None or report.source.get("content") != source.get("content"):
            continue
        about, size = report.evaluation or {}, report.spent.output_bytes
        original, kl = about.get("original_perplexity"), about.get("kl")
        same = all(about.get(k) == getattr(evaluation, k) for k in ("windows", "length", "tokens"))
        if not (same and original and kl and size and report.parameters):
            continue
        if original["value"] is None or kl["value"] is None:
            continue
        if math.isclose(original["value"], ours, rel_tol=SAME):
            kept = {key: kl[key] for key in ("value", "error") if kl.get(key) is not None}
            found.append(Peer(name=folder.name, bits=8 * size / report.parameters, kl=kept))
    return tuple(found)


def find_mixes(
    output: Path, linears: Iterable[Linear], schemes: Mapping[str, Scheme]
) -> Mixes | None:
    """What other mixes of bits would cost, where sensitivities of this model lie beside the
    output, and where among them the written schemes are."""
    file = sensitivity_file(output)
    if not file.is_file():
        return None
    try:
        measured = parse_sensitivity(read_file(file, what="sensitivities"), where=str(file))
    except InputError:
        return None
    sizes = {x.name: x.shape[0] * x.shape[1] for x in linears}
    if any(sum(sizes.get(x, 0) for x in g.linears) != g.weights for g in measured.groups):
        return None
    return Mixes(
        measure=measured.measure,
        best=tuple(frontier(measured)),
        alike=uniform(measured),
        this=_place(measured, schemes),
    )


def _place(measured: Sensitivity, schemes: Mapping[str, Scheme]) -> tuple[float, float] | None:
    """Bits and error of the written schemes; None where one of them was not measured."""
    choice = []
    for group in measured.groups:
        same = [i for i, x in enumerate(group.options) if _is(x, group, schemes)]
        if not same:
            return None
        choice.append(same[0])
    return measured.bits_per_weight(choice), error_of(measured, choice)


def _is(option: Option, group: Group, schemes: Mapping[str, Scheme]) -> bool:
    """Whether all linears of a group are stored as an option says."""
    specs = {schemes[name].weight for name in group.linears}
    if len(specs) != 1:
        return False
    (spec,) = specs
    if spec is None:
        return option.bits is None and option.form is None
    kind = kind_of(spec)
    return option.bits == spec.bits if kind == "int" else option.form == kind

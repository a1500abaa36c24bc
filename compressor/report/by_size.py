"""Its part on quality by size: this checkpoint beside others of its model, and other mixes."""

from collections.abc import Mapping
from html import escape
from typing import Any

from compressor.report.elements import section
from compressor.report.svg import COLOURS, Point, dots, lines
from compressor.report.text import counted, number, with_error

THIS = "this checkpoint"


def by_size(data: Mapping[str, Any]) -> str:
    """A section of a report's plain data; empty where nothing beside the run was measured."""
    body = _peers(data) + _mixes(data.get("mixes"))
    return section("Quality by size", body) if body else ""


def _peers(data: Mapping[str, Any]) -> str:
    """Checkpoints of the same model in the plane of bits and divergence."""
    kl = (data["evaluation"] or {}).get("kl")
    others = data.get("peers") or ()
    if not others or not data["parameters"] or kl is None or kl["value"] is None:
        return ""
    bits = 8 * data["spent"]["output_bytes"] / data["parameters"]
    near = sorted(others, key=lambda peer: abs(peer["bits"] - bits))[: COLOURS - 1]
    shown = [(THIS, bits, kl), *((peer["name"], peer["bits"], peer["kl"]) for peer in near)]
    series = {
        name: [Point(round(x, 2), y["value"], f"{name}: {x:.2f} bits, KL {with_error(y)} nats")]
        for name, x, y in shown
    }
    plot = dots(
        series,
        x_title="bits of a parameter, all that is stored included",
        y_title="KL from the original, in nats; lower left is better",
        show=number,
    )
    better = [
        peer["name"]
        for peer in others
        if peer["bits"] <= bits and peer["kl"]["value"] < kl["value"]
    ]
    says = (
        f"smaller, or as small, and nearer to the original: {', '.join(better)}"
        if better
        else "none of them is as small and nearer to the original"
    )
    count = counted(len(others), "other checkpoint")
    return f"<p>{count} of this model, measured on the same tokens; {escape(says)}.</p>{plot}"


def _mixes(mixes: Mapping[str, Any] | None) -> str:
    """What each number of bits would cost, as far as it was measured before the run."""
    if mixes is None:
        return ""
    series = {
        "best mix": [_mix("best mix", *point) for point in mixes["best"]],
        "one form throughout": [
            _mix(name, *point)
            for name, point in sorted(mixes["alike"].items(), key=lambda entry: entry[1])
        ],
    }
    if mixes["this"] is not None:
        series[THIS] = [_mix(THIS, *mixes["this"])]
    plot = lines(
        series,
        x_title="bits of a quantized weight, scales included",
        y_title="summed error of all groups of linears, as it was measured (no unit)",
        show=number,
        log=True,
    )
    about = f"What was measured before the run: {mixes['measure']}."
    return f'<h3>Other mixes of bits</h3>{plot}<p class="quiet">{escape(about)}</p>'


def _mix(name: str, bits: float, error: float) -> Point:
    return Point(round(bits, 2), error, f"{name}: {bits:.2f} bits, error {number(error)}")

"""Draws report.json as one HTML page that needs nothing but itself."""

from collections.abc import Mapping
from html import escape
from typing import Any

import yaml

from compressor.report.audit import audit_badges, audits
from compressor.report.by_size import by_size
from compressor.report.choices import choices
from compressor.report.elements import breakable, mark, page, section, table
from compressor.report.layers import experts, layers
from compressor.report.nearest import beside_nearest
from compressor.report.svg import Point, columns, lines
from compressor.report.text import (
    counted,
    duration,
    factor,
    figure,
    number,
    relative_error,
    share,
    share_with_error,
    size,
    with_error,
)

GATE_LAYERS = 3

Data = Mapping[str, Any]


def render(data: Data, *, attention: str = "") -> str:
    """The page for a report's plain data (`ReportData.to_json`); `attention` is HTML about the
    checkpoint's policy."""
    warnings = "".join(f"<p>{escape(text)}</p>" for text in data["warnings"])
    parts = [
        _header(data),
        _tiles(data),
        section("Warnings", warnings) if data["warnings"] else "",
        _gate(data),
        _evaluation(data),
        _passkey(data),
        section("Chosen key blocks", choices(data["choices"])) if data.get("choices") else "",
        section("Attention", attention) if attention else "",
        by_size(data),
        beside_nearest(data["verify"]),
        layers(data["units"]),
        experts(data["units"]),
        _verify(data),
        audits(data["audit"]),
        _done(data),
        _plan(data),
        _units(data),
        _origins(data),
    ]
    return page(f"{data['title']}: report", parts)


def _header(data: Data) -> str:
    badges = [
        _badge("verify", data["verify"], good="files verified", bad="files damaged"),
        _badge("gate", data["gate"], good="gate passed", bad="gate failed"),
    ]
    badges += audit_badges(data["audit"])
    if data["warnings"]:
        warnings = counted(len(data["warnings"]), "warning")
        badges.append(f'<span class="badge warn">{warnings}</span>')
    passes = " → ".join(name for name, _ in _passes(data))
    return (
        f"<header><h1>{escape(data['title'])}</h1>"
        f'<p class="quiet">{escape(str(data["recipe"].get("model", "")))} → {escape(passes)} → '
        f"{escape(data['format'])}</p>"
        f'<div class="badges">{"".join(badges)}</div></header>'
    )


def _badge(name: str, verdict: Data | None, *, good: str, bad: str) -> str:
    if verdict is None:
        return f'<span class="badge">no {escape(name)}</span>'
    passed = _held(verdict)
    return f'<span class="badge {"good" if passed else "bad"}">{good if passed else bad}</span>'


def _tiles(data: Data) -> str:
    spent, evaluation = data["spent"], data["evaluation"] or {}
    before, after = spent["source_bytes"], spent["output_bytes"]
    small = f"{factor(before, after)} smaller than {size(before)}" if after else ""
    if data["parameters"] and after:
        small += f", {after * 8 / data['parameters']:.2f} bits per weight"
    tiles = [(size(after), small)]
    if evaluation:
        perplexity, ratio = evaluation["perplexity"], evaluation["perplexity_ratio"]
        note = "perplexity"
        if ratio and ratio["value"] is not None:
            note += f", {with_error(ratio)} of the original's"
        tiles.append((figure(perplexity), note))
    for key, note in (("kl", "KL from the original, nats"), ("top1", "top-1 agreement")):
        if found := evaluation.get(key):
            value = share_with_error(found).partition(" ± ")[0] if key == "top1" else figure(found)
            tiles.append((value, note))
    tiles.append((duration(spent["seconds"]), "from the first to the last unit"))
    memory = "peak main memory"
    if spent["device_bytes"]:
        memory += f", {size(spent['device_bytes'])} on the device"
    tiles.append((size(spent["host_bytes"]), memory))
    cells = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(note)}</span></div>'
        for big, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _gate(data: Data) -> str:
    gate = data["gate"]
    if gate is None:
        return ""
    rows = [[mark(check["passed"]), escape(check["message"])] for check in gate.get("checks", ())]
    body = table(["", "limit"], rows, texts=(1,))
    layers = gate.get("layers") or []
    if not gate.get("passed") and layers and layers[0].get("share"):
        worst = ", ".join(
            f"<code>{breakable(layer['linear'])}</code> ({layer['share']:.1%})"
            for layer in layers[:GATE_LAYERS]
        )
        body += (
            '<p class="after">Largest shares of the summed error of '
            f"{len(layers)} linears: {worst}.</p>"
        )
    if gate.get("suggestion"):
        body += (
            "<h3>What may help</h3><p>More bits where most of the error is; in the recipe, "
            f"replace <code>passes</code> by</p><pre>{escape(gate['suggestion'])}</pre>"
        )
    return section("Gate", body)


def _evaluation(data: Data) -> str:
    evaluation = data["evaluation"]
    if evaluation is None:
        return ""
    rows = []
    for key, title in (
        ("perplexity", "perplexity"),
        ("original_perplexity", "the original's perplexity"),
        ("perplexity_ratio", "ratio, over paired windows"),
        ("kl", "KL(original ‖ this), nats"),
        ("top1", "top-1 agreement"),
    ):
        if evaluation.get(key):
            shown = share_with_error if key == "top1" else with_error
            rows.append([escape(title), shown(evaluation[key])])
    for task, found in data["tasks"].items():
        over = f" ({found['documents']:,} documents)" if found.get("documents") else ""
        rows.append([escape(task) + over, with_error(found)])
    body = (
        f'<p class="quiet">{evaluation["tokens"]:,} tokens scored in {evaluation["windows"]} '
        f"windows of {evaluation['length']}; ± is one standard error.</p>"
        + table(["measure", "value"], rows, numbers=(1,))
    )
    blocks = evaluation.get("blocks") or []
    if len(blocks) > 1:
        points = [
            Point(i, block["error"] or 0.0, f"{block['name']}: {relative_error(block['error'])}")
            for i, block in enumerate(blocks)
        ]
        body += "<h3>How the difference grows</h3>" + lines(
            {"this checkpoint": points},
            x_title="block, by number",
            y_title="squared difference of the hidden states to the original's, relative (no unit)",
            show=number,
            log=True,
        )
    return section("Evaluation", body)


def _passkey(data: Data) -> str:
    passkey = data["passkey"]
    if passkey is None:
        return ""
    compared = passkey["original_accuracy"] is not None
    found, whole = passkey["accuracy"], passkey["exact"]
    header = ["tokens", "depth", "accuracy", "exact"] + ["original"] * compared
    rows = []
    for cell in passkey["cells"]:
        row = [f"{cell['length']:,}", *(share(cell[k]) for k in ("depth", "accuracy", "exact"))]
        rows.append(row + ([share(cell["original_accuracy"])] if compared else []))
    body = (
        f"<p>{share_with_error(found)} of the answers' {passkey.get('tokens') or ''} tokens were "
        f"found, {share_with_error(whole)} of {sum(c['rows'] for c in passkey['cells'])} passkeys "
        "whole.</p>"
    )
    return section("Passkey retrieval", body + table(header, rows, numbers=range(len(header))))


def _verify(data: Data) -> str:
    verify = data["verify"]
    if verify is None:
        return ""
    checks = [
        [
            mark(_held(check)),
            escape(str(check.get("name", ""))),
            escape(str(check.get("detail", ""))),
        ]
        for check in verify.get("checks", ())
    ]
    body = table(["", "check", "found"], checks, texts=(2,)) if checks else ""
    # What else the verdict carries: single values, and lists of messages.
    others = [
        [escape(key.replace("_", " ")), escape(_inline(value))]
        for key, value in verify.items()
        if key not in ("ok", "passed", "checks")
        and not isinstance(value, dict)
        and not (isinstance(value, list) and any(isinstance(entry, dict) for entry in value))
        and value not in (None, "", [])
    ]
    return section(
        "Verification of the written files",
        body + (table([], others, texts=(1,)) if others else ""),
    )


def _held(verdict: Data) -> bool:
    return bool(verdict.get("ok", verdict.get("passed")))


def _done(data: Data) -> str:
    rows = [
        [str(i), escape(name), escape(_inline(params))]
        for i, (name, params) in enumerate(_passes(data), 1)
    ]
    text = yaml.safe_dump(dict(data["recipe"]), sort_keys=False, width=100, allow_unicode=True)
    details = f"<details><summary>The recipe in full</summary><pre>{escape(text)}</pre></details>"
    done = table(["", "pass", "parameters"], rows, texts=(2,))
    learned = [
        [escape(str(name)), escape(_inline(found))]
        for name, found in ((row.pop("pass"), row) for row in map(dict, data.get("learned", ())))
    ]
    if learned:
        done += "<h3>What was learned</h3>" + table(["pass", "found"], learned, texts=(1,))
    return section("What was done", done + details)


def _plan(data: Data) -> str:
    planned, spent = data["estimates"], data["spent"]
    rows = []
    for key, title, show in (
        ("output_bytes", "bytes written", size),
        ("host_bytes", "peak main memory", size),
        ("device_bytes", "peak device memory", size),
        ("seconds", "time", duration),
    ):
        if planned[key] or spent[key]:
            ratio = factor(spent[key], planned[key])
            rows.append([title, show(planned[key]), show(spent[key]), ratio])
    header = ["", "planned", "happened", "ratio"]
    body = table(header, rows, numbers=(1, 2, 3))
    phases = [[escape(name), duration(seconds)] for name, seconds in data["phases"].items()]
    if phases:
        body += "<h3>Time by phase</h3>" + table(["phase", "time"], phases, numbers=(1,))
    if kept := data.get("activations"):
        body += (
            f"<p>Rows through a block: {kept['read']} were read from the activation store, "
            f"{kept['ran']} were computed.</p>"
        )
    return section("The plan, and what happened", body)


def _units(data: Data) -> str:
    units = data["units"]
    if not units:
        return ""
    times, host, device = [], [], []
    for i, unit in enumerate(units):
        earlier = " (done by an earlier run)" if unit["resumed"] else ""
        times.append(
            Point(i, unit["seconds"], f"{unit['name']}: {duration(unit['seconds'])}{earlier}")
        )
        host.append(Point(i, unit["peak_rss"], f"{unit['name']}: {size(unit['peak_rss'])}"))
        device.append(Point(i, unit["peak_device"], f"{unit['name']}: {size(unit['peak_device'])}"))
    memory = {"main memory": host}
    if any(point.y for point in device):
        memory["device"] = device
    title = "highest memory up to each unit, in bytes"
    each = {"this run": times}
    body = columns(each, x_title="unit, by number", y_title="time of each unit", show=duration)
    body += lines(memory, x_title="unit, by number", y_title=title, show=size)
    return section("Time and memory by unit", body)


def _origins(data: Data) -> str:
    groups = [("Source", data["source"]), ("Machine", data["machine"])]
    groups += [("Computed with", environment) for environment in data["environment"]]
    groups += [("Versions", data["versions"]), ("SHA-256", data["hashes"])]
    body = "".join(
        f"<h3>{title}</h3>"
        + table([], [[escape(str(k)), escape(_inline(v))] for k, v in values.items()], names=(1,))
        for title, values in groups
        if values
    )
    started = f"<footer>Started {escape(data['started'])}</footer>" if data["started"] else ""
    return section("Where it comes from", body) + started if body else started


def _passes(data: Data) -> list[tuple[str, Data]]:
    return [
        (name, params or {})
        for step in data["recipe"].get("passes", ())
        for name, params in step.items()
    ]


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_inline(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_inline, value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return number(value) if isinstance(value, float) else str(value)

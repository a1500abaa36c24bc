"""Time and memory of whole `compress run`s with AWQ, from checkpoint on disk to packed checkpoint.

    python scripts/bench/job.py MODEL --runs 4
    python scripts/bench/job.py MODEL --package OLD --package NEW --runs 3
    python scripts/bench/job.py SMOLLM2 --device cpu --threads 2 --samples 16 --length 256 \\
        --group-size 64

A whole process counts, imports and kernel compilation included; Triton's cache is a fresh folder
for each run. The model's files are read once before the clock starts. Verification and evaluation
(8 x 512 tokens, beside the original) are on with --judged alone. Each --package is a folder that
holds `compressor` (an unpacked wheel, or a checkout with `kernels` and `calibration`); without one
it is this checkout. They take turns. A line of JSON for each run, then a Markdown table of minimum
and median.
"""

import json
import os
import statistics
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tables import markdown
from whole import ROOT, run


def settle(model: Path) -> None:
    """Bring the model's files into the page cache, with nothing left to write."""
    os.sync()
    for path in model.glob("*.safetensors"):
        with path.open("rb") as handle:
            while handle.read(1 << 24):
                pass


def timed(package: Path, options: Namespace, scratch: Path) -> dict[str, Any]:
    """One run of a version."""
    awq = {"bits": 4, "group_size": options.group_size, "symmetric": False}
    calibration = {"data": options.data, "samples": options.samples, "length": options.length}
    recipe: dict[str, Any] = {
        "model": str(options.model.resolve()),
        "calibration": calibration,
        "passes": [{"awq": awq}],
        "verify": options.judged,
    }
    if options.judged:  # the texts need not differ to be timed
        recipe["evaluate"] = {"data": options.data, "windows": 8, "length": 512, "force": True}
    inside = [package, package / "kernels", package / "calibration"]
    path = [str(folder.resolve()) for folder in inside if folder.is_dir()]
    environment = {
        "TRITON_CACHE_DIR": tempfile.mkdtemp(dir=scratch),
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
    }
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    settle(options.model)
    settings = [part for value in options.set for part in ("--set", value)]
    ran = run(recipe, scratch, *settings, device=options.device, environment=environment)
    first, second, *_, last = ran.units.values()
    stages = {e["stage"]: e["seconds"] for e in ran.events if e["event"] == "stage done"}
    return {
        "seconds": round(ran.seconds, 2),
        "processor_s": round(ran.processor_s, 1),
        "peak_rss_gb": round(ran.host_gb, 2),
        "first_unit_at": round(first, 2),
        "second_unit_at": round(second, 2),
        "last_unit_at": round(last, 2),
        "peak_allocated_gb": round(ran.result["peak_device_bytes"] / 1e9, 2),
        "output_gb": round(ran.result["output_bytes"] / 1e9, 3),
        **{f"{s}_s": round(stages[s], 2) for s in ("verify", "evaluate") if s in stages},
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--package", type=Path, action="append", help="a version to time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="of PyTorch on a processor")
    parser.add_argument("--data", default="bundled", help="as in a recipe")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--judged", action="store_true", help="with verification and evaluation")
    parser.add_argument("--runs", type=int, default=1, help="of each")
    parser.add_argument("--set", action="append", default=[], help="as for compress run")
    parser.add_argument("--scratch", type=Path, help="folder for the output; default: temporary")
    options = parser.parse_args()
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    packages = options.package or [ROOT]
    rows: dict[Path, list[dict[str, Any]]] = {package: [] for package in packages}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for package in packages * options.runs:
            rows[package].append(row := timed(package, options, Path(folder)))
            print(json.dumps({"what": str(package), **row}), flush=True)
    columns = {name: zip(*map(dict.values, found), strict=True) for name, found in rows.items()}
    table = (
        [package, *(f"{min(values)}, {statistics.median(values):g}" for values in found)]
        for package, found in columns.items()
    )
    head = [f"minimum, median of {options.runs}", *rows[packages[0]][0]]
    print(f"\n{markdown(head, table)}")


if __name__ == "__main__":
    main()

"""One GPU against several: the same recipes, the same bytes, how much sooner.

    python scripts/bench/ranks.py --gpus 2 [--case NAME ...] [--scratch FOLDER]
    python scripts/bench/ranks.py --gpus 2 --device cpu --tiny          # whether it works
    python scripts/bench/ranks.py --gpus 2 --phases FOLDER              # and where the time goes

Random weights of a 7B Llama's shape and of Qwen3-30B-A3B's, some blocks of each. The first block is
left out: it waits for kernels to be compiled. One Markdown table, and a line of JSON for each run:
seconds from the end of the first block to the end of the last, the same for one block, how many
times as fast as one GPU and its share of the GPUs, whether the manifests are equal, and the largest
memory that tensors took on the leading GPU, in all and until the end of each unit. Of what is
learned before any block is worked on (`gates`, `forecasts`, `emulator`, `delta`) the same of its
steps, of forecasts one a block. With --phases each run comes once more under the clock of
`phases.py`, and a table says what each part of a block takes on every rank.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
AWQ = {"awq": {"bits": 4, "group_size": 128, "symmetric": False}}
GPTQ = {"gptq": {"bits": 4, "group_size": 128, "correction": 0.5, "scales": "search"}}
PLAIN_GPTQ = {"gptq": {"bits": 4, "group_size": 128, "correction": 0.0, "scales": "range"}}
GATES = {
    "duo_attention": {
        "data": {"keys": 4, "words": 4, "min_length": 2048, "max_length": 2048, "lengths": 1},
        **{"batch": 4, "num_steps": 20},
    }
}
FORECASTS = {
    "sparda": {
        **{"block_size": 64, "local_blocks": 2, "top_k": 8, "dense_below": 0},
        **{"steps": 20, "rows_per_step": 8, "held_out_rows": 1},
    }
}
EMULATOR = {"emulator": {"pads": [1, 1], "keep": 2, "distill": {"steps": 20, "batch": 8}}}
DELTA = {"bitdelta": {"distill": "logits", "steps": 20, "batch": 4}}
LEARNED = {"reconstruct": {"bits": 4, "group_size": 128, "preset": "fast"}}


@dataclass(frozen=True)
class Case:
    """A shape of `make_random_model.py`, how many blocks of it, what is done to it.

    learns  what the names of its steps begin with, where the whole model is learned of
    format  in which it is written
    """

    shape: str
    layers: int
    step: dict[str, Any]
    samples: int
    length: int
    learns: str | None = None
    format: str = "compressed-tensors"


CASES = {
    "awq": Case("7b", 9, AWQ, 128, 512),
    "awq-long": Case("7b", 5, AWQ, 512, 2048),
    "gptq-long": Case("7b", 5, PLAIN_GPTQ, 512, 2048),
    "gptq-beside-long": Case("7b", 3, GPTQ, 512, 2048),
    "reconstruct-long": Case("7b", 3, LEARNED, 512, 2048),
    "gptq-beside": Case("7b", 2, GPTQ, 64, 512),
    "reconstruct": Case("7b", 2, LEARNED, 64, 512),
    "moe-awq": Case("30b-a3b", 4, AWQ, 128, 512),
    "gates": Case("7b", 4, GATES, 16, 2048, "duo_attention", "dense"),
    "forecasts": Case("7b", 4, FORECASTS, 32, 2048, "forecast for model.layers", "dense"),
    "emulator": Case("7b", 6, EMULATOR, 64, 512, "distill", "dense"),
    "delta": Case("7b", 2, DELTA, 64, 512, "distill", "bitdelta"),
}


def write_text(path: Path) -> None:
    """Words drawn at random, as many bytes as the largest case has tokens and more."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(2000)]
    lines = (" ".join(draw.choices(words, k=400)) for _ in range(900))
    path.write_text("\n\n".join(lines))


def smaller(step: dict[str, Any]) -> None:
    """What is learned of a small model in few steps."""
    ((name, params),) = step.items()
    if name == "duo_attention":
        params["data"] |= {"keys": 2, "words": 1, "min_length": 480, "max_length": 480}
        params |= {"num_steps": 3, "window": 160}
    elif name == "sparda":
        params |= {"block_size": 4, "kernel_size": 4, "stride": 2, "steps": 3}
    elif name == "emulator":
        params["keep"], params["distill"]["steps"] = 1, 3
    elif name == "bitdelta":
        params["steps"] = 3


def model_of(case: Case, options: argparse.Namespace, scratch: Path, seed: int = 0) -> Path:
    """Its random weights, written once."""
    shape = {"7b": "wide", "30b-a3b": "tiny-moe"}[case.shape] if options.tiny else case.shape
    layers = min(case.layers, 4) if options.tiny else case.layers
    folder = scratch / f"{shape}-{layers}-{seed}"
    if not folder.exists():
        command = [sys.executable, str(HERE / "make_random_model.py"), str(folder)]
        command += ["--shape", shape, "--layers", str(layers), "--device", options.device]
        command += ["--seed", str(seed)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def timed(
    name: str,
    case: Case,
    gpus: int,
    options: argparse.Namespace,
    scratch: Path,
    phases: Path | None = None,
) -> Any:
    """One run in processes of its own; its manifest is left in `scratch`. With `phases` what its
    parts take is left there."""
    output, recipe = scratch / f"{name}-{gpus}", scratch / "recipe.yaml"
    samples, length = (24, 64) if options.tiny else (case.samples, case.length)
    step = json.loads(json.dumps(case.step))
    if "bitdelta" in step:
        step["bitdelta"]["base"] = str(model_of(case, options, scratch, seed=1))
    if options.tiny:
        smaller(step)
    data = {"data": str(scratch / "text.txt"), "samples": samples, "length": length}
    recipe.write_text(
        json.dumps(
            {
                "model": str(model_of(case, options, scratch)),
                "output": str(output),
                "calibration": data,
                "passes": [step],
                "format": case.format,
                "verify": False,
            }
        )
    )
    shutil.rmtree(output, ignore_errors=True)
    command, environment = [sys.executable, "-m", "compressor"], dict(os.environ)
    if phases is not None:
        environment |= {"PHASES": str(phases), "PHASES_SYNC": "1"}
        environment["PYTHONPATH"] = f"{HERE.parent}:{environment.get('PYTHONPATH', '')}"
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus)]
        command = [sys.executable, *(launcher if gpus > 1 else [])]
        command.append(str(HERE / "bench" / "phases.py"))
    command += ["run", str(recipe), "--json", "--log-format", "json", "--device", options.device]
    command += ["--gpus", str(gpus)]
    if options.device_memory is not None:
        command += ["--device-memory", options.device_memory]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} on {gpus}: {done.stdout}\n{done.stderr[-4000:]}")
    events = [json.loads(line) for line in done.stderr.splitlines() if line[:1] == "{"]
    told = [event for event in events if event["event"] == "unit"]
    units = [(event["unit"], event["time"]) for event in told]
    # The embedding comes first and the head last.
    blocks = [time for _, time in units[1:-1]]
    if case.learns is not None:
        blocks = [time for unit, time in units if unit.startswith(case.learns)]
    return {
        "case": name,
        "gpus": gpus,
        "tokens": samples * length,
        "whole_s": round(time.perf_counter() - began, 1),
        "blocks_s": round(blocks[-1] - blocks[0], 3),
        "block_s": round((blocks[-1] - blocks[0]) / (len(blocks) - 1), 3),
        "peak_gb": round(json.loads(done.stdout)["peak_device_bytes"] / 1e9, 2),
        "peaks_mb": [round(event.get("device", 0) / 1e6) for event in told],
        "manifest": (output / "manifest.json").read_text("utf-8"),
    }


def parts(name: str, folder: Path, gpus: int) -> list[str]:
    """A table of what each part of a block takes, in milliseconds, on one GPU and on each rank."""
    files = [folder / f"{name}-1" / "rank-0.json"]
    files += [folder / f"{name}-{gpus}" / f"rank-{rank}.json" for rank in range(gpus)]
    found = [json.loads(file.read_text())["ms"] for file in files]
    heads = [f"| {name}, ms a block | one GPU |" + "".join(f" rank {r} |" for r in range(gpus))]
    heads.append("|---" * (gpus + 2) + "|")
    names = sorted({part for ms in found for part in ms}, key=lambda part: -found[0].get(part, 0))
    rows = [f"| {n} |" + "".join(f" {ms.get(n, 0):.1f} |" for ms in found) for n in names]
    return ["", *heads, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-memory", help="of each rank; experts may be spread over them")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it")
    parser.add_argument("--scratch", type=Path, help="folder for models; default: temporary")
    parser.add_argument("--phases", type=Path, metavar="FOLDER", help="what parts of a block take")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    table = ["| case | GPUs | seconds | a block | times | efficiency | same bytes | peak |"]
    table.append("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        scratch = Path(temporary)
        write_text(scratch / "text.txt")
        for name in options.case or CASES:
            one: dict[str, Any] = {}
            for gpus in (1, options.gpus):
                found = timed(name, CASES[name], gpus, options, scratch)
                one = one or dict(found)
                times = one["blocks_s"] / max(found["blocks_s"], 1e-9)
                same = "yes" if found.pop("manifest") == one["manifest"] else "no"
                print(json.dumps(found), flush=True)
                table.append(
                    f"| {name} | {gpus} | {found['blocks_s']} | {found['block_s']} | {times:.2f} "
                    f"| {times / gpus:.0%} | {same} | {found['peak_gb']} GB |"
                )
                print(table[-1], file=sys.stderr, flush=True)
            if options.phases is None:
                continue
            for gpus in (1, options.gpus):
                folder = options.phases / f"{name}-{gpus}"
                timed(name, CASES[name], gpus, options, scratch, folder)
            print("\n".join(parts(name, options.phases, options.gpus)), flush=True)
    print("\n".join(["", *table]))


if __name__ == "__main__":
    main()

"""Time AWQ on a CPU, ours and llm-compressor's, each as a whole process on the same machine.

    python scripts/bench/cpu_awq.py SMOLLM2 --peer PEER/bin/python [--threads 1] [--layers 4]

W4 asymmetric, 16 x 256 tokens of the bundled calibration text; ours with the search for clipping
bounds, which the other lacks, and without.
PEER is an environment with `pip install llmcompressor`. Wall time means little on a busy machine:
processor time is printed beside it. --layers cuts the model to its first ones, for both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import compressor_calibration
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
TEXT = Path(compressor_calibration.__file__).parent / "text" / "calibration.txt"


def first_layers(model: Path, folder: Path, layers: int) -> Path:
    """A checkpoint of the model's first blocks."""
    config = json.loads((model / "config.json").read_text())
    folder.mkdir()
    for path in model.glob("*.json"):
        if not path.name.endswith(".index.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    kept = {}
    for path in model.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            parts = name.split(".")
            if "layers" not in parts or int(parts[parts.index("layers") + 1]) < layers:
                kept[name] = tensor
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def timed(command: list[str], log: Path, *, threads: int) -> dict[str, float]:
    """Wall and processor seconds and peak memory of a process and what it starts."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    began = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{command[0]} failed:\n{log.read_text()[-3000:]}")
    return {
        "wall_s": round(time.perf_counter() - began, 1),
        "processor_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--layers", type=int, help="only the model's first blocks")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    samples, length, size = options.samples, options.length, options.group_size
    with tempfile.TemporaryDirectory() as name:
        scratch, model = Path(name), options.model
        if options.layers:
            model = first_layers(model, scratch / "model", options.layers)
        rows, log = {}, scratch / "log"
        for who, clip in (("ours", True), ("ours, without clipping", False)):
            awq = {"bits": 4, "group_size": size, "symmetric": False, "clip": clip}
            recipe = {
                "model": str(model),
                "output": str(scratch / f"ours-{clip}"),
                "calibration": {"samples": samples, "length": length, "sampling": "consecutive"},
                "passes": [{"awq": awq}],
                "verify": False,
            }
            (scratch / "recipe.yaml").write_text(json.dumps(recipe))
            ours = [sys.executable, "-m", "compressor", "run", str(scratch / "recipe.yaml")]
            rows[who] = timed([*ours, "--device", "cpu"], log, threads=options.threads)
        if options.peer:
            theirs = [options.peer, str(HERE / "peer_awq.py"), str(model), str(scratch / "theirs")]
            shape = [str(TEXT), str(samples), str(length), str(size)]
            other = timed([*theirs, *shape], log, threads=options.threads)
    told = {"threads": options.threads, "layers": options.layers}
    for who, row in rows.items():
        print(who, json.dumps({**row, **told}))
    if options.peer:
        print("llm-compressor", json.dumps({**other, **told}))
        for who, row in rows.items():
            ratios = [f"{key} {other[key] / row[key]:.2f}" for key in ("wall_s", "processor_s")]
            print(f"{who}: times as fast, {', '.join(ratios)}")


if __name__ == "__main__":
    main()

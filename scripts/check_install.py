"""Prove that the built wheel installs and runs, and that dependencies resolve.

    python scripts/check_install.py [--uv uv] [--run 3.11:highest 3.11:lowest-direct 3.12:highest]
        [--resolve 3.11 3.12 3.13 3.14] [--folder FOLDER]

For each Python of --resolve the newest and the oldest supported dependencies are resolved by uv,
without installing them. For each PYTHON:RESOLUTION of --run an empty environment gets the wheel
with its dependencies (several gigabytes), quantizes a small model of random weights, verifies it,
and runs again from the source tree with the wheel uninstalled. Exit code 1: something did not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOLD = ("torch", "transformers", "huggingface-hub", "tokenizers", "numpy", "click", "triton")
RESOLUTIONS = ("highest", "lowest-direct")


def run(*command: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    """stdout of a command. Raises RuntimeError with the end of its stderr where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout)[-1500:]}")
    return done.stdout


def resolve(uv: str, python: str, resolution: str) -> str:
    """What the dependencies would be, pinned."""
    options = ("--python-version", python, "--resolution", resolution, "--no-header", "-q")
    return run(uv, "pip", "compile", "pyproject.toml", *options)


def install_and_run(uv: str, wheel: Path, python: str, resolution: str, folder: Path) -> str:
    """Install into an empty environment, and do what a user does first; what is installed."""
    name = f"{python}-{resolution}"
    home, pins = folder / name, folder / f"{name}.txt"
    model, output = folder / f"{name}-model", folder / f"{name}-out"
    run(uv, "venv", "-q", "--python", python, home)
    pins.write_text(resolve(uv, python, resolution))
    run(uv, "pip", "install", "-q", "--python", home, "-c", pins, wheel, cwd=folder)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kept |= {"HF_HUB_OFFLINE": "1", "PATH": f"{home / 'bin'}{os.pathsep}{kept['PATH']}"}
    interpreter = home / "bin" / "python"

    def python_runs(*words: str | Path, cwd: Path = folder) -> str:
        return run(interpreter, *words, cwd=cwd, environment=kept)

    said = run(home / "bin" / "compress", "--version", cwd=folder, environment=kept).strip()
    stored = python_runs("-c", "import importlib.metadata as m; print(m.version('compressor'))")
    if stored.strip() not in said:
        raise RuntimeError(f"the metadata say {stored.strip()}, the program {said}")
    maker = ROOT / "scripts" / "make_random_model.py"
    python_runs(maker, model, "--shape", "tiny", "--layers", "2")
    small = ("--set", "calibration.samples=4", "--set", "evaluate.windows=2", "--device", "cpu")
    module = ("-m", "compressor")
    python_runs(*module, "quantize", model, "-o", output, "--scheme", "w4a16", *small)
    python_runs(*module, "verify", output, "--against", model)
    python_runs(*module, "recipes")
    found = run(uv, "pip", "freeze", "--python", home)
    run(uv, "pip", "uninstall", "-q", "--python", home, "compressor")
    python_runs(*module, "recipes", "smollm2-awq", cwd=ROOT)
    python_runs(*module, "eval", output, "--windows", "2", cwd=ROOT)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uv", default="uv")
    parser.add_argument("--resolve", nargs="*", default=["3.11", "3.12", "3.13", "3.14"])
    parser.add_argument("--run", nargs="*", default=["3.11:highest", "3.11:lowest-direct"])
    parser.add_argument("--folder", type=Path, help="for environments; temporary if not given")
    args = parser.parse_args()
    if shutil.which(args.uv) is None:
        parser.error(f"there is no {args.uv} here: pip install uv, or name it with --uv")
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(f"resolve {p}, {r}", resolve, (p, r)) for p in args.resolve for r in RESOLUTIONS]
        if args.run:
            run(args.uv, "build", "-q", "--wheel", "--out-dir", folder / "wheel")
            (wheel,) = (folder / "wheel").glob("*.whl")
            for entry in args.run:
                python, _, resolution = entry.partition(":")
                more = (wheel, python, resolution or "highest", folder)
                jobs.append((f"run {entry}", install_and_run, more))
        for what, job, given in jobs:
            try:
                found = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", job(args.uv, *given), re.M))
                print(f"{what}: {', '.join(f'{n} {found[n]}' for n in TOLD if n in found)}")
            except RuntimeError as error:
                print(f"{what}: FAILED\n{error}", flush=True)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

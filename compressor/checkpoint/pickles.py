"""Pickled weights (BLOOM, MPT, older Falcon) made into safetensors, a file at a time.

A pickle is a program. PyTorch's restricted loader runs only what makes tensors, in a process of its
own that may not write more than the weights or run for ever; that guards against accidents and
known tricks, and is no wall against a hole in that loader. So nothing else here reads pickles.
"""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from compressor.checkpoint.durable import make_folder
from compressor.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from compressor.checkpoint.safetensors import read_header
from compressor.checkpoint.side_files import side_files
from compressor.errors import InputError

PATTERNS = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
MEMORY = 8 << 30
"""Address space beside twice the file's size."""
SECONDS = 3600
"""Of one processor, for one file."""


def convert_pickles(
    folder: Path,
    output: Path,
    *,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Path]:
    """Write a folder's pickled weights as safetensors into `output`, a new folder, with the files
    beside them; the files written. Raises InputError for a file that the loader refuses."""
    found = {path.name: path for pattern in PATTERNS for path in folder.glob(pattern)}
    if not found:
        raise InputError(
            f"{folder} holds no {PATTERNS[0]}",
            hint="a folder of weights as transformers saved them",
        )
    if output.exists():
        raise InputError(f"{output} is there already", hint="name a new folder")
    work = output.with_name(f".{output.name}.converting")
    shutil.rmtree(work, ignore_errors=True)
    make_folder(work)
    try:
        written = _write(folder, work, found, progress)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    work.rename(output)
    return [output / path.name for path in written]


def _write(
    folder: Path,
    work: Path,
    found: Mapping[str, Path],
    progress: Callable[[str, int, int], None],
) -> list[Path]:
    written: list[Path] = []
    for number, name in enumerate(sorted(found), 1):
        progress(name, number, len(found))
        several = f"model-{number:05d}-of-{len(found):05d}.safetensors"
        written.append(work / (several if len(found) > 1 else SINGLE_NAME))
        load_pickle(found[name], written[-1])
    weight_map: dict[str, str] = {}
    for path in written:
        for tensor in read_header(path):
            if tensor in weight_map:
                raise InputError(f"{tensor} is in {weight_map[tensor]} and in {path.name}")
            weight_map[tensor] = path.name
    if len(written) > 1:
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (work / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    for carried in side_files(folder).carried:
        make_folder((work / carried).parent)
        shutil.copyfile(folder / carried, work / carried)
    if not (work / "config.json").is_file():
        shutil.copyfile(folder / "config.json", work / "config.json")
    return written


def load_pickle(source: Path, target: Path) -> None:
    """Write the tensors of one pickled file as safetensors. Raises InputError where the loader
    refuses it."""
    size = source.stat().st_size

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 * size + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * size + (1 << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    done = subprocess.run(
        [sys.executable, "-m", "compressor.checkpoint.unpickle", str(source), str(target)],
        preexec_fn=limits,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise InputError(
            f"{source.name} was not loaded: {said[-1] if said else f'ended by {done.returncode}'}",
            hint="the restricted loader takes tensors alone; a file that wants more is not loaded",
        )

"""`compress`, and `python -m compressor` from a source tree that is not installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

from compressor.cli.process import program


def find_leaves() -> None:
    """Let the packages beside this one be found where nothing was installed."""
    root = Path(__file__).resolve().parents[1]
    for folder, package in (("kernels", "_kernels"), ("calibration", "_calibration")):
        if find_spec(f"compressor{package}") is None:
            sys.path.append(str(root / folder))


if __name__ == "__main__":
    find_leaves()
    program()

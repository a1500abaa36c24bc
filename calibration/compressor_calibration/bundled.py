"""The texts that come with the package: two parts, of different works, in the public domain."""

from __future__ import annotations

from importlib import resources
from typing import Literal, get_args

Part = Literal["calibration", "held_out"]


def bundled_text(part: Part) -> str:
    """One of the bundled texts, whole. `text/README.md` says where they come from."""
    if part not in get_args(Part):
        raise ValueError(f"no bundled text {part!r}; there are {', '.join(get_args(Part))}")
    folder = resources.files("compressor_calibration.text")
    return (folder / f"{part}.txt").read_bytes().decode("utf-8")

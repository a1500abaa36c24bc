"""The texts that come with the package: for each kind two parts, of different works, in the public
domain."""

from importlib import resources
from typing import Literal, get_args

Part = Literal["calibration", "held_out"]
Kind = Literal["prose", "fiction", "technical", "code", "dialogue", "spanish"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BUNDLED = "bundled"
BUNDLED_NAMES: dict[str, Kind] = {f"{BUNDLED}/{kind}": kind for kind in KINDS}
"""What a recipe calls the text of one kind."""


def bundled_text(part: Part, kind: Kind) -> str:
    """One of the bundled texts, whole. `text/sources.md` says where they come from."""
    if part not in get_args(Part) or kind not in KINDS:
        raise ValueError(f"no bundled text {part}/{kind}; kinds are {', '.join(KINDS)}")
    folder = resources.files("compressor_calibration.text")
    return (folder / part / f"{kind}.txt").read_bytes().decode("utf-8")

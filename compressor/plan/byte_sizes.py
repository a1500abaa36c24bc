"""Bytes as people write them.

Imports nothing that takes time, since commands read their options first.
"""

import re
from typing import Any

SIZE_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_size(value: Any) -> Any:
    """Bytes from "5GB", "512MiB" or a number."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", value.upper())
        if not found:
            raise ValueError(f"{value!r} is not a size such as 5GB or 512MiB")
        return int(float(found[1]) * SIZE_UNITS[found[2] or ""])
    return value

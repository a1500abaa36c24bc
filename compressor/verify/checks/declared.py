"""The files that tell loaders what the weights are, key by key as they were written.

Their hashes tell that a byte changed. This says which keys did, also where a file was changed
together with its hash, or so that the checkpoint cannot be opened.
"""

from pathlib import Path

from compressor.checkpoint.manifest import DECLARED, Manifest
from compressor.verify.compare_config import declared_problems
from compressor.verify.findings import Findings


def check_declared(folder: Path, manifest: Manifest | None, found: Findings) -> None:
    """Add the check where the manifest has their content."""
    files = manifest.about.get(DECLARED) if manifest else None
    if manifest is None or not isinstance(files, dict) or not files:
        return
    known = {n: x for n, x in files.items() if n in manifest.files and isinstance(x, dict)}
    lost = sorted({*files} - {*known})
    problems = [f"{name} is noted, but not as a file of its own" for name in lost]
    problems += declared_problems(folder, known)
    found.add("config as written", problems, f"every key of {', '.join(known)}")

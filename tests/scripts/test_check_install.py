"""scripts/check_install.sh says so where dependencies do not resolve."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.scripts import ROOT


@pytest.mark.parametrize(("uv", "code"), [("echo torch==2.8.0", 0), ("exit 1", 1)])
def test_what_does_not_resolve_fails(uv: str, code: int, tmp_path: Path) -> None:
    program = tmp_path / "uv"
    program.write_text(f"#!/bin/sh\n{uv}\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / "scripts/check_install.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stdout.count("torch==2.8.0") == (0 if code else 8)

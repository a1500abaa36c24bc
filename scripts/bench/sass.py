"""What a compiled kernel issues: its machine code's main loop, counted."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MATRIX = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA")
INTEGER = ("LOP3", "SHF", "IADD3", "IMAD", "PRMT", "LEA", "VIADD", "ISETP", "SEL", "SGXT")


def launched(kernel: Any, run: Callable[[], object]) -> Any:
    """What a Triton function is compiled to, for this device, for its launch in `run`."""
    import torch

    compiled = kernel.device_caches[torch.cuda.current_device()][0]
    compiled.clear()  # from the disk it comes back, and alone
    run()
    return list(compiled.values())[-1]


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as text, by the disassembler that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool) if tool.exists() else "nvdisasm", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> list[str]:
    """Opcodes in order, with `:NAME` for a label and `>NAME` after a branch to one."""
    found = []
    for line in text.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            found.append(f":{label[1]}")
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            found.append(code[1])
            if target := re.search(r"BRA.*`\(\.(L_x_\d+)\)", line):
                found.append(f">{target[1]}")
    return found


def main_loop(text: str) -> Counter[str]:
    """Opcodes of the loop with the most matrix instructions, or of the longest; all where there is
    none."""
    codes = instructions(text)
    at = {code[1:]: place for place, code in enumerate(codes) if code[0] == ":"}
    bodies = [
        codes[at[code[1:]] : place]
        for place, code in enumerate(codes)
        if code[0] == ">" and at.get(code[1:], place) < place - 2  # a kernel ends in an empty loop
    ]

    def weight(body: list[str]) -> tuple[int, int]:
        return sum(code in MATRIX for code in body), len(body)

    body = max(bodies, key=weight, default=codes)
    return Counter(code for code in body if code[0] not in ":>" and code != "NOP")


def issued(kernel: Any, run: Callable[[], object], *, items: int) -> str:
    """Instructions of a thread, as `run` launches it, for each of the `items` that all threads of a
    program take in one step of the main loop, as a line: all, integer, and the most frequent."""
    compiled = launched(kernel, run)
    try:
        loop = main_loop(disassemble(compiled.asm["cubin"]))
    except (OSError, subprocess.CalledProcessError) as problem:
        return f"not counted: {problem}"  # without a disassembler, times are still worth having
    threads = 32 * compiled.metadata.num_warps
    every, integer = sum(loop.values()), sum(loop[code] for code in INTEGER)
    often = " ".join(f"{code} {count}" for code, count in loop.most_common(8))
    return (
        f"{every * threads / items:.3f} instructions ({integer * threads / items:.3f} integer); "
        f"a thread's step: {every}: {often}"
    )

"""What decides the last bits of a result and stands in no recipe.

Versions and the device's name belong to a run's fingerprint. The rest is named in the manifest and
in the report, and belongs to the fingerprint of a recipe that asks to be `reproducible`.
"""

import os
from importlib.metadata import PackageNotFoundError, version

import torch

from compressor import __version__

VERSIONED = ("torch", "transformers", "tokenizers", "triton")

EXTENSIONS = ("avx512_bf16", "avx512_fp16", "avx512_vnni", "sve", "sve2", "bf16", "i8mm")
MATRIX_UNITS = ("amx_bf16", "amx_fp16", "amx_int8", "sme")
"""What PyTorch and oneDNN choose other kernels for. Where products of bfloat16 are quick, errors
that searches compare (`numerics.gram`) and blocks that calibrate are made of them."""

VARIABLES = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
GPU_VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE")
"""Variables by which the libraries choose their kernels, and so the order of sums."""


def versions() -> dict[str, str]:
    """Installed versions of what decides numbers."""
    found = {"compressor": __version__}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The kind of GPU, or the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def environment(device: torch.device) -> dict[str, str]:
    """What this process computes with, as far as it changes bytes.

    Threads count: Cholesky factors, inverses and sums over whole tensors are split among them.
    """
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    instructions = [torch.backends.cpu.get_cpu_capability()]
    instructions += [name for name in EXTENSIONS if known.get(name)]
    found = {
        "processor": str(known.get("cpu_name", known.get("architecture", "unknown"))),
        "instructions": " ".join(instructions),
        "matrix units": " ".join(name for name in MATRIX_UNITS if known.get(name)) or "none",
        "threads": str(torch.get_num_threads()),
    }
    names = list(VARIABLES)
    if device.type == "cuda":
        names += GPU_VARIABLES
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found | {name: os.environ[name] for name in names if name in os.environ}

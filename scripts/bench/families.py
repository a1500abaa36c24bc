"""Benchmark the kernels for low-bit weights, inputs and caches on the current CUDA device.

    python scripts/bench/families.py                          # every family
    python scripts/bench/families.py --families int8 fp8      # some
    python scripts/bench/families.py --no-sweep               # the shipped tiles only

Families: w4a16, nvfp4, w4a8, int8, fp8, inputs (activation quantizers), cache (decode attention).
Times come from CUDA graphs that rotate over more memory than the L2 cache holds; peers and the
copy bandwidth are measured in the same run. Each kernel is checked against its reference first: a
wrong one has no figure, and the exit status is 1. Sweeps print candidates beside the shipped
choice, which is a fixed table. With OUT set, figures go to OUT/kernels.json too.
"""

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import asdict

import gemm_families as gemm
import memory_families as memory
import torch
from rows import RED, Row, table
from timing import copy_gbps, save

FAMILIES: dict[str, Callable[[float, bool], list[Row]]] = {
    "int8": gemm.int8,
    "fp8": gemm.fp8,
    "inputs": memory.inputs,
    "w4a16": memory.w4a16_family,
    "nvfp4": memory.nvfp4_family,
    "w4a8": memory.w4a8_family,
    "cache": memory.cache,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--no-sweep", dest="sweep", action="store_false")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    import triton

    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, "Triton", triton.__version__)
    ceiling = copy_gbps()
    print(f"device copy {ceiling:,.0f} GB/s, read plus written")
    rows: list[Row] = []
    for name in arguments.families:
        print(f"\n{name}: correctness", flush=True)
        try:
            rows += FAMILIES[name](ceiling, arguments.sweep)
        except Exception:  # the other families still have their say
            traceback.print_exc()
            RED.append(name)
        torch.cuda.empty_cache()
    print(table(rows))
    save("kernels.json", {"copy_gbps": ceiling, "rows": [asdict(row) for row in rows]})
    missed = [row.kernel for row in rows if row.verdict == "MISSED"]
    print(json.dumps({"targets missed": missed, "red": RED}))
    raise SystemExit(1 if RED else 0)


if __name__ == "__main__":
    main()

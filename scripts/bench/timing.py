"""Timing shared by the benchmark scripts: CUDA graphs, medians, and the copy-bandwidth ceiling."""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def graph_ms(run: Callable[[], object], *, repeats: int = 20, inner: int = 1) -> float:
    """Median milliseconds of one `run`, replayed from a CUDA graph that holds `inner` of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            run()
    return median_ms(graph.replay, repeats=repeats) / inner


def median_ms(run: Callable[[], object], *, repeats: int = 20) -> float:
    """Median milliseconds of `run` on the current stream, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def copy_gbps() -> float:
    """Device-to-device copy of 4 GiB in GB/s, bytes read plus bytes written.

    Without a graph: as a node of one, a copy moved 2.75 TB/s on a device whose kernels moved 3.98.
    """
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e6


def relative_error(out: Tensor, want: Tensor) -> float:
    """||out - want|| / ||want|| in fp32; NaN if either holds one."""
    out, want = out.float(), want.float()
    return ((out - want).norm() / want.norm()).item()


def require(what: str, error: float, limit: float) -> None:
    """Stop the benchmark if a kernel is wrong: a wrong kernel has no speed."""
    print(f"  {what:<58} error {error:.2e} (limit {limit:.0e})", flush=True)
    if not error <= limit:
        raise SystemExit(f"{what}: error {error:.3e} is over {limit:.0e}; no timings reported")


def save(name: str, results: object) -> None:
    """Write `results` as JSON into the folder that the environment variable OUT names, if set."""
    if folder := os.environ.get("OUT"):
        Path(folder, name).write_text(json.dumps(results, indent=1))

"""Timing by CUDA graphs, and the bandwidth that a copy reaches and memory could have."""

import statistics
from collections.abc import Callable

import torch


def per_call_us(run: Callable[[int], object], *, sets: int, repeats: int = 20) -> float:
    """Median microseconds of `run(i)`, from a CUDA graph that holds one call for each of `sets`
    sets of tensors (of quick calls with one set, up to eight)."""
    calls = sets if sets > 1 else max(1, min(8, int(4 / median_ms(lambda: run(0), repeats=1))))

    def all_sets() -> None:
        for i in range(calls):
            run(i % sets)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_sets()
    return median_ms(graph.replay, repeats=repeats) * 1e3 / calls


def median_ms(run: Callable[[], object], *, repeats: int) -> float:
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
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), repeats=20) / 1e6


def peak_gbps() -> float:
    """What the device's memory could move by its clock and the width of its bus, in GB/s; NaN where
    the driver tells neither."""
    device = torch.cuda.get_device_properties()
    clock = getattr(device, "memory_clock_rate", float("nan"))  # kHz, two transfers each
    return 2 * clock * getattr(device, "memory_bus_width", 0) / 8 / 1e6

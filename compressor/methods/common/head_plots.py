"""Pictures of heads, as PNG files. They need matplotlib, which is an extra: without it, none."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def heat_map(values: Tensor, *, title: str, across: str = "KV head") -> bytes | None:
    """A PNG of values [layers, heads]; None where matplotlib is not installed."""
    plt = _pyplot()
    if plt is None:
        return None
    layers, heads = values.shape
    figure, axes = plt.subplots(figsize=(1.5 + 0.35 * max(heads, 6), 1.5 + 0.22 * max(layers, 8)))
    shown = axes.imshow(values.numpy(), vmin=0, vmax=max(1.0, float(values.max())), cmap="viridis")
    axes.set(xlabel=across, ylabel="layer", title=title)
    axes.set_xticks(range(0, heads, max(1, heads // 8)))
    axes.set_yticks(range(0, layers, max(1, layers // 8)))
    figure.colorbar(shown, ax=axes, fraction=0.05)
    return _png(plt, figure)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    log: bool = False,
) -> bytes | None:
    """A PNG of named lines of (x, y); None where matplotlib is not installed."""
    plt = _pyplot()
    if plt is None:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None)
    axes.set(xlabel=x, ylabel=y, title=title)
    if log and all(any(value > 0 for _, value in points) for points in lines.values()):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(plt, figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(plt: Any, figure: Any) -> bytes:
    held = io.BytesIO()
    # No date and no version, so that equal pictures are equal files.
    figure.savefig(held, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return held.getvalue()

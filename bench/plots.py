"""Plots of records as SVG, one for light and one for dark pages. matplotlib draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.record import Record

THEMES = {"light": "default", "dark": "dark_background"}


def draw(records: list[Record], stem: Path) -> list[Path]:
    """Write `<stem>-light.svg` and `<stem>-dark.svg`: a panel per op, a line per backend, batch sizes along x.

    The first model and dtype of the records, and one K. Times are absolute if they come from a GPU. Otherwise they are
    divided by that of the op's first backend: a CPU's microseconds say nothing about anybody else's.

    Raises
    ------
    ValueError
        If there are no records, or matplotlib is missing.
    """
    if not records:
        raise ValueError("no records to plot; run `python -m bench micro --out DIR` first")
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("svg")
    from matplotlib import pyplot

    chosen = [r for r in records if r.model == records[0].model and r.shape.get("K", 64) == _keep(records)]
    ops = list(dict.fromkeys(r.op for r in chosen))
    backends = list(dict.fromkeys(r.backend for r in chosen))
    written = []
    for theme, style in THEMES.items():
        with pyplot.style.context([style, {"svg.hashsalt": "vtc", "font.size": 9}]):
            figure, axes = pyplot.subplots(1, len(ops), figsize=(3.2 * len(ops), 3.4), squeeze=False)
            for panel, op in zip(axes[0], ops, strict=True):
                _panel(panel, [r for r in chosen if r.op == op], backends)
            handles = {
                label: h for panel in axes[0] for h, label in zip(*panel.get_legend_handles_labels(), strict=True)
            }
            figure.suptitle(f"{chosen[0].model}, {chosen[0].gpu or 'CPU'}")
            figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(backends), frameon=False)
            figure.tight_layout(rect=(0, 0.08, 1, 1))
            path = stem.with_name(f"{stem.name}-{theme}.svg")
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, transparent=True, metadata={"Date": None})
            pyplot.close(figure)
            written.append(path)
    return written


def _keep(records: list[Record]) -> int:
    """The K that most records have, for a plot has room for one."""
    keeps = [r.shape["K"] for r in records if "K" in r.shape]
    return max(sorted(set(keeps)), key=keeps.count, default=64)


def _panel(panel: Any, records: list[Record], backends: list[str]) -> None:
    records = [r for r in records if r.dtype == records[0].dtype]
    on_gpu = records[0].device == "cuda"
    first = {r.shape["B"]: r.ms_50 for r in records if r.backend == records[0].backend}
    for number, backend in enumerate(backends):
        points = sorted(
            (r.shape["B"], 1e3 * r.ms_50 if on_gpu else r.ms_50 / first[r.shape["B"]])
            for r in records
            if r.backend == backend and (on_gpu or r.shape["B"] in first)
        )
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{number}", label=backend)
    sizes = sorted({r.shape["B"] for r in records})
    panel.set(title=records[0].op, xlabel="batch", xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
    panel.set_ylabel("microseconds" if on_gpu else f"time / {records[0].backend}'s")
    panel.minorticks_off()
    panel.grid(alpha=0.3)

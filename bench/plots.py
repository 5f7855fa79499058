"""Plots of records as SVG, one for light and one for dark pages. matplotlib draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record import Record
from vtc.files import replacing

if TYPE_CHECKING:
    from bench.quality import Quality

THEMES = {"light": "default", "dark": "dark_background"}


def draw(records: list[Record], stem: Path) -> list[Path]:
    """Write `<stem>-light.svg` and `<stem>-dark.svg`: a panel per op, a line per backend, batch sizes along x.

    It shows the first model and dtype of the records, and one K. Times from a GPU are absolute. Times from a CPU, which
    say nothing about other CPUs, are divided by that of the op's first backend.

    Raises
    ------
    ValueError
        If there are no records, or matplotlib is missing.
    """
    if not records:
        raise ValueError("no records to plot; run `python -m bench micro --out DIR` first")
    chosen = [r for r in records if r.model == records[0].model and r.shape.get("K", 64) == _keep(records)]
    ops = list(dict.fromkeys(r.op for r in chosen))
    backends = list(dict.fromkeys(r.backend for r in chosen))

    def paint(pyplot: Any) -> None:
        figure, axes = pyplot.subplots(1, len(ops), figsize=(3.2 * len(ops), 3.4), squeeze=False)
        for panel, op in zip(axes[0], ops, strict=True):
            _panel(panel, [r for r in chosen if r.op == op], backends)
        handles = {label: h for panel in axes[0] for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.suptitle(f"{chosen[0].model}, {chosen[0].gpu or 'CPU'}")
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(backends), frameon=False)
        figure.tight_layout(rect=(0, 0.08, 1, 1))

    return _save(stem, paint)


def draw_quality(records: list[Quality], stem: Path) -> list[Path]:
    """Write `<stem>-light.svg` and `<stem>-dark.svg`: accuracy over the tokens left, a line per method, 95 % intervals.

    The first record is that of all tokens, drawn as a horizontal line.

    Raises
    ------
    ValueError
        If matplotlib is missing.
    """
    full, compared = records[0], [r for r in records[1:] if not r.swept]
    keeps = sorted({r.keep for r in compared})

    def paint(pyplot: Any) -> None:
        figure, panel = pyplot.subplots(figsize=(8.0, 4.2))
        panel.axhline(100 * full.accuracy[0], color="gray", linestyle="--", linewidth=1, label=full.name)
        for number, name in enumerate(dict.fromkeys(r.name for r in compared)):
            mine = sorted((r for r in compared if r.name == name), key=lambda r: r.tokens)
            shares, lows, highs = zip(*(r.accuracy for r in mine), strict=True)
            errors = [
                [100 * (s - low) for s, low in zip(shares, lows, strict=True)],
                [100 * (high - s) for s, high in zip(shares, highs, strict=True)],
            ]
            x = [r.tokens for r in mine]
            panel.errorbar(
                x, [100 * s for s in shares], yerr=errors, marker="o", markersize=4, capsize=2, color=f"C{number}",
                label=name,
            )  # fmt: skip
        panel.set(xlabel="visual tokens", ylabel="right answers, %", xscale="log", xticks=keeps, xticklabels=keeps)
        panel.set_title(f"Bundled model, {full.questions} held-out questions")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()

    return _save(stem, paint)


def _save(stem: Path, paint: Callable[[Any], None]) -> list[Path]:
    """The figure that `paint` makes with pyplot, once for each theme; ValueError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("svg")
    from matplotlib import pyplot

    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for theme, style in THEMES.items():
        with pyplot.style.context([style, {"svg.hashsalt": "vtc", "font.size": 9}]):
            paint(pyplot)
            written.append(stem.with_name(f"{stem.name}-{theme}.svg"))
            with replacing(written[-1]) as made:
                pyplot.savefig(made, transparent=True, metadata={"Date": None})
            pyplot.close()
    return written


def _keep(records: list[Record]) -> int:
    """The K that most records have, because a plot has room for one."""
    keeps = [r.shape["K"] for r in records if "K" in r.shape]
    return max(sorted(set(keeps)), key=keeps.count, default=64)


def _panel(panel: Any, records: list[Record], backends: list[str]) -> None:
    records = [r for r in records if r.dtype == records[0].dtype]
    on_gpu = records[0].device == "cuda"
    first = {r.shape["B"]: r.ms for r in records if r.backend == records[0].backend}
    for number, backend in enumerate(backends):
        points = sorted(
            (r.shape["B"], 1e3 * r.ms if on_gpu else r.ms / first[r.shape["B"]])
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

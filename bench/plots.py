"""Plots of records as SVG, one for light and one for dark pages. matplotlib draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record import Record
from vtc.files import replacing

if TYPE_CHECKING:
    from bench.quality import Quality

PANELS_ACROSS = 3
SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)  # the ticks of accuracies
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
    """Write `<stem>-light.svg` and `<stem>-dark.svg`: accuracy over token·layers, a panel per group of methods.

    A panel has its group's methods in colours, with 95 % intervals, and all other methods in gray. The first record is
    that of all tokens, drawn as a dashed line. The logit scale shows differences near 100 % and near 50 % alike.

    Raises
    ------
    ValueError
        If matplotlib is missing.
    """
    full, compared = records[0], [r for r in records[1:] if not r.swept]
    groups: dict[str, list[str]] = {}
    for r in compared:
        names = groups.setdefault(r.group, [])
        if r.name not in names:
            names.append(r.name)
    lines = {
        name: sorted((r for r in compared if r.name == name), key=lambda r: r.token_layers)
        for names in groups.values()
        for name in names
    }

    def paint(pyplot: Any) -> None:
        down = -(-len(groups) // PANELS_ACROSS)
        figure, panels = pyplot.subplots(
            down, PANELS_ACROSS, figsize=(11.0, 3.3 * down), squeeze=False, sharex=True, sharey=True
        )
        for panel, (group, names) in zip(panels.flat, groups.items(), strict=False):
            panel.axhline(full.accuracy[0], color="gray", linestyle="--", linewidth=1)
            for name in (name for name in lines if name not in names):
                panel.plot(*_accuracies(lines[name]), color="gray", alpha=0.25, linewidth=0.8)
            for number, name in enumerate(names):
                _quality_line(panel, lines[name], f"C{number}")
            panel.legend(loc="best", fontsize=7, framealpha=0.6, handlelength=1.2, labelspacing=0.25)
            panel.set_title(group)
            panel.grid(alpha=0.3)
        for panel in panels.flat[len(groups) :]:
            panel.remove()
        ticks: list[int] = []
        for keep in sorted({r.keep for r in compared if r.token_layers == r.keep} | {round(full.token_layers)}):
            ticks += [keep] if not ticks or keep > 1.6 * ticks[-1] else []  # so that their labels do not touch
        for panel in panels.flat[: len(groups)]:
            panel.set(xscale="log", xticks=ticks, xticklabels=ticks, xlim=(ticks[0] / 1.2, ticks[-1] * 1.15))
            panel.set(yscale="logit", yticks=SHARES, yticklabels=[f"{100 * share:g}" for share in SHARES])
            panel.tick_params(labelbottom=True)
            panel.minorticks_off()
        figure.supxlabel("visual tokens, mean over the layers of the language model")
        figure.supylabel("right answers, %")
        figure.suptitle(f"Bundled model, {full.questions} held-out questions; dashed: all tokens; gray: other panels")
        figure.tight_layout()

    return _save(stem, paint)


def _accuracies(records: list[Quality]) -> tuple[list[float], list[float]]:
    return [r.token_layers for r in records], [r.accuracy[0] for r in records]


def _quality_line(panel: Any, records: list[Quality], color: str) -> None:
    """One method: its accuracies with 95 % intervals."""
    x, shares = _accuracies(records)
    lows, highs = ([abs(r.accuracy[end] - r.accuracy[0]) for r in records] for end in (1, 2))
    name = records[0].name
    panel.errorbar(
        x, shares, yerr=[lows, highs], marker="o", markersize=3, capsize=2, linewidth=1.2, color=color, label=name
    )


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

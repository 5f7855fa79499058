"""Plots of results as PNG: accuracy over visual tokens, and over time. matplotlib draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vtc.eval import published
from vtc.eval.result import Result
from vtc.eval.rows import common_and_rest, conditions, incomplete, rows_of, tasks_of, time_conditions
from vtc.eval.setting import FLOOR, NONE
from vtc.eval.tables import FULL_TOKENS, HEADERS
from vtc.files import replacing

ACROSS = 4  # panels side by side
BASELINES = {NONE: ("black", "--"), FLOOR: ("gray", ":")}


class Point(NamedTuple):
    """One result in a panel."""

    line: str  # what the legend says
    tokens: float
    value: float
    result: Result


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write `accuracy-over-tokens.png` and `accuracy-over-time.png`; returns their paths.

    One panel for each task that has figures, one line for each method. Hollow markers are published figures. Crosses
    are runs that are partial, sampled, or without some questions. If there are several models, each has its own files,
    which end in its name.

    Raises
    ------
    ValueError
        If no result has a figure, or matplotlib is missing.
    """
    drawn = [r for r in results if r.main is not None and r.main.value is not None]
    if not drawn:
        raise ValueError("no result has a figure to plot; run a task that is scored without a server")
    matplotlib = require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    models = list(dict.fromkeys(r.model for r in drawn))
    files = []
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for number, model in enumerate(models, start=1):
            end = "" if len(models) == 1 else f"-{number}-{Path(model).name}"
            for over in ("tokens", "time"):
                files.append(folder / f"accuracy-over-{over}{end}.png")
                with replacing(files[-1]) as made:
                    _figure([r for r in drawn if r.model == model], over).savefig(made, dpi=150)
    return files


def require_matplotlib() -> Any:
    """The module. Raises ValueError if it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'vtc-cls[eval]'") from error
    return matplotlib


def _figure(results: list[Result], over: str) -> Any:
    from matplotlib.figure import Figure  # without pyplot, which wants a display and keeps every figure

    tasks = tasks_of(results)
    common, panels_points = _points(results, tasks, conditions if over == "tokens" else time_conditions)
    every = [point for points in panels_points for point in points]
    compared = dict.fromkeys(point.line for point in every if point.result.method not in BASELINES)
    styles = {line: (f"C{number % 10}", "osD^v"[number // 10 % 5]) for number, line in enumerate(compared)}
    across = min(ACROSS, len(tasks))
    down = math.ceil(len(tasks) / across)
    width = max(6.0, 3.1 * across)
    columns = int(width / 1.5)  # of the legend
    legend = math.ceil((len(styles) + 4) / columns)  # its lines: four more for the baselines and the special markers
    height = (3.4 if len(tasks) == 1 else 2.7 * down) + 0.6 + 0.2 * legend
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{results[0].model}\n{common}", fontsize=10)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for task, panel, points in zip(tasks, panels, panels_points, strict=False):
        _panel(panel, points, styles, over)
        panel.set_title(HEADERS.get(task, points[0].result.title))
        panel.grid(alpha=0.25)
    for panel in panels[len(tasks) :]:
        panel.remove()
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _points(
    results: list[Result], tasks: list[str], conditions_of: Callable[[Result], dict[str, str]]
) -> tuple[str, list[list[Point]]]:
    """The conditions that all results share, and the points of each task."""
    rows = [rows_of([r for r in results if r.task == task]) for task in tasks]
    common, rest = common_and_rest([conditions_of(row.first) for of_task in rows for row in of_task])
    ends = iter(rest)
    points: list[list[Point]] = []
    for of_task in rows:
        points.append([])
        for row in of_task:
            r, line = row.first, row.name + next(ends)
            assumed = {NONE: FULL_TOKENS, FLOOR: 0}.get(row.method, row.keep or 0)
            tokens = assumed if r.visual_tokens is None else r.visual_tokens
            value = r.main.value if r.main else None
            if value is not None:
                points[-1].append(Point(line, tokens, value, r))
    return common, points


def _panel(panel: Any, points: list[Point], styles: dict[str, tuple[str, str]], over: str) -> None:
    def x(point: Point) -> float:
        return point.tokens if over == "tokens" else 1e3 * point.result.timing.generate_seconds

    for line in dict.fromkeys(point.line for point in points):
        mine = sorted((p for p in points if p.line == line), key=lambda p: p.tokens)
        if line in styles:
            color, marker = styles[line]
            style = f"{marker}-"
        else:
            color, dash = BASELINES[mine[0].result.method]
            style = "*"
            if over == "tokens":
                for point in mine:
                    panel.axhline(point.value, color=color, linestyle=dash, linewidth=1, label=line)
                continue
        panel.plot([x(p) for p in mine], [p.value for p in mine], style, color=color, markersize=5, label=line)
    if marked := [p for p in points if incomplete(p.result) and x(p)]:  # a log scale has no place for no token
        panel.plot([x(p) for p in marked], [p.value for p in marked], "x", color="red", label="incomplete", zorder=4)
    panel.set_ylabel(f"{points[0].result.main_name}, %")
    if over == "tokens":
        _published(panel, points, styles)
        _token_axis(panel, points)
    else:
        panel.set_xlabel("generation, ms per question")
        panel.set_xlim(left=0)


def _published(panel: Any, points: list[Point], styles: dict[str, tuple[str, str]]) -> None:
    """Hollow markers in the colours of the methods."""
    r = points[0].result
    size = published.size_of(r.model)
    methods = {p.result.method: p.line for p in reversed(points)}
    for p in published.PUBLISHED:
        if (p.task, p.size, p.same) == (r.task, size, True) and p.method in methods and p.keep != 0:
            color, marker = styles.get(methods[p.method], ("black", "o"))
            panel.plot(p.keep or FULL_TOKENS, p.value, marker, color=color, markerfacecolor="none", markersize=7)
            panel.plot([], [], "o", color="gray", markerfacecolor="none", markersize=7, label="published")


def _token_axis(panel: Any, points: list[Point]) -> None:
    """Tokens on a log scale, a tick for each number that was asked for and for all tokens."""
    asked = {keep for p in points if isinstance(keep := p.result.options.get("keep"), int)}
    ticks = sorted(asked | {round(p.tokens) for p in points if p.result.method == NONE})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("visual tokens")

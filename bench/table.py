"""Tables of records, as Markdown that is readable in a terminal. Nothing is filtered out, losses included."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from bench.record import Record


def shape_text(shape: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def grouped(records: list[Record]) -> list[tuple[tuple[str, ...], list[Record]]]:
    """Records by op, model and dtype, in the order of first appearance."""
    keys = list(dict.fromkeys((r.op, r.model, r.dtype) for r in records))
    by_key = sorted(records, key=lambda r: keys.index((r.op, r.model, r.dtype)))
    return [(key, list(group)) for key, group in groupby(by_key, key=lambda r: (r.op, r.model, r.dtype))]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [columns, rule, *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def case(record: Record) -> tuple[Any, ...]:
    """The key of records to compare: everything but the number of visual tokens, which differs between variants."""
    shape = tuple((name, size) for name, size in record.shape.items() if name != "visual")
    return (record.op, record.model, record.dtype, shape)


def row(record: Record, others: dict[str, Record | None], floors: bool) -> list[str]:
    """`others`: the records of the same case, by backend. `floors`: whether the table has columns for the floor."""
    peak = "" if record.peak_bytes is None else f"{record.peak_bytes / 2**20:.1f}"
    device = (record.device_ms_20, record.device_ms_50, record.device_ms_80)
    times = [f"{ms * 1e3:.1f}" for ms in (record.ms_20, record.ms_50, record.ms_80)]
    times += ["" if ms is None else f"{ms * 1e3:.1f}" for ms in device]
    rate = [f"{record.gb_per_s:.1f}", f"{100 * record.copy_share:.1f}"]
    if floors:
        rate += ["", ""] if record.floor_ms is None else [f"{record.floor_ms * 1e3:.1f}", record.bound or ""]
    backend = record.backend if record.sdpa is None else f"{record.backend} ({record.sdpa})"
    ratios = ["" if other is None or other is record else f"{other.ms / record.ms:.2f}" for other in others.values()]
    return [shape_text(record.shape), backend, *times, *rate, peak, *ratios]


def tables(records: list[Record]) -> str:
    """One table per op, model and dtype.

    The last columns are the row's speed-up against each of the others, by the device's medians where there are any.
    """
    parts = []
    for (op, model, dtype), group in grouped(records):
        baselines = list(dict.fromkeys(r.backend for r in group))
        columns = ["shape", "backend", "20 % us", "50 % us", "80 % us"]
        columns += ["device 20 %", "device 50 %", "device 80 %", "GB/s", "% of copy"]
        floors = any(r.floor_ms is not None for r in group)
        columns += ["floor us", "bound by", "peak MiB"] if floors else ["peak MiB"]
        columns += [f"x {name}" for name in baselines]
        rows = []
        for r in group:
            same = {other.backend: other for other in group if case(other) == case(r)}
            rows.append(row(r, {name: same.get(name) for name in baselines}, floors))
        parts.append(f"{op}, {model}, {dtype}\n\n" + markdown(columns, rows))
    return "\n\n".join(parts)


def provenance_line(record: Record) -> str:
    where = f"{record.gpu}, driver {record.driver}" if record.gpu else record.device
    revision = f"{(record.revision or 'no git')[:12]}{' + changes' if record.dirty else ''}"
    return (
        f"{where}, copy {record.copy_gb_per_s:.0f} GB/s, torch {record.torch}, triton {record.triton}, "
        f"transformers {record.transformers}, {revision}, {record.date}"
    )

"""Tables of records, Markdown that is readable in a terminal. Nothing is filtered: losses are rows like others."""

from __future__ import annotations

from itertools import groupby

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


def row(record: Record, baselines: list[str]) -> list[str]:
    peak = "" if record.peak_bytes is None else f"{record.peak_bytes / 2**20:.1f}"
    times = [f"{ms * 1e3:.1f}" for ms in (record.ms_20, record.ms_50, record.ms_80)]
    speedups = [f"{record.speedup[name]:.2f}" if name in record.speedup else "" for name in baselines]
    rate = [f"{record.gb_per_s:.1f}", f"{100 * record.copy_share:.1f}"]
    return [shape_text(record.shape), record.backend, *times, *rate, peak, *speedups]


def tables(records: list[Record]) -> str:
    """One table per op, model and dtype. The last columns are the row's speed-up against each of the others."""
    parts = []
    for (op, model, dtype), group in grouped(records):
        baselines = list(dict.fromkeys(r.backend for r in group))
        columns = ["shape", "backend", "20 % us", "50 % us", "80 % us", "GB/s", "% of copy", "peak MiB"]
        columns += [f"x {name}" for name in baselines]
        parts.append(f"{op}, {model}, {dtype}\n\n" + markdown(columns, [row(r, baselines) for r in group]))
    return "\n\n".join(parts)


def provenance_line(record: Record) -> str:
    where = f"{record.gpu}, driver {record.driver}" if record.gpu else record.device
    revision = f"{(record.revision or 'no git')[:12]}{' + changes' if record.dirty else ''}"
    return (
        f"{where}, copy {record.copy_gb_per_s:.0f} GB/s, torch {record.torch}, triton {record.triton}, "
        f"transformers {record.transformers}, {revision}, {record.date}"
    )

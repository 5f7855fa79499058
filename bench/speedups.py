"""VTC's times against the others', one line for each operation or stage, and the table of first tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from bench import roofline, table
from bench.record import Record
from bench.stages import config_of
from bench.workloads.base import NEED_GPU

HOST_BOUND = 1.25


def _best(records: Iterable[Record]) -> Record | None:
    return min(records, key=lambda r: r.ms, default=None)


def operations(records: list[Record]) -> list[tuple[str, float]]:
    """One line for each operation, model and dtype: VTC's best against the best of the others, at each batch size."""
    lines = []
    for (op, model, dtype), group in table.grouped([r for r in records if r.suite == "micro"]):
        cases, ratios = [], []
        for case in dict.fromkeys(table.case(r) for r in group):
            same = [r for r in group if table.case(r) == case]
            ours = _best(r for r in same if r.backend in NEED_GPU)
            other = _best(r for r in same if r.backend not in NEED_GPU)
            if ours and other and (ours.shape.get("K", 64) == 64 or ours.device != "cuda"):
                ratios.append(other.ms / ours.ms)
                cases.append(
                    f"B={ours.shape['B']} {ratios[-1]:.2f}x ({ours.backend} {1e3 * ours.ms:.1f} us, {other.backend} "
                    f"{1e3 * other.ms:.1f}; host {other.ms_50 / ours.ms_50:.2f}x)"
                )
        if cases:
            lines.append((f"{op} {model} {dtype}: {', '.join(cases)}", min(ratios)))
    return lines


def blocks(records: list[Record]) -> list[tuple[str, float]]:
    """At each batch size the best blocks of `cls_attention`, the shipped ones, and SDPA with and without scores."""
    lines = []
    for case in dict.fromkeys(table.case(r) for r in records if r.suite == "attention"):
        same = {r.backend: r for r in records if r.suite == "attention" and table.case(r) == case}
        best = _best(r for name, r in same.items() if name.startswith("triton "))
        if best:
            times = [
                f"{name} {1e3 * same[name].ms:.1f}"
                for name in ("triton", "sdpa", "sdpa+cls_probs", "sdpa+row_scores")
                if name in same
            ]
            base = same.get("sdpa+cls_probs", same.get("sdpa+row_scores", best))
            text = f"cls_attention blocks B={best.shape['B']}: best {best.backend} {1e3 * best.ms:.1f} us"
            lines.append((f"{text} ({', '.join(times)})", base.ms / best.ms))
    return lines


def models(records: list[Record]) -> list[tuple[str, float]]:
    """The whole model: VTC against stock, one line for each stage and variant; and what its graphs would take."""
    names = dict.fromkeys(r.model for r in records)
    return [line for name in names for line in _model(name, [r for r in records if r.model == name])]


def _model(name: str, records: list[Record]) -> list[tuple[str, float]]:
    lines = []
    found = {(r.op, r.backend, r.shape["B"]): r for r in records}
    variants = dict.fromkeys(
        r.backend for r in records if r.backend.startswith("vtc") or r.backend.endswith(", graphs")
    )
    for variant in variants:
        stock = variant.replace(variant.partition(",")[0], "sdpa")
        for op in dict.fromkeys(r.op for r in records):
            pairs = [
                (batch, found[op, stock, batch], ours)
                for (stage, backend, batch), ours in found.items()
                if (stage, backend) == (op, variant) and (op, stock, batch) in found
            ]
            cases, ratios = [], []
            for batch, other, ours in pairs:
                host = ours.speedup_50 or other.ms_50 / ours.ms_50  # taken in turn, if it was
                stock_ms = host * ours.ms if ours.device_ms_50 is None else other.ms
                ratios.append(stock_ms / ours.ms)
                cases.append(
                    f"B={batch} {stock_ms:.2f} -> {ours.ms:.2f} ms = {ratios[-1]:.2f}x"
                    + ("" if ours.device_ms_50 is None else f" (host {host:.2f}x)")
                )
            if cases:
                kind = "host: " if pairs[0][2].device_ms_50 is None else ""
                lines.append((f"{name} {variant}, {op}: {kind}{', '.join(cases)}", min(ratios)))
        cases, ratios = [], []
        for batch in dict.fromkeys(batch for _, _, batch in found):
            both = [_as_graphs(found, backend, batch) for backend in (stock, variant)]
            if all(both):
                ratios.append(both[0] / both[1])
                cases.append(f"B={batch} {both[0]:.2f} -> {both[1]:.2f} ms = {ratios[-1]:.2f}x")
        if cases:
            lines.append((f"{name} {variant}, vision + projector + prefill as graphs: {', '.join(cases)}", min(ratios)))
    return lines


def first_tokens(records: list[Record]) -> str:
    """A table of the time to the first token: how many times as long the stock model takes, by batch size."""
    batches = dict.fromkeys(r.shape["B"] for r in records)
    rows = []
    for model in dict.fromkeys(r.model for r in records):
        found = {(r.op, r.backend, r.shape["B"]): r for r in records if r.model == model}
        names = dict.fromkeys(name for op, name, _ in found if op == "first token" and name.startswith("vtc"))
        for name in names:
            start = [model, name.removeprefix("vtc ")]
            firsts = [found.get(("first token", name, batch)) for batch in batches]
            called = [first.speedup_50 if first else None for first in firsts]
            pairs = [[_as_graphs(found, variant, batch) for variant in ("sdpa", name)] for batch in batches]
            alone = [stock / ours if stock and ours else None for stock, ours in pairs]
            for kind, ratios in (("model(...)", called), ("GPU time only", alone)):
                rows.append([*start, kind, *(f"{ratio:.2f}x" if ratio else "" for ratio in ratios)])
    return table.markdown(["model", "tokens", "what is timed", *(f"B = {batch}" for batch in batches)], rows)


def new_lengths(records: list[Record]) -> str:
    """A table of prompts of a new length, and of generation: VTC against the stock model, with and without cuDNN."""
    names = {"first token, new length": "model(...), a new length each time"}
    names |= {r.op: r.op.replace("generate", "generate(...)") for r in records if r.op.startswith("generate")}
    rows = []
    for r in records:
        if r.op in names and r.speedup_50:
            variant, _, without = r.backend.partition(", ")
            sizes = [r.model, str(r.shape["B"]), variant.removeprefix("vtc "), names[r.op], "no" if without else "yes"]
            times = (r.speedup_50 * r.ms_50, r.ms_50)  # the stock model's, from the samples taken in turn
            rows.append([*sizes, *(f"{ms:.0f}" for ms in times), f"{r.speedup_50:.2f}x"])
    columns = ["model", "B", "tokens", "what is timed", "cuDNN", "stock, ms", "VTC, ms", "stock / VTC"]
    return table.markdown(columns, sorted(rows))


def with_graphs(records: list[Record]) -> str:
    """A table of the stock model and VTC, each without and with graphs, by what is timed and batch size; or nothing."""
    found = {(r.model, r.op, r.shape["B"], r.backend): r for r in records}
    rows = []
    for model, op, batch, variant in found:
        if not (variant.startswith("vtc") and variant.endswith(", graphs")):
            continue
        names = ("sdpa", "sdpa, graphs", variant.removesuffix(", graphs"), variant)
        times = [r.ms_50 if (r := found.get((model, op, batch, name))) else None for name in names]
        ours = found[model, op, batch, variant].ms_50
        shown = [*(f"{ms:.1f}" if ms else "" for ms in times), *(f"{ms / ours:.2f}x" if ms else "" for ms in times[:2])]
        rows.append([model, op, str(batch), variant.split()[1].rstrip(","), *shown])
    if not rows:
        return ""
    columns = ["model", "what is timed", "B", "tokens", "stock, ms", "stock, graphs", "VTC", "VTC, graphs"]
    return table.markdown([*columns, "to stock", "to stock, graphs"], sorted(rows))


def with_floors(records: list[Record], matmul_tflop_per_s: float) -> list[Record]:
    """Records of whole models that were made without floors, with them; the rate is that of the same run."""
    made = []
    for r in records:
        if r.floor_ms is None and r.op != "generate":
            sizes = {name: r.shape[key] for name, key in (("batch", "B"), ("visual", "visual"), ("text", "text"))}
            works = roofline.works(config_of(r.model), r.op, size=2 if r.dtype == "bf16" else 4, **sizes)
            least = roofline.floor(works, r.copy_gb_per_s, matmul_tflop_per_s)
            r = dataclasses.replace(r, floor_ms=least.ms, bound=least.bound, matmul_tflop_per_s=matmul_tflop_per_s)
        made.append(r)
    return made


def bounds(records: list[Record]) -> list[str]:
    """What bounds the first token of each model and variant at each batch size: the host, or a stage on the GPU.

    The host bounds it if the call takes `HOST_BOUND` times as long as the GPU works, or longer.
    """
    lines = []
    for first in (r for r in records if r.op == "first token"):
        same = {
            r.op: r
            for r in records
            if (r.model, r.backend, r.shape["B"]) == (first.model, first.backend, first.shape["B"])
        }
        stages = [same[stage] for stage in roofline.FIRST_TOKEN if stage in same]
        if first.floor_ms is None or len(stages) < len(roofline.FIRST_TOKEN):
            continue
        start = f"{first.model} B={first.shape['B']} {first.backend}: first token {first.ms_50:.1f} ms"
        floor = f"floor {first.floor_ms:.1f} by {first.bound}"
        longest = max(stages, key=lambda r: r.ms)
        why = (
            f"{longest.op}, {longest.ms:.1f} ms, {longest.ms / longest.floor_ms:.1f} times its floor by {longest.bound}"
        )
        if not all(r.device_ms_50 for r in stages):
            lines.append(f"{start}, {floor}; most of it is {why}")
            continue
        device = sum(r.device_ms_50 for r in stages)
        why = "the host" if first.ms_50 >= HOST_BOUND * device else why
        lines.append(f"{start}, the GPU works for {device:.1f}, {floor}: bound by {why}")
    return lines


def _as_graphs(found: dict[tuple[str, str, int], Record], variant: str, batch: int) -> float:
    """The device's milliseconds up to the first token, in one graph or stage by stage; 0 if there are none."""
    whole = found.get(("first token, one graph", variant, batch))
    if whole and whole.device_ms_50:
        return whole.device_ms_50
    stages = [found.get((stage, variant, batch)) for stage in ("vision", "projector", "prefill")]
    times = [r.device_ms_50 if r else None for r in stages]
    return 0.0 if None in times else sum(times)

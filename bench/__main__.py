"""The command line of the benchmarks: `python -m bench --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

import bench
from bench import checkout, record

# Each command imports what it runs: `compare` runs this file with an older vtc, which may lack modules of the others.


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for bad input."""
    parser = _Parser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _micro_options(commands.add_parser("micro", help="every operation, every provider, side by side"))
    add = commands.add_parser("e2e", help="a whole LLaVA, stage by stage: stock SDPA against VTC")
    add.add_argument(
        "--model", nargs="+", default=(), metavar="NAME", help="default: LLaVA-1.5-7B and 13B, on a CPU a small one"
    )
    add.add_argument(
        "--batch", type=_positive, nargs="+", default=(), metavar="B", help="default: 1 4 16 64, on a CPU 1 4"
    )
    add.add_argument("--keep", type=_positive, nargs="+", default=(), metavar="K", help="default: 192 128 64 32")
    _output_options(add)
    add = commands.add_parser("launches", help="kernels, launches, reads and Python calls: stock beside VTC")
    add.add_argument("--out", type=Path, help="folder for the record, JSON lines")
    add = commands.add_parser("host", help="what the first token costs the host, with and without graphs")
    add.add_argument("--rounds", type=_positive, default=30, help="of which the least times count")
    add.add_argument("--compiled", action="store_true", help="what torch.compile gains on this CPU, instead")
    add.add_argument("--out", type=Path, help="folder for the record, JSON lines")
    add = commands.add_parser("compare", help="two git revisions in one run; further options are those of micro")
    add.add_argument("revision", help="compared with the working tree")
    add = commands.add_parser("quality", help="accuracy of the bundled model, method by method, token by token")
    add.add_argument("--questions", type=_positive, default=1000)
    add.add_argument("--method", nargs="+", metavar="NAME", help="default: all")
    add.add_argument("--keep", type=_positive, nargs="+", metavar="K", help="default: 288 to 16")
    add.add_argument("--split", choices=("val", "test"), default="test")
    add.add_argument("--sweep", action="store_true", help="also every number of layers and every ensemble of vtc-cls")
    add.add_argument("--processes", type=_positive, default=1, help="that answer side by side")
    add.add_argument("--out", type=Path, help="folder for the records, JSON lines, and the plot")
    add.add_argument("--no-plot", action="store_true")
    add = commands.add_parser("cpu", help="generate() with fewer visual tokens against stock, on a CPU")
    add.add_argument("--model", nargs="+", metavar="NAME", help="default: bundled scaled")
    add.add_argument("--batch", type=_positive, nargs="+", metavar="B", help="default: 1 4 8")
    add.add_argument("--keep", type=_positive, nargs="+", metavar="K", help="default: 192 128 64 32")
    add.add_argument("--rounds", type=_positive, help="samples of each time (5), taken in turn")
    add.add_argument("--out", type=Path, help="folder for the records, JSON lines")
    add = commands.add_parser("serve", help="VTC in vLLM against stock vLLM, under the load of several clients")
    add.add_argument(
        "--model", nargs="+", default=(), metavar="NAME", help="default: bundled scaled; with a GPU 7b, random weights"
    )
    add.add_argument("--concurrency", type=_positive, nargs="+", default=(), metavar="C", help="default: 1 4 16")
    add.add_argument("--keep", type=_positive, nargs="+", default=(), metavar="K", help="default: 128 64")
    add.add_argument("--requests", type=_positive, metavar="N", help="of a round; default: 2 C, and at least 8")
    add.add_argument("--rounds", type=_positive, help="in which the engines take turns; default: 3, with a GPU 7")
    add.add_argument("--out", type=Path, help="folder for the records, JSON lines")
    add = commands.add_parser("gpu", help="everything that is measured on a GPU, in minutes")
    add.add_argument("--out", type=Path, required=True, help="folder for at most 8 files")
    add.add_argument("--minutes", type=float, default=9)
    add.add_argument(
        "--parts", nargs="+", default=(), metavar="PART", help="default: all, in the order of bench/README.md"
    )
    _mode_options(add)
    add = commands.add_parser("worker", help="a process that `gpu` starts")
    add.add_argument("part")
    for name in ("out", "journal"):
        add.add_argument(f"--{name}", type=Path)
    add.add_argument("--skip", type=int, default=0)
    _mode_options(add)
    add = commands.add_parser("hub", help="write the package for the kernel loader of the Hugging Face Hub")
    add.add_argument("--owner", required=True, help="user or organisation of the Hub")
    add.add_argument("--out", type=Path, required=True, help="a new folder")
    commands.add_parser("readme", help="rewrite the generated blocks of all documents")
    add = commands.add_parser("plot", help="draw records")
    add.add_argument("records", type=Path, help="a micro.jsonl")
    add.add_argument("--out", type=Path, default=checkout.ROOT / "bench/plots", help="folder")
    chosen, rest = parser.parse_known_args(arguments)
    if rest and chosen.command != "compare":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return COMMANDS[chosen.command](chosen, rest)
    except (ValueError, OSError) as error:
        from vtc.cli.errors import explain

        line, status = explain(error)
        print(f"{parser.prog} {chosen.command}: {line}", file=sys.stderr)
        return status


class _Parser(argparse.ArgumentParser):
    """One line for wrong arguments, and the exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def _positive(text: str) -> int:
    """The number of an option that counts something."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _device(name: str) -> torch.device:
    """A device that can be used here."""
    from vtc.eval.model import pick_device

    try:
        return pick_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _mode_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("--rehearse", action="store_true", help="run it on a CPU, in miniature")
    add.add_argument("--plant", action="store_true", help="with faults, to check that they cost no other number")


def _micro_options(add: argparse.ArgumentParser) -> None:
    for name in ("op", "provider", "dtype", "model"):
        add.add_argument(f"--{name}", nargs="+", default=(), metavar="NAME", help="default: all")
    add.add_argument("--batch", type=_positive, nargs="+", default=(), metavar="B")
    add.add_argument("--keep", type=_positive, nargs="+", default=(), metavar="K")
    add.add_argument("--full", action="store_true", help="every K with every B, not every K at one B and vice versa")
    add.add_argument("--budget", type=float, metavar="SECONDS", help="begin no new number after this time")
    _output_options(add)


def _output_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("--rep-ms", type=float, default=100.0, help="milliseconds of repetitions a number (100)")
    add.add_argument("--processes", type=_positive, default=1, help="that answer side by side")
    add.add_argument("--out", type=Path, help="folder for the records, JSON lines, and the plot")
    add.add_argument("--no-plot", action="store_true")
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # no text, which would go through `type`
    add.add_argument("--device", type=_device, default=default)


def _micro(chosen: Any, rest: list[str]) -> int:
    from bench import micro

    options = micro.Options(
        ops=tuple(chosen.op),
        providers=tuple(chosen.provider),
        dtypes=tuple(chosen.dtype),
        models=tuple(chosen.model),
        batches=tuple(chosen.batch),
        keeps=tuple(chosen.keep),
        full=chosen.full,
        rep_ms=chosen.rep_ms,
        budget=chosen.budget,
    )
    return _timed("micro", chosen, lambda device, out: micro.run(options, device, out))


def _e2e(chosen: Any, rest: list[str]) -> int:
    from bench import e2e

    options = e2e.Options.of(chosen.device, tuple(chosen.model), tuple(chosen.batch), tuple(chosen.keep), chosen.rep_ms)
    return _timed("e2e", chosen, lambda device, out: e2e.run(device, options, out))


def _timed(suite: str, chosen: Any, run: Any) -> int:
    """Run a suite with its records going to `--out`, and draw them."""
    from bench import plots

    out = None
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        out = chosen.out / f"{suite}.jsonl"
    status = run(chosen.device, out)
    if out and out.exists() and not chosen.no_plot:
        print(*plots.draw(record.read(out), chosen.out / suite), sep="\n")
    return status


def _launches(chosen: Any, rest: list[str]) -> int:
    from bench import launches

    return launches.run(chosen.out)


def _host(chosen: Any, rest: list[str]) -> int:
    from bench import host

    return host.run(chosen.out, chosen.rounds, chosen.compiled)


def _compare(chosen: Any, rest: list[str]) -> int:
    from bench import compare

    return compare.run(chosen.revision, rest)


def _gpu(chosen: Any, rest: list[str]) -> int:
    from bench import gpu

    return gpu.run(
        chosen.out, chosen.minutes, chosen.parts, gpu.Mode(chosen.rehearse, chosen.plant), started=bench.STARTED
    )


def _worker(chosen: Any, rest: list[str]) -> int:
    from bench import parts

    parts.work(chosen.part, chosen.out, chosen.journal, chosen.skip, parts.Mode(chosen.rehearse, chosen.plant))
    return 0


def _readme(chosen: Any, rest: list[str]) -> int:
    from bench import readme

    for page in readme.rewrite():
        print(f"rewrote {page.relative_to(checkout.ROOT)}")
    return 0


def _cpu(chosen: Any, rest: list[str]) -> int:
    from bench import cpu

    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
    return cpu.run(
        chosen.model or tuple(cpu.SUBJECTS),
        chosen.batch or cpu.BATCHES,
        chosen.keep or cpu.KEEPS,
        chosen.rounds or cpu.ROUNDS,
        chosen.out and chosen.out / "cpu.jsonl",
    )


def _serve(chosen: Any, rest: list[str]) -> int:
    from bench import serve

    options = serve.Options.of(
        chosen.model, chosen.keep, chosen.concurrency, chosen.requests, chosen.rounds, torch.cuda.is_available()
    )
    return serve.run(options, chosen.out)


def _hub(chosen: Any, rest: list[str]) -> int:
    from bench import hub

    files = hub.write(chosen.owner, chosen.out)
    print(
        f"wrote {len(files)} files to {chosen.out}; `kernel-builder build-and-upload` there builds and publishes them"
    )
    return 0


def _quality(chosen: Any, rest: list[str]) -> int:
    from bench import quality, quality_tables

    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
    records = quality.run(
        chosen.questions,
        chosen.keep or quality.KEEPS,
        chosen.method or quality.METHODS,
        chosen.out and chosen.out / "quality.jsonl",
        sweep=chosen.sweep,
        split=chosen.split,
        processes=chosen.processes,
    )
    print("\n" + quality_tables.tables(records))
    if chosen.out and not chosen.no_plot:
        from bench import plots

        print(*plots.draw_quality(records, chosen.out / "quality"), sep="\n")
    return 0


def _plot(chosen: Any, rest: list[str]) -> int:
    from bench import plots

    name = f"{chosen.records.resolve().parent.name}-{chosen.records.stem}"
    print(*plots.draw(record.read(chosen.records), chosen.out / name), sep="\n")
    return 0


COMMANDS = {
    "micro": _micro,
    "e2e": _e2e,
    "host": _host,
    "launches": _launches,
    "quality": _quality,
    "cpu": _cpu,
    "serve": _serve,
    "compare": _compare,
    "gpu": _gpu,
    "worker": _worker,
    "hub": _hub,
    "readme": _readme,
    "plot": _plot,
}

if __name__ == "__main__":
    sys.exit(main())

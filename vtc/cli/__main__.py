"""The `vtc` command. Everything heavy is imported inside the commands, so that `vtc --help` answers at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

import vtc
from vtc import distribution
from vtc.cli.errors import Command
from vtc.cli.output import image_file, print_json, print_table, progress, quieten
from vtc.eval import BUNDLED

app = typer.Typer(
    cls=Command,
    help="Ask LLaVA models about images with fewer visual tokens.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _not_empty(text: str | None) -> str | None:
    """What was given. An empty text would be this folder."""
    if text is not None and not text.strip():
        raise typer.BadParameter("it is empty; give a directory or a hub id, or leave the option out")
    return text


# Options that several commands have.
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Backend = Annotated[str | None, typer.Option(help="auto, triton or torch.", show_default="auto")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="the first GPU, else cpu")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
EnsembleLayers = Annotated[int | None, typer.Option(help="vtc-cls: number of scored vision layers.", show_default="3")]
Keep = Annotated[
    int | None,
    typer.Option(help="Visual tokens to keep of an image.", show_default="128, or a quarter of at most 128"),
]
KV = Annotated[
    str | None,
    typer.Option(
        help="With --prune-layer, the cache of the layers before: compact or full.",
        show_default="full with fastv, else compact",
    ),
]
Positions = Annotated[
    str | None,
    typer.Option(help="Of the tokens that stay: packed, or original, those of the full prompt.", show_default="packed"),
]
Model = Annotated[str, typer.Option(help="Directory or hub id of a LLaVA model.", callback=_not_empty)]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Another option of the method; `vtc methods NAME` lists them."),
]
PruneLayer = Annotated[
    int | None,
    typer.Option(help="Drop them after this layer of the language model.", show_default="0: before; fastv: 2"),
]
Ratio = Annotated[float | None, typer.Option(help="Share of the visual tokens to keep, instead of --keep.")]
Revision = Annotated[str | None, typer.Option(help="Of the model on the hub.")]
Schedule = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER:TOKENS,…",
        help="Drop them in stages, instead of --keep: 0:96,16:32 is 96 before the language model, 32 after layer 16.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="random: the seed.", show_default="0")]
StartLayer = Annotated[
    int | None, typer.Option(help="vtc-cls: the first scored vision layer, instead of --ensemble-layers.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="On the CPU.", show_default="1 for the bundled model, else at most the cores that may be used"
    ),
]


def main() -> None:
    """Entry point of the `vtc` command."""
    try:
        distribution.require_own()
    except ValueError as error:
        typer.echo(f"vtc: {error}", err=True)
        raise SystemExit(2) from error
    app()


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; or set VTC_DEBUG=1.")] = False,
) -> None:
    if version:
        typer.echo(f"vtc {vtc.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(short_help="Ask a question about an image, or about several.")
def run(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE", help="Files: JPEG, PNG, WebP, TIFF and others; -: the image on standard input."
        ),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about them; it comes last.")],
    model: Model = BUNDLED,
    revision: Revision = None,
    method: Annotated[str, typer.Option(help="How tokens are selected; `vtc methods` lists the names.")] = "vtc-cls",
    keep: Keep = None,
    ratio: Ratio = None,
    prune_layer: PruneLayer = None,
    schedule: Schedule = None,
    kv: KV = None,
    positions: Positions = None,
    ensemble_layers: EnsembleLayers = None,
    start_layer: StartLayer = None,
    seed: Seed = None,
    backend: Backend = None,
    option: Options = None,
    device: Device = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    overlay: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the kept patches over the image, and write it.")
    ] = None,
    heatmap: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the scores of the patches over the image, and write it.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer without compression, and measure.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a question about an image, or about several.

    Prints the answer; with --compare, a table with the answers of the compressed and the uncompressed model.
    """
    from vtc.cli import run as asking
    from vtc.cli.options import options_of, schedule_of

    flags: dict[str, Any] = {"keep": keep, "ratio": ratio, "prune_layer": prune_layer, "kv": kv}
    flags |= {
        "ensemble_layers": ensemble_layers,
        "schedule": schedule_of(schedule),
        "method": method,
        "positions": positions,
        "start_layer": start_layer,
        "seed": seed,
        "backend": backend,
    }
    asking.run(
        asking.Request(
            images,
            question,
            options_of(option or [], **flags),
            {"overlay": overlay, "heatmap": heatmap},
            model=model,
            revision=revision,
            device=device,
            dtype=dtype,
            threads=threads,
            max_new_tokens=max_new_tokens,
            compare=compare,
            as_json=as_json,
        )
    )


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=5, max=5000, help="How many held-out questions to ask.")] = 80,
    out: Annotated[str, typer.Option(metavar="FILE", help="For the sheet of images.")] = "demo.png",
    method: Annotated[
        str, typer.Option(help="With fewer and fewer tokens of this method; all: every method at 64 tokens.")
    ] = "vtc-cls",
    device: Device = None,
    threads: Annotated[int, typer.Option(min=1, help="On the CPU.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Measure the bundled model with fewer and fewer visual tokens.

    Prints a table, and draws what was kept.
    """
    start = time.perf_counter()
    file = image_file(out)

    from vtc.config import VTCConfig

    if method != "all":
        VTCConfig(method=method)
    progress("loading …")
    quieten(BUNDLED)

    from vtc.cli import demo as measuring
    from vtc.cli.sheet import draw
    from vtc.eval import ask

    ask.use_threads(threads)
    found = measuring.measure(*ask.load(BUNDLED, device, "float32"), questions, method, quiet=as_json)
    measuring.show(found, draw, file, start, as_json)


@app.command(name="eval")
def evaluate(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(help="gqa sqa textvqa pope mmbench mmbench_cn seed mmvet, or scenes, which needs no files."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="The eight benchmarks.")] = False,
    data: Annotated[str | None, typer.Option(help="The folder with their files, in LLaVA's layout or flat.")] = None,
    model: Model = BUNDLED,
    revision: Revision = None,
    method: Annotated[
        str, typer.Option(help="As in `vtc methods`; none: no compression; floor: no visual tokens at all.")
    ] = "vtc-cls",
    keep: Annotated[int | None, typer.Option(help="Visual tokens to keep of an image.", show_default="128")] = None,
    ratio: Ratio = None,
    prune_layer: PruneLayer = None,
    schedule: Schedule = None,
    kv: KV = None,
    positions: Positions = None,
    ensemble_layers: EnsembleLayers = None,
    start_layer: StartLayer = None,
    seed: Seed = None,
    backend: Backend = None,
    option: Options = None,
    methods: Annotated[str | None, typer.Option(help="A table of these methods: vtc-cls,fastv,prumerge+")] = None,
    all_methods: Annotated[bool, typer.Option("--all-methods", help="A table of every method.")] = False,
    sweep: Annotated[str | None, typer.Option(help="A table of these numbers of tokens: keep=256,128,64")] = None,
    baselines: Annotated[bool, typer.Option(help="Tables also have the rows none and floor.")] = True,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="llava: LLaVA-1.5's prompt and padded images; hf: the checkpoint's own template.",
            show_default="llava; scenes: hf",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only so many, spread over the file.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once; 1 is the reference.")] = 1,
    check_batch: Annotated[
        bool, typer.Option("--check-batch", help="Also answer one by one, and count the answers that differ.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens, for a quick try.", show_default="the task's")
    ] = None,
    out: Annotated[
        str, typer.Option(help="The folder of answers and tables. A run goes on where it stopped.")
    ] = "vtc-eval",
    partial: Annotated[bool, typer.Option("--partial", help="Ask nothing: score the answers that are there.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out questions without a readable image.")] = False,
    answers: Annotated[
        str | None, typer.Option(help="Ask nothing: score this file of answers, made by LLaVA's programs.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: models in actors of Ray.")] = "local",
    actors: Annotated[int, typer.Option(min=1, help="With --engine ray, how many models.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that prepare images.", show_default="4 on a GPU, else 0")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    plots: Annotated[bool, typer.Option("--plots", help="Draw accuracy over tokens and over time.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run benchmarks from their official files: any model, method and number of tokens.

    Prints a table of scores and one of times; report.md, report.csv, results.jsonl and the files for servers and judges
    are in --out. A run that was interrupted goes on where it stopped.
    """
    from vtc.cli import eval as evaluation
    from vtc.cli.options import options_of, schedule_of

    folder = Path(data) if data is not None else None
    chosen = evaluation.tasks_of(tasks or [], everything, folder)
    machine = evaluation.Machine(model, revision, device, dtype, engine, actors)
    failures: list[str] = []
    if answers is not None:
        if len(chosen) != 1:
            raise ValueError(f"--answers is a file of one task, got {len(chosen)} tasks")
        results = [evaluation.score_file(chosen[0], Path(answers), partial)]
    else:
        quieten(model)
        flags: dict[str, Any] = {
            "ratio": ratio,
            "prune_layer": prune_layer,
            "kv": kv,
            "ensemble_layers": ensemble_layers,
        }
        flags |= {"positions": positions, "start_layer": start_layer, "seed": seed, "backend": backend}
        flags |= {"schedule": schedule_of(schedule)}
        given = options_of(option or [], **flags)
        settings = evaluation.settings_of(method, methods, all_methods, sweep, baselines, keep, given)
        options = evaluation.Options(
            Path(out),
            batch_size=batch_size,
            limit=limit,
            protocol=protocol,
            skip_bad=skip_bad,
            partial=partial,
            workers=workers,
            max_new_tokens=max_new_tokens,
            check_batch=check_batch,
            quiet=as_json,
        )
        results, failures = evaluation.evaluate(chosen, settings, machine, options, plots)
    if machine.processes.is_main and as_json:
        print_json(evaluation.document(results, failures))
    elif machine.processes.is_main:
        for title, columns, rows, notes in evaluation.report.tables(results):
            print_table(title, columns, rows)
            for line in notes:
                typer.echo(line)
    if failures:
        raise ValueError(f"{len(failures)} run(s) failed: {'; '.join(failures)}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this method and list its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods of compression, or explain one of them.

    The list says what each method scores and needs, where it drops tokens, and its paper.
    """
    from vtc.cli import methods as about

    if name is not None:
        found = about.details(name)
        if as_json:
            print_json(found)
        else:
            about.show_details(found)
    elif as_json:
        print_json({"methods": about.listing()})
    else:
        about.show()


@app.command()
def ui(
    model: Model = BUNDLED,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on. 0.0.0.0: for all who can reach this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Show the page in the browser.")] = True,
) -> None:
    """Open a page that compares answers with all tokens and with fewer.

    It shows what was kept, too, and what the answers cost. It is for this machine only, unless --host says otherwise.
    Ctrl-C ends it.
    """
    from vtc.ui import server

    server.require_port(host, port)
    server.require_gradio()
    progress("loading …")
    quieten(model)

    from vtc.eval import ask
    from vtc.ui.compare import Comparison

    ask.use_threads(threads, model)
    comparison = Comparison(*ask.load(model, device, dtype, revision), model)
    server.serve(comparison, host, port, open_browser)


@app.command()
def env(
    model: Annotated[
        str | None,
        typer.Option(
            help="Also load this model, and show how it compresses; bundled: the bundled one.", callback=_not_empty
        ),
    ] = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, devices, and which backend each operation would use."""
    quieten(BUNDLED if model is None else model)

    from vtc.cli import env as machine

    found = machine.environment()
    if model is not None:
        found["model"] = machine.about_model(model, revision, device)
    if as_json:
        print_json(found)
    else:
        machine.show(found)


if __name__ == "__main__":
    main()

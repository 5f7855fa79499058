"""The `vtc` command. Everything heavy is imported inside the commands, so that `vtc --help` answers at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

import vtc
from vtc.cli.output import errors, note, print_json, print_table, progress, quieten, writable

DEFAULT_KEEP = 64

app = typer.Typer(
    help="Ask LLaVA models about images with fewer visual tokens.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="the first GPU, else cpu")]


def main() -> None:
    """Entry point of the `vtc` command."""
    app()


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"vtc {vtc.__version__}")
        raise typer.Exit


@app.command()
def run(
    image: Annotated[str, typer.Argument(help="Image file: JPEG, PNG, GIF, TIFF, WebP and what else Pillow reads.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a LLaVA model.", show_default="the bundled one")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Visual tokens to keep.", show_default=f"{DEFAULT_KEEP}")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep, instead of --keep.")] = None,
    method: Annotated[str, typer.Option(help="How they are selected; `vtc methods` lists the names.")] = "vtc-cls",
    prune_layer: Annotated[
        int | None,
        typer.Option(help="Drop them after this layer of the language model.", show_default="0: before; fastv: 2"),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            help="With --prune-layer, the cache of the layers before: compact or full.",
            show_default="full with fastv, else compact",
        ),
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    overlay: Annotated[str | None, typer.Option(help="Write the image with its kept patches to this file.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer without compression, and measure.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a question about an image.

    Prints the answer; with --compare, a table with the answers of the compressed and the uncompressed model.
    """
    with errors():
        from vtc.config import VTCConfig
        from vtc.images import load_image

        # The input is checked before the slow part.
        loaded = load_image(image)
        setting: dict[str, Any] = {"method": method, "ratio": ratio, "prune_layer": prune_layer, "kv": kv}
        setting["keep"] = DEFAULT_KEEP if keep is None and ratio is None else keep
        config = VTCConfig(**setting)
        out = writable(overlay) if overlay else None
        progress("loading …")
        quieten(model)

        from vtc.api import require_selection
        from vtc.cli import ask

        if out:
            require_selection(method)
        net, processor = ask.load(model, device, dtype)
        inputs = ask.prepare(net, processor, loaded, question)
        result = {
            "image": image,
            "question": question,
            "model": model or "bundled",
            "device": str(net.device),
            "dtype": str(net.dtype).removeprefix("torch."),
            "method": config.method,
            "prune_layer": config.prune_after,
            **ask.compare(net, processor, inputs, max_new_tokens, timed=compare, **setting),
            "overlay": str(out) if out else None,
        }
        if out:
            selection = vtc.select(net, inputs["pixel_values"], **setting)
            vtc.overlay(ask.as_seen(loaded, processor, inputs["pixel_values"]), selection).save(out)
            note(f"kept patches drawn in {out}")
        if words := ask.unknown_words(processor, question):
            note(f"the model does not know: {' '.join(words)}")
        if model is None:
            note("the bundled model knows the images of `vtc demo` only; for photographs give --model")
        if as_json:
            print_json(result)
        elif compare:
            title, columns, rows = ask.comparison(result)
            print_table(title, columns, rows)
            typer.echo(ask.footnote(result))
        else:
            typer.echo(result["compressed"]["answer"])
            note(f"{result['compressed']['visual_tokens']} visual tokens")


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=5, max=5000, help="How many held-out questions to ask.")] = 80,
    out: Annotated[str, typer.Option(help="The file for the sheet of images.")] = "demo.png",
    method: Annotated[
        str, typer.Option(help="With fewer and fewer tokens of this method; all: every method at 64 tokens.")
    ] = "vtc-cls",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the bundled model with fewer and fewer visual tokens, and draw what it kept."""
    start = time.perf_counter()
    with errors():
        from vtc.config import VTCConfig

        if method != "all":
            VTCConfig(method=method)
        file = writable(out)
        progress("loading …")
        quieten(None)

        from vtc.cli.demo import COLUMNS, measure
        from vtc.cli.sheet import draw

        found = measure(questions, device, progress, method)
        draw(found).save(file)
        seconds = time.perf_counter() - start
        if as_json:
            print_json({**found.record(), "picture": str(file), "seconds": round(seconds, 1)})
            return
        title = f"{questions} held-out questions to the bundled model on {found.device}"
        print_table(title, COLUMNS, [row.cells() for row in found.rows])
        typer.echo(found.footnote())
        typer.echo(f"Sheet: {file} ({seconds:.0f} s in all)")


@app.command(name="eval")
def evaluate(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(help="gqa sqa textvqa pope mmbench mmbench_cn seed mmvet, or scenes, which needs no files."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="The eight benchmarks.")] = False,
    data: Annotated[str | None, typer.Option(help="The folder with their files, in LLaVA's layout or flat.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a LLaVA model.", show_default="the bundled one")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the model on the hub.")] = None,
    method: Annotated[
        str, typer.Option(help="As in `vtc methods`; none: no compression; floor: no visual tokens at all.")
    ] = "vtc-cls",
    keep: Annotated[int | None, typer.Option(help="Visual tokens to keep.", show_default=f"{DEFAULT_KEEP}")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep, instead of --keep.")] = None,
    start_layer: Annotated[int | None, typer.Option(help="vtc-cls: the first scored vision layer.")] = None,
    prune_layer: Annotated[
        int | None, typer.Option(help="Drop tokens after this layer of the language model.", show_default="fastv: 2")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Another option of the method: name=value.")] = None,
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
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    plots: Annotated[bool, typer.Option("--plots", help="Draw accuracy over tokens and over time.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run benchmarks from their official files: any model, method and number of tokens.

    Prints a table of scores and one of times; report.md, report.csv, results.jsonl and the files for servers and judges
    are in --out. A run that was interrupted goes on where it stopped.
    """
    with errors():
        from vtc.cli import eval as evaluation

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
            given = {"ratio": ratio, "start_layer": start_layer, "prune_layer": prune_layer}
            given = {name: value for name, value in given.items() if value is not None}
            given |= evaluation.options_of(option or [])
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
    with errors():
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
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a LLaVA-1.5.", show_default="the bundled one")
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0: all, for anyone who reaches them.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Show the page in the browser.")] = True,
) -> None:
    """Open a page that answers with all tokens and with fewer, and shows what was kept.

    It is for this machine only, unless --host says otherwise. Ctrl-C ends it.
    """
    with errors():
        from vtc.ui import server

        server.require_gradio()
        server.require_port(host, port)
        progress("loading …")
        quieten(model)

        from vtc.cli import ask
        from vtc.ui.compare import Comparison

        comparison = Comparison(*ask.load(model, device, dtype), model or ask.BUNDLED)
        server.serve(comparison, host, port, open_browser, note)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show versions, devices, and which backend each operation would use."""
    with errors():
        quieten(None)

        from vtc.cli import env as machine

        found = machine.environment()
        if as_json:
            print_json(found)
        else:
            machine.show(found)


if __name__ == "__main__":
    main()

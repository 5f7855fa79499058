"""Engines of vLLM for `bench serve`, each in processes of its own, and the closed loop of clients that loads them.

The process that times imports no vLLM. It starts one process for each engine, which is the engine's client, too: it
prepares the images, sends the requests and reads the clock. vLLM starts further processes from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench import checkout
from bench.processes import Group

START, ANSWER, CLOSE = 600.0, 900.0, 30.0  # seconds at most: to start, to serve one load, and to end
ENVIRONMENT = {  # of an engine's processes, unless they are set
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
Given = TypeVar("Given")
Got = TypeVar("Got")


class Request(NamedTuple):
    """The token ids of a prompt with one image placeholder, and the number of the scene that is its image."""

    ids: list[int]
    scene: int


class Load(NamedTuple):
    """Requests that wait, how many are in flight at a time, and the number of tokens that each of them gets."""

    requests: Sequence[Request]
    concurrency: int
    new_tokens: int


class Answer(NamedTuple):
    """What a client saw of one request.

    Attributes
    ----------
    tokens : list of int
        The new tokens.
    prompt_tokens : int
        How many tokens the prompt has in the engine, visual tokens included.
    cached : int
        How many of these the engine took from a cache.
    ttft_ms : float
        From the submission of the request, with its image as it is, to the first token.
    """

    tokens: list[int]
    prompt_tokens: int
    cached: int
    ttft_ms: float


class Served(NamedTuple):
    """A load that was served.

    Attributes
    ----------
    answers : list of Answer
        In the order of the requests.
    seconds : float
        From the first submission to the last token.
    kv_tokens : int or None
        The tokens of the KV blocks that were taken at the peak, by vLLM's statistics; None if there were none.
    preempted : int
        How often a running request had to give its blocks back.
    """

    answers: list[Answer]
    seconds: float
    kv_tokens: int | None
    preempted: int


class Facts(NamedTuple):
    """An engine: vLLM's version, and how many tokens its KV cache has room for."""

    vllm: str
    capacity: int


def require_vllm() -> None:
    """Raise ValueError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"bench serve needs vLLM, which {sys.executable} does not have; install it in an environment of its own: "
            "pip install '.[vllm]', or for a CPU as vtc/vllm/README.md says"
        )


class Engine(Group):
    """An engine that runs; end it with `close`.

    Parameters
    ----------
    arguments : dict
        For vLLM's `AsyncEngineArgs`.
    plugins : str
        Names of the plug-ins that vLLM may load, with commas.
    log : Path
        What vLLM prints.

    Raises
    ------
    RuntimeError
        If it does not start.
    """

    def __init__(self, arguments: dict[str, Any], plugins: str, log: Path) -> None:
        self._log = log
        self._conn, theirs = Pipe()
        unset = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
        code = f"from bench import serving; serving.serve({theirs.fileno()})"
        self._packages = contextlib.ExitStack()
        options = self._packages.enter_context(checkout.packages(environment={**unset, "VLLM_PLUGINS": plugins}))
        with log.open("w", encoding="utf-8") as file:
            super().__init__([sys.executable, "-c", code], file, pass_fds=(theirs.fileno(),), **options)
        theirs.close()
        try:
            self.facts: Facts = self._ask(arguments, START)
        except BaseException:
            self.close()
            raise

    def serve(self, load: Load) -> Served:
        """Serve a load.

        Raises
        ------
        RuntimeError
            If the engine has failed, or takes too long.
        """
        served: Served = self._ask(load, ANSWER)
        return served

    def _ask(self, what: Any, limit: float) -> Any:
        failed: object = f"no answer in {limit:.0f} s"
        try:
            self._conn.send(what)
            if self._conn.poll(limit):
                found = self._conn.recv()
                if not isinstance(found, Exception):
                    return found
                failed = found
        except (EOFError, OSError):
            failed = f"its process has ended with status {self.wait(CLOSE)}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        print(*lines[-40:], sep="\n", file=sys.stderr)
        raise RuntimeError(f"the engine failed: {failed}")

    def cpu_seconds(self) -> float:
        """The processor's time that all processes of this engine have taken."""
        return sum(_seconds_of(self._process.pid))

    def close(self) -> None:
        """End all its processes."""
        self._conn.close()  # asks it to
        self.wait(CLOSE)
        self.end()
        self._packages.close()


def _seconds_of(group: int) -> Iterator[float]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):  # it has ended since
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# What follows runs in the engine's process.


class Watch:
    """A logger of vLLM's statistics that remembers the peak."""

    usage: float | None
    preempted: int

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.usage, self.preempted = None, 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *rest: Any, **more: Any) -> None:
        """As vLLM's `StatLoggerBase`, like the methods below. It calls this after each step."""
        if scheduler_stats is not None:
            self.usage = max(self.usage or 0.0, scheduler_stats.kv_cache_usage)
        if iteration_stats is not None:
            self.preempted += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, *given: Any, **more: Any) -> None: ...


async def closed_loop(ask: Callable[[Given], Awaitable[Got]], requests: Sequence[Given], concurrency: int) -> list[Got]:
    """Ask all `requests`, as many as `concurrency` at a time; a client that has its answer takes the next request.

    Returns the answers in the order of the requests.
    """
    waiting = iter(enumerate(requests))
    answers: dict[int, Got] = {}

    async def client() -> None:
        for number, request in waiting:
            answers[number] = await ask(request)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return [answers[number] for number in range(len(requests))]


async def read(outputs: AsyncIterator[Any]) -> Answer:
    """The answer of a request that vLLM streams. Its clock starts now."""
    start = time.perf_counter()
    ttft = None
    async for output in outputs:
        if ttft is None and output.outputs[0].token_ids:
            ttft = time.perf_counter() - start
    if ttft is None:
        raise RuntimeError("a request has ended without a token")
    tokens = list(output.outputs[0].token_ids)
    return Answer(tokens, len(output.prompt_token_ids), output.num_cached_tokens or 0, 1e3 * ttft)


def serve(descriptor: int) -> None:
    """The engine's process: read the arguments of the engine, then loads, from a connection, until it is closed."""
    conn = Connection(descriptor)
    try:
        asyncio.run(_serve(conn))
    except Exception as error:
        conn.send(RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())}"))
        raise


async def _serve(conn: Connection) -> None:
    from vllm import SamplingParams, TokensPrompt, __version__
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from vtc.tiny.scenes import Scene

    watch, names = Watch(), itertools.count()
    arguments = AsyncEngineArgs(**conn.recv(), disable_log_stats=True)
    llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[lambda config, index: watch])
    cache = llm.vllm_config.cache_config
    capacity = (cache.num_gpu_blocks - 1) * cache.block_size  # one block stands for none
    try:
        conn.send(Facts(__version__, capacity))
        while True:
            try:
                load: Load = conn.recv()
            except EOFError:
                return
            prompts = [
                TokensPrompt(prompt_token_ids=each.ids, multi_modal_data={"image": Scene("test", each.scene).image})
                for each in load.requests
            ]
            sampling = SamplingParams(temperature=0, max_tokens=load.new_tokens, ignore_eos=True, detokenize=False)

            async def ask(prompt: Any, sampling: Any = sampling) -> Answer:
                return await read(llm.generate(prompt, sampling, str(next(names))))

            watch.clear()
            start = time.perf_counter()
            answers = await closed_loop(ask, prompts, load.concurrency)
            seconds = time.perf_counter() - start
            held = None if watch.usage is None else round(watch.usage * capacity)
            conn.send(Served(answers, seconds, held, watch.preempted))
    finally:
        llm.shutdown()

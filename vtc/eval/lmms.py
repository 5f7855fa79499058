"""The model `vtc_llava` of lmms-eval: a LLaVA with any method and number of visual tokens.

    lmms-eval --model vtc_llava --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=vtc-cls,keep=64 --tasks mme

lmms-eval finds it through the entry point `lmms_eval.models`. An exception ends its run: no answer is made up.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vtc.eval.answerer import Answerer
from vtc.eval.memory import is_out_of_memory
from vtc.eval.model import ModelSpec, pick_device, pick_dtype
from vtc.eval.protocol import PROTOCOLS, HFProtocol, Prompt, Turn
from vtc.eval.question import ImageFile
from vtc.eval.setting import FLOOR, Setting

MAX_NEW_TOKENS = 1024  # of tasks that set no limit, as in lmms-eval's own models of LLaVA
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

_log = logging.getLogger("vtc")
Item = TypeVar("Item")
Result = TypeVar("Result")
Chat = Sequence[Turn]


class LogLikelihood(tuple[float, bool], GenerationResult):
    """A value, and whether greedy decoding would say the continuation.

    A tuple, as lmms-eval's interface has it. lmms-eval 0.7.3 turns a bare tuple into its text (in
    `unwrap_generation_output`), and takes the `text` of a `GenerationResult` as it is.
    """

    def __new__(cls, value: float, is_greedy: bool) -> LogLikelihood:
        return super().__new__(cls, (value, is_greedy))

    def __init__(self, value: float, is_greedy: bool) -> None:
        GenerationResult.__init__(self, text=(value, is_greedy))


class VTCLlava(lmms):
    """A LLaVA that answers lmms-eval's "simple" requests: a text, and images before it.

    A text that holds `<image>` has its images there. Under `accelerate launch` or `torchrun` each process has a model.

    Parameters
    ----------
    pretrained : str
        A folder, a hub id, or "bundled".
    method : str
        A method of VTC, "none" (the uncompressed model) or "floor" (no visual tokens).
    protocol : str
        "llava", LLaVA-1.5's prompt and images, or "hf", the model's own template and processor.
    dtype : str
        "auto" is float16 on a GPU and float32 on a CPU.
    revision : str, optional
        Of the hub.
    attn_implementation : str, optional
        Of transformers, but not "vtc", which compresses whatever the method.
    device : str, optional
        By default the first GPU, or the process's own.
    batch_size : int or "auto"
        Requests that are answered at once; "auto" is `max_batch_size`. It is halved when memory runs out.
    max_batch_size : int, optional
        The limit of `batch_size`.
    **options
        `keep` or `ratio`, `prune_layer`, `kv` and the other fields of `VTCConfig`, and the method's own options.

    Raises
    ------
    ValueError
        If an argument is not accepted, or the model cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        method: str = "vtc-cls",
        protocol: str = "llava",
        dtype: str = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.setting = Setting(method, options)
        self.batch_size = _batch_size(batch_size, max_batch_size)
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}")
        if attn_implementation == "vtc":
            raise ValueError("attn_implementation 'vtc' compresses whatever the method; leave it out, and set method")
        if revision is not None and not isinstance(revision, str):
            raise ValueError(f"lmms-eval read the revision as the number {revision}; give a branch or a tag")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if self._world_size > 1 else pick_device(device)
        spec = ModelSpec(
            str(pretrained),
            str(self.device),
            str(pick_dtype(dtype, self.device)).removeprefix("torch."),
            revision,
            attn_implementation,
        )
        processor = spec.processor()
        self.protocol = PROTOCOLS[protocol](processor, spec.config(), floor=method == FLOOR)
        self.answerer = Answerer(spec.load(), processor)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers in the order of the requests, cut before the first of the task's `until`."""

        def asked() -> Iterable[tuple[Hashable, tuple[Prompt | Chat, dict[str, Any]]]]:
            for request in requests:
                prompt, arguments = self.question(request)
                yield (json.dumps(arguments, sort_keys=True), _count_images(prompt)), (prompt, arguments)

        def answers(batch: Sequence[tuple[Prompt | Chat, dict[str, Any]]]) -> list[GenerationResult]:
            inputs = self.prepare([prompt for prompt, _ in batch])
            arguments, stops = generation(batch[0][1])
            texts, new, _ = self.answerer.generate(inputs, self.setting, **arguments)
            lengths = inputs["attention_mask"].sum(1).tolist()
            return [
                GenerationResult(cut(text, stops), TokenCounts(input_tokens=length, output_tokens=count))
                for text, length, count in zip(texts, lengths, new, strict=True)
            ]

        return self._batched(asked(), len(requests), answers)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[LogLikelihood]:
        """For each request, the log-probability of its continuation, and whether greedy decoding would say it.

        The log-probability is the sum over the continuation's tokens, given the prompt and its images, which are
        compressed as for an answer. For a choice of a multiple-choice task it is negated where lmms-eval, as 0.7.3
        does, takes the choice with the smallest value.
        """

        def asked() -> Iterable[tuple[Hashable, tuple[Prompt, list[int], int]]]:
            for request in requests:
                if len(request.args) != 6:
                    raise ValueError(
                        f"task {request.task_name!r} asks for the probability of a text without its question, as the "
                        "metric acc_mutual_info needs it, which vtc_llava does not give; use acc or acc_norm"
                    )
                context, target, doc_to_visual, doc_id, task, split = request.args
                prompt = self._prompt(context, doc_to_visual, doc_id, task, split)
                is_choice = isinstance(target, str)
                text = target if is_choice else target(self._document(task, split, doc_id))
                ids = self.protocol.continuation(prompt, text) if isinstance(text, str) else []
                if not ids:
                    raise ValueError(f"the continuation of document {doc_id} of task {task!r} is {text!r}; give a text")
                yield _count_images(prompt), (prompt, ids, -1 if is_choice and smallest_wins() else 1)

        def values(batch: Sequence[tuple[Prompt, list[int], int]]) -> list[LogLikelihood]:
            prompts, continuations, signs = zip(*batch, strict=True)
            found = self.answerer.log_likelihoods(self.prepare(prompts), self.setting, continuations)
            return [LogLikelihood(sign * value, greedy) for (value, greedy), sign in zip(found, signs, strict=True)]

        return self._batched(asked(), len(requests), values)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("vtc_llava does not answer tasks of several rounds (generate_until_multi_round)")

    def question(self, request: Instance) -> tuple[Prompt | Chat, dict[str, Any]]:
        """What a request to answer asks, and the task's arguments of the generation."""
        context, arguments, doc_to_visual, doc_id, task, split = request.args
        return self._prompt(context, doc_to_visual, doc_id, task, split), arguments

    def prepare(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """The model's inputs for a batch."""
        return self.protocol.prepare(prompts)

    def clean(self) -> None:
        """Free the model's memory; lmms-eval calls it after the last request."""
        del self.answerer
        super().clean()

    def _prompt(self, context: str, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> Prompt:
        visuals = (doc_to_visual(self._document(task, split, doc_id)) if doc_to_visual else None) or []
        images = [as_image(visual, task) for visual in visuals]
        return Prompt(context, images, placed=self.protocol.processor.image_token in context)

    def _document(self, task: str, split: str, doc_id: Any) -> Any:
        return self.task_dict[task][split][doc_id]

    def _batched(
        self,
        items: Iterable[tuple[Hashable, Item]],
        total: int,
        run: Callable[[Sequence[Item]], list[Result]],
    ) -> list[Result]:
        """The results of `run` in the order of the items, from batches of items with equal keys."""
        results: dict[int, Result] = {}
        waiting: dict[Hashable, list[tuple[int, Item]]] = defaultdict(list)
        with tqdm(total=total, disable=self.rank != 0, desc="vtc_llava") as bar:

            def flush(entries: list[tuple[int, Item]]) -> None:
                found = self._halving([item for _, item in entries], run)
                results.update(zip((index for index, _ in entries), found, strict=True))
                bar.update(len(entries))

            for index, (key, item) in enumerate(items):
                waiting[key].append((index, item))
                if len(waiting[key]) >= self.batch_size:
                    flush(waiting.pop(key))
            for entries in waiting.values():
                flush(entries)
        return [results[index] for index in range(total)]

    def _halving(self, items: Sequence[Item], run: Callable[[Sequence[Item]], list[Result]]) -> list[Result]:
        """The results of `run`, in batches that are halved when memory runs out."""
        results: list[Result] = []
        while len(results) < len(items):
            batch = items[len(results) : len(results) + self.batch_size]
            try:
                results += run(batch)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
            # Outside of the handler, so that the error no longer holds the tensors of the batch.
            self.batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            _log.warning("out of memory with %d requests at once; going on with %d", len(batch), self.batch_size)
        return results


class VTCLlavaChat(VTCLlava):
    """A LLaVA that answers lmms-eval's "chat" requests: messages of any number, with images.

    The protocol "hf" takes them all, through the model's chat template. "llava" takes one message of the user: images,
    then a text.
    """

    is_simple = False

    def question(self, request: Instance) -> tuple[Prompt | Chat, dict[str, Any]]:
        _, doc_to_messages, arguments, doc_id, task, split = request.args
        turns = [_turn(message, task) for message in doc_to_messages(self._document(task, split, doc_id))]
        return (turns if isinstance(self.protocol, HFProtocol) else one_turn(turns, task)), arguments

    def prepare(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        if isinstance(self.protocol, HFProtocol) and not isinstance(prompts[0], Prompt):
            return self.protocol.prepare_chats(prompts)
        return super().prepare(prompts)


def one_turn(turns: Chat, task: str) -> Prompt:
    """One message of the user as a prompt: images, then a text. Raises ValueError for other messages."""
    if len(turns) == 1 and turns[0].role == "user" and turns[0].content:
        *before, text = turns[0].content
        images = [part for part in before if not isinstance(part, str)]
        if isinstance(text, str) and len(images) == len(before):
            return Prompt(text, images)
    raise ValueError(
        f"task {task!r} has messages other than one of the user with its images first, and LLaVA's protocol has no "
        "place for them; use protocol=hf, or --force_simple"
    )


def _turn(message: dict[str, Any], task: str) -> Turn:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] not in ("text", "image"):
            raise ValueError(f"task {task!r} has {part['type']}; vtc_llava takes text and images")
    return Turn(
        message["role"], [part["text"] if part["type"] == "text" else as_image(part["url"], task) for part in parts]
    )


def as_image(visual: Any, task: str) -> Image.Image:
    """The image that a task gives. Raises ValueError for a video or a sound, and ImageError for a damaged file."""
    if isinstance(visual, Image.Image):
        return visual
    if isinstance(visual, str) and Path(visual).suffix.lower() in IMAGE_SUFFIXES:
        return ImageFile(Path(visual)).open()
    given = repr(visual) if isinstance(visual, str) else f"a {type(visual).__name__}"
    raise ValueError(f"task {task!r} gives {given}; vtc_llava takes images, and neither videos nor sounds")


def generation(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's arguments of the generation as those of transformers, and the texts at which an answer is cut.

    It samples if the task says so, or gives a temperature; never at temperature 0. `image_aspect_ratio` is the
    protocol's affair.
    """
    arguments = {name: value for name, value in given.items() if value is not None and name != "image_aspect_ratio"}
    until = arguments.pop("until", [])
    temperature = arguments.get("temperature")
    samples = arguments.pop("do_sample", bool(temperature)) and temperature != 0
    if not samples:
        arguments = {k: v for k, v in arguments.items() if k not in ("temperature", "top_p", "top_k")}
    arguments = {"max_new_tokens": MAX_NEW_TOKENS, **arguments, "do_sample": samples}
    return arguments, [until] if isinstance(until, str) else list(until)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops. White space at its beginning does not count."""
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text


@functools.cache
def smallest_wins() -> bool:
    """Whether this lmms-eval takes the choice with the smallest value, since its own models return losses."""
    task = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice",
        config=SimpleNamespace(process_results=None),
        _metric_fn_list={"acc": None},
        multiple_input=False,
        multiple_target=False,
        doc_to_choice=lambda doc: ["a", "b"],
        doc_to_target=lambda doc: 0,
    )
    return bool(ConfigurableTask.process_results(task, {}, [(0.0, True), (1.0, False)])["acc"])


def _batch_size(given: int | str, limit: int | None) -> int:
    """The number of requests at once. Raises ValueError if it is none."""
    if given == "auto":
        if limit is None:
            raise ValueError("batch_size 'auto' needs max_batch_size, from which it is halved when memory runs out")
        given = limit
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size is {given!r}; it must be 1 or more, or 'auto' with max_batch_size")
    return size if limit is None else min(size, int(limit))


def _count_images(prompt: Prompt | Chat) -> int:
    if isinstance(prompt, Prompt):
        return len(prompt.images)
    return sum(not isinstance(part, str) for turn in prompt for part in turn.content)

"""The calls of a language model, replayed where they can be."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from vtc.hf import names
from vtc.hf.graphs.kv import fill
from vtc.hf.graphs.language import PromptGraph, Shape, StepGraph
from vtc.hf.graphs.recorded import Place, Recorded, Refused
from vtc.hf.graphs.window import Window

WINDOWS = 4  # batch sizes whose steps have memory at a time
BUCKET = 32  # the lengths of prompts are rounded up to multiples of it
SMALLEST_WINDOW = 256  # columns that a token attends to in the smallest graph of a step; the next has twice as many
ATTENTIONS = ("eager", "sdpa", "vtc")  # of the language model: those that take the mask of one token as a tensor
_ARGUMENTS = {"inputs_embeds", "attention_mask", "position_ids", "cache", "use_cache", "return_dict"}


class Generation(threading.local):
    """The open `generate()` of this thread.

    Attributes
    ----------
    new_tokens : int or None
        How many tokens it may add to the prompt; None if there is no open `generate()`.
    own_masks : bool
        Whether masks of four dimensions are those that transformers has made of the prompt's mask.
    checked : bool
        Whether one of its steps has looked for changes of the model.
    """

    new_tokens: int | None = None
    own_masks = False
    checked = False


class LanguageCalls:
    """In place of a language model's `forward`."""

    def __init__(self, recorded: Recorded, compiled: Callable[[Any], Any]) -> None:
        self._recorded, self._compiled = recorded, compiled
        self._generation = Generation()
        self._windows: OrderedDict[int, Window] = OrderedDict()  # by batch size
        self._place: Place | None = None  # of the windows and the shape
        self._shape: Shape | None = None

    @contextlib.contextmanager
    def generating(self, new_tokens: int, own_masks: bool) -> Iterator[None]:
        """Inside, single tokens are replayed, too: `release` must be called for a cache that outlives the block."""
        now, before = self._generation, dict(vars(self._generation))
        now.new_tokens, now.own_masks, now.checked = new_tokens, own_masks, False
        try:
            yield
        finally:
            vars(now).clear()
            vars(now).update(before)

    def __call__(self, model: Any, stock: Callable[..., Any], call: dict[str, Any]) -> Any:
        """`stock(**call)`, of the language model `model`."""
        given = names.read_call(call)
        recorded = self._recorded
        if recorded.is_recording:
            return stock(**call)
        with recorded.lock:
            try:
                embeds = _require_plain(model, given)
                is_step = embeds.shape[1] == 1 and _length(given.get("cache"))
                return (self._step if is_step else self._prompt)(model, stock, embeds, given)
            except Refused as why:
                recorded.refuse("language model", str(why))
        return stock(**call)

    def release(self, cache: Cache | None) -> None:
        """Give `cache` memory of its own, as the next call takes what it has."""
        if cache is not None:
            with self._recorded.lock:
                for window in self._windows.values():
                    window.release(cache)

    def release_all(self) -> None:
        """Give all caches memory of their own, and forget the windows."""
        for window in self._windows.values():
            window.release()
        self._windows, self._shape = OrderedDict(), None

    def _prepare(self, model: Any, stock: Callable[..., Any], embeds: Tensor) -> tuple[Place, Shape]:
        """Look for changes of the model; where functions are recorded, and for which shape. Raises Refused."""
        place = self._recorded.require("language", [model], embeds.device)
        if place is not self._place:  # all was dropped
            self.release_all()
            self._place = place
        if self._shape is None:
            try:
                self._shape = Shape.of(stock, embeds)
            except ValueError as error:
                raise Refused(str(error)) from error
        return place, self._shape

    def _prompt(self, model: Any, stock: Callable[..., Any], embeds: Tensor, call: dict[str, Any]) -> Any:
        batch, length, _ = embeds.shape
        cache, positions = call.get("cache"), call.get("position_ids")
        if _length(cache):
            raise Refused("several tokens on top of a cache")
        mask = self._mask(call.get("attention_mask"), batch, length)
        if length == 1:
            raise Refused("a prompt of one token")
        if mask is None and cache is None and positions is not None:
            raise Refused("positions without a mask and a cache, which may be those of samples in one row")
        _require_whole(model, cache, length)
        place, shape = self._prepare(model, stock, embeds)
        use_cache = model.config.use_cache if call.get("use_cache") is None else call["use_cache"]
        if use_cache and cache is None:
            cache = DynamicCache(config=model.config)
        if positions is None:
            positions = torch.arange(length, device=embeds.device)[None]
        columns = -(-length // BUCKET) * BUCKET
        graph = self._recorded.get(
            ("prompt", batch, columns, model.config._attn_implementation),
            lambda: PromptGraph(*place, self._compiled(stock), shape, batch, columns),
        )
        hidden, kv = graph(embeds, mask, positions)
        self._recorded.count("prompt")
        if cache is not None:
            fill(cache, list(kv.unbind(0)))
        return _outputs(hidden, cache)

    def _step(self, model: Any, stock: Callable[..., Any], embeds: Tensor, call: dict[str, Any]) -> Any:
        cache, mask, positions = (call.get(name) for name in ("cache", "attention_mask", "position_ids"))
        now = self._generation
        if now.new_tokens is None:
            raise Refused("one token outside of generate()")
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise Refused(f"a step with a {type(cache).__name__}, or with layers of it that are no DynamicLayer")
        batch, column = len(embeds), _length(cache)
        _require_whole(model, cache, column + 1)
        if mask is not None and mask.shape != (batch, column + 1):
            raise Refused("a mask of other columns than the cache's")
        if positions is None:
            positions = torch.full((1, 1), column, device=embeds.device)
        window = self._window(model, stock, embeds, column)
        graph = self._step_graph(model, stock, window, _power_of_two(column + 1))
        if not window.fits(cache, column):
            raise Refused("a cache whose layers differ, or are not those of this model")
        window.take(cache)
        hidden = graph(embeds, mask, positions, column)
        self._recorded.count("step")
        window.give(cache, column + 1)
        return _outputs(hidden, cache)

    def _window(self, model: Any, stock: Callable[..., Any], embeds: Tensor, column: int) -> Window:
        """The memory for steps of these embeddings `[B, 1, D]`, of which the first follows `column` columns.

        At the first step of a `generate()` it is made as large as that may need, and all steps are recorded.
        """
        now, batch = self._generation, len(embeds)
        window = self._windows.get(batch)
        is_known = now.checked and self._recorded.place(embeds.device) is self._place
        if is_known and window is not None and window.columns > column:
            self._windows.move_to_end(batch)
            return window
        shape = self._prepare(model, stock, embeds)[1]
        limit = getattr(model.config, "max_position_embeddings", column + 1)
        most = max(column + 1, min(column + (now.new_tokens or 1), limit))
        if (window := self._windows.get(batch)) is None or window.columns < most:
            self._leave(batch)
            size, dtype = shape.kv(batch, _power_of_two(most)), shape.kv_dtype
            try:
                with torch.inference_mode(False):
                    window = Window(torch.zeros(size, dtype=dtype, device=embeds.device))
            except torch.OutOfMemoryError as error:
                raise Refused("there is too little memory for the keys and values of its answer") from error
            self._windows[batch] = window
            if len(self._windows) > WINDOWS:
                self._leave(next(iter(self._windows)))
        self._windows.move_to_end(batch)
        columns = _power_of_two(column + 1)
        while columns <= _power_of_two(most):
            self._step_graph(model, stock, window, columns)
            columns *= 2
        now.checked = True
        return window

    def _leave(self, batch: int) -> None:
        """Give up the memory for steps of `batch` rows, and the functions that use it."""
        if (window := self._windows.pop(batch, None)) is not None:
            window.release()
            self._recorded.forget(lambda key: key[:2] == ("step", batch))

    def _step_graph(self, model: Any, stock: Callable[..., Any], window: Window, columns: int) -> StepGraph:
        """Of steps that attend to the first `columns` columns of `window`."""
        place, shape = self._place, self._shape
        if place is None or shape is None:
            raise Refused("a step before its window")
        attention = model.config._attn_implementation

        def record() -> StepGraph:
            window.release()  # the recording runs a step, which writes
            kv = window.kv[:, :, :, :columns]
            return StepGraph(*place, self._compiled(stock), shape, kv, attention == "eager")

        graph: StepGraph = self._recorded.get(("step", window.batch, columns, attention), record)
        return graph

    def _mask(self, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
        """The mask `[B, L]` of a prompt; of the mask that transformers has made of it for a static cache."""
        if mask is not None and mask.ndim == 4 and self._generation.own_masks:
            last = mask[:, 0, -1, :length]  # the last column may see all that are real
            mask = last if last.dtype == torch.bool else last == 0
        if mask is not None and mask.shape != (batch, length):
            raise Refused("a mask of other rows and columns than the prompt's")
        return mask


def _require_plain(model: Any, call: dict[str, Any]) -> Tensor:
    """The embeddings `[B, L, D]` of a call that may be replayed; raises Refused."""
    embeds = call.get("inputs_embeds")
    if not isinstance(embeds, Tensor) or embeds.device != model.device or embeds.dtype != model.dtype:
        raise Refused("embeddings are missing, or have another device or dtype than the model")
    extra = {
        name for name, value in call.items() if name not in _ARGUMENTS and value is not None and value is not False
    }
    if extra:
        raise Refused(f"the argument {min(extra)} of its forward()")
    if call.get("return_dict") is False or model.config.return_dict is False:
        raise Refused("a tuple is returned")
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(model.config, name, False):
            raise Refused(f"{name} in the config")
    attention = model.config._attn_implementation
    if attention not in ATTENTIONS:
        raise Refused(f"attention {attention!r} of the language model; graphs know {', '.join(ATTENTIONS)}")
    positions = call.get("position_ids")
    if positions is not None and positions.ndim != 2:
        raise Refused("positions of more than one kind")
    return embeds


def _require_whole(model: Any, cache: Any, columns: int) -> None:
    """Raise Refused unless all `columns` may be seen, and are on the device."""
    if getattr(cache, "offloading", False):
        raise Refused("a cache that is offloaded")
    window = getattr(model.config, "sliding_window", None)
    if window is not None and columns > window:
        raise Refused("more columns than the attention's window has")


def _outputs(hidden: Tensor, cache: Any) -> BaseModelOutputWithPast:
    of_cache: dict[str, Any] = {names.CACHE: cache}
    return BaseModelOutputWithPast(last_hidden_state=hidden, **of_cache)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _power_of_two(columns: int) -> int:
    return max(SMALLEST_WINDOW, 1 << (columns - 1).bit_length())

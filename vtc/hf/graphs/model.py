"""The graphs of one LLaVA: switched on and off, warmed up, described."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vtc.hf import names
from vtc.hf.graphs.capture import CudaRecorder, Recorder
from vtc.hf.graphs.language_calls import LanguageCalls
from vtc.hf.graphs.recorded import Recorded, Refused
from vtc.hf.graphs.vision_calls import VisionCalls

_ATTRIBUTE = "_vtc_graphs"  # of a model without a head


def recorder_of(device: torch.device) -> Recorder:
    """What records functions on a device; raises Refused if nothing does."""
    if why := why_not(device):
        raise Refused(why)
    return CudaRecorder(device)


def why_not(device: torch.device) -> str | None:
    """Why nothing can be replayed on a device, or None."""
    if device.type == "cpu":
        return "the model is on a CPU, where graphs gain nothing: computing takes longer than launching"
    if device.type != "cuda" or torch.version.hip is not None:
        where = "an AMD GPU" if device.type == "cuda" else device.type
        return f"the model is on {where}, and graphs were made for CUDA only"
    return None


class Graphs:
    """Parts of a LLaVA that are recorded once and then replayed as CUDA graphs. `print` shows what they did.

    A copy of the model has none.

    Parameters
    ----------
    base : LlavaModel
        The model without a head.
    limit : int
        How many graphs are kept. The one that was not used for the longest time leaves.
    compile : bool
        Whether the graphs are of code that torch.compile made, without dynamic shapes.
    recorder : callable, optional
        What records functions on a device.

    Attributes
    ----------
    replays : Counter
        Of each kind: "vision", of one call's images; "prompt"; "step", of one more token.
    refusals : Counter
        Calls that went the usual way, by reason.
    """

    def __init__(
        self,
        base: Any,
        limit: int = 32,
        compile: bool = False,
        recorder: Callable[[torch.device], Recorder] | None = None,
    ) -> None:
        self._base: Callable[[], Any] = weakref.ref(base)
        self.compile, self._recorder_of = compile, recorder or recorder_of
        self._recorded = Recorded(base, self._recorder_of, limit)
        made: Callable[[Any], Any] = _compiled if compile else lambda function: function
        self._vision = VisionCalls(self._recorded, made)
        self._language = LanguageCalls(self._recorded, made)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def replays(self) -> Counter[str]:
        return self._recorded.replays

    @property
    def refusals(self) -> Counter[str]:
        return self._recorded.refusals

    def __len__(self) -> int:
        """How many graphs there are now."""
        return len(self._recorded)

    def __str__(self) -> str:
        lines = [f"graphs: {len(self)} recorded" + (", of compiled code" if self.compile else "")]
        if self.replays:
            lines.append("replayed: " + ", ".join(f"{kind} {count}" for kind, count in self.replays.items()))
        lines += [f"not replayed: {reason} ({count})" for reason, count in self.refusals.items()]
        return "\n".join(lines)

    def close(self) -> None:
        """Switch the graphs off, and free their memory."""
        base = self._base()
        if base is not None and of(base) is self:
            del base.__dict__[_ATTRIBUTE]
            language = base.language_model
            if isinstance(vars(language).get("forward"), Forward):
                del language.__dict__["forward"]
        self.drop()

    def is_useful(self) -> bool:
        """Whether anything can be replayed on the model's device. If not, the log says why."""
        why = why_not(self._base().vision_tower.device)
        if why is not None:
            self._recorded.say(f"graphs are switched on, but nothing is replayed: {why}", why)
        return why is None

    def drop(self) -> None:
        """Forget all graphs; the next calls record theirs again. Changes of the model that they cannot see need it."""
        with self._recorded.lock:
            self._language.release_all()
            self._recorded.drop()

    def generate(self, generate: Callable[[], Any], cache: Cache | None, new_tokens: int, own_masks: bool) -> Any:
        """`generate()`, of a call with this `cache`, that adds at most `new_tokens` tokens.

        `own_masks` is whether the language model's masks are those that transformers makes of a mask `[B, L]`.
        """
        output = None
        self._is_ours(self._base().language_model)
        try:
            with self._language.generating(new_tokens, own_masks):
                output = generate()
        finally:  # also if a streamer raised an error
            self._language.release(names.cache_of(output) if cache is None else cache)
        return output

    def language(self, model: Any, stock: Callable[..., Any], call: dict[str, Any]) -> Any:
        """The language model's `stock(**call)`."""
        if not self._is_ours(model):  # and what wraps this call may move weights
            return stock(**call)
        return self._language(model, stock, call)

    def _is_ours(self, model: Any) -> bool:
        """Whether the `forward` of a language model is that of graphs. If not, the call counts as refused."""
        is_ours = isinstance(vars(model).get("forward"), Forward)
        if not is_ours:
            self._recorded.refuse("language model", "it or its forward() was replaced; use vtc.graphs(model) again")
        return is_ours

    def views(self, key: Hashable, function: Callable[[Tensor], Any], views: Tensor) -> Any:
        """`function(views)`; see `replayed`."""
        base = self._base()
        modules = [module for name, module in base.named_children() if name != "language_model"]
        key = (key, base.vision_tower.config._attn_implementation)
        return self._vision(key, modules, function, views)


class Forward:
    """The `forward` of a language model whose LLaVA has graphs. A copy is the model's own `forward`."""

    def __init__(self, model: Any, graphs: Graphs) -> None:
        self._model, self._graphs = weakref.ref(model), weakref.ref(graphs)
        self.__signature__ = inspect.signature(self._stock)

    @property
    def _stock(self) -> Any:
        model: Any = self._model()
        return types.MethodType(type(model).forward, model)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), "forward")  # of the copy, which has no other yet than that of its class

    def __call__(self, *args: Any, **call: Any) -> Any:
        model: Any = self._model()
        if torch.compiler.is_compiling():
            return type(model).forward(model, *args, **call)
        graphs = self._graphs()
        return self._stock(*args, **call) if args or graphs is None else graphs.language(model, self._stock, call)


def of(base: Any) -> Graphs | None:
    """The graphs of a LLaVA without its head, if they are switched on."""
    return base.__dict__.get(_ATTRIBUTE)


def replayed(base: Any, key: Callable[[], Hashable], function: Callable[[Tensor], Any], views: Tensor) -> Any:
    """`function(views)`, a tree of tensors and other values, for views `[..., 3, height, width]`.

    It is replayed if the LLaVA `base` has graphs. Then values that are no tensors are those of the first call. The
    result may depend on the modules of `base` besides its language model, and on what `key` returns.
    """
    graphs = of(base)
    if graphs is None or torch.compiler.is_compiling():
        return function(views)
    return graphs.views(key(), function, views)


def switch_on(base: Any, graphs: Graphs) -> None:
    """Let the LLaVA `base` use `graphs`, in place of those that it has.

    Raises
    ------
    ValueError
        If the `forward` of its language model was replaced by others.
    """
    if (before := of(base)) is not None:
        before.close()
    language = base.language_model
    own = vars(language).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(language).forward:
        raise ValueError(
            f"the forward() of the {type(language).__name__} was replaced, as accelerate does to move weights between "
            "devices, so its calls cannot be recorded; load the model on one device"
        )
    base.__dict__[_ATTRIBUTE] = graphs
    language.__dict__["forward"] = Forward(language, graphs)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for each shape; also for more shapes than torch.compile takes by itself."""
    compiled = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024):
            return compiled(*args, **kwargs)

    return run

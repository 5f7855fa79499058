"""`python -m bench launches`: what a call costs the host, stock beside VTC: kernels, reads of the device, calls of VTC.

The model is the bundled one, with one prompt of one image. The counts do not depend on the machine; microseconds do.

- A kernel is an operator of PyTorch that computes. Views and allocations launch none.
- A Triton launch is one launch of a kernel of this project: the launchers run, and the launches are counted and left
  out. PyTorch computes the results.
- A read waits for the device: `tolist`, `item`, the truth of a tensor, `equal`, `nonzero`.
- Calls are those of Python functions of VTC and of its kernels' launchers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vtc
from bench import record
from bench.record import Provenance
from vtc import tiny
from vtc.tiny.scenes import Scene

KEEP = 64
STEPS = 8  # decoding steps whose mean is the step's
FILE = "launches.jsonl"
BEFORE = "before.jsonl"  # of an earlier revision, for the table
STAGES = {
    "image": "`get_image_features()`",
    "prompt": "`model()`, the image included",
    "first token": "`generate()` of one token, the image included",
    "step": "one more token of `generate()`",
}
VARIANTS = {
    "stock": "the stock model",
    "enable": "`vtc.enable`",
    "block": "in a `vtc.compress` block",
    "attention": '`attn_implementation="vtc"` for all parts of the model',
    "prune_layer": "`vtc.enable` with `prune_layer=2`",
}
COUNTS = ("kernels", "launches", "reads", "calls")
_READS = {"aten::item", "aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}
_NO_KERNEL = {
    *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"),
    *("aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::detach", "aten::is_same_size"),
}  # besides views
_COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>"}  # calls of their own up to Python 3.11


@dataclasses.dataclass(kw_only=True)
class Launches(Provenance):
    """The counts of one stage of one variant. Those of a "step" are means."""

    model: str
    stage: str
    variant: str
    keep: int
    kernels: float
    launches: float
    reads: float
    calls: float
    us: float  # from the call to its return on this CPU, arithmetic included: the least of five


class Count(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(COUNTS, 0)
        self.homes = tuple(f"{each}{os.sep}" for each in _homes())
        self.in_operation = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name.startswith("vtc::"):
            return self.operation(name.removeprefix("vtc::"), func, args)
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if name in _READS:
            self.counts["reads"] += not self.in_operation
        elif not (is_view or name in _NO_KERNEL or (self.in_operation and name == "aten::aminmax")):
            self.counts["kernels"] += 1
        return func(*args, **kwargs)

    def operation(self, op: str, func: Any, args: Any) -> Any:
        """Count what an operation of VTC runs on a GPU; it looks at the range of indices on a CPU only."""
        backend = [each.name for each in func._schema.arguments].index("backend")
        played, real = ((*args[:backend], name, *args[backend + 1 :]) for name in ("triton", "torch"))
        self.in_operation = True
        try:
            with self:
                getattr(importlib.import_module(f"vtc.ops.{op}"), f"_{op}")(*played)
        finally:
            self.in_operation = False
        sys.setprofile(None)
        result = func(*real)
        sys.setprofile(self.profile)
        return result

    def profile(self, frame: Any, event: str, _: Any) -> None:
        """For `sys.setprofile`."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self.homes) and code.co_name not in _COMPREHENSIONS:
            self.counts["calls"] += 1

    def read(self, real: Callable[[Any], Any], tensor: Any) -> Any:
        """In place of `Tensor.tolist`, which dispatches nothing on a CPU."""
        self.counts["reads"] += 1
        return real(tensor)

    def launch(self, real: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """In place of a launch in Triton's interpreter."""
        self.counts["launches"] += 1


def _homes() -> list[str]:
    kernels: Any = importlib.import_module("vtc_kernels.tuning").__file__
    return [str(Path(vtc.__file__).parent), str(Path(kernels).parent)]


def counts(call: Callable[[], Any]) -> dict[str, int]:
    """The counts of one `call`."""
    interpreter = importlib.import_module("triton.runtime.interpreter").GridExecutor
    counter = Count()
    with contextlib.ExitStack() as stack:
        for owner, name, count in ((torch.Tensor, "tolist", counter.read), (interpreter, "__call__", counter.launch)):
            real = getattr(owner, name)
            stack.callback(setattr, owner, name, real)
            setattr(owner, name, _method(count, real))
        stack.enter_context(counter)
        stack.callback(sys.setprofile, None)
        sys.setprofile(counter.profile)
        call()
    return counter.counts


def _method(count: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: count(real, *args, **kwargs)


@contextlib.contextmanager
def variant(name: str) -> Iterator[Any]:
    """The bundled model, as the variant `name` runs it."""
    model, _ = tiny.load(**({"attn_implementation": "vtc"} if name == "attention" else {}))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if name == "block":
            stack.enter_context(vtc.compress(model, keep=KEEP))
        elif name == "attention":
            vtc.configure(model, keep=KEEP)
        elif name != "stock":
            vtc.enable(model, keep=KEEP, **({"prune_layer": 2} if name == "prune_layer" else {}))
        yield model


def calls(model: Any) -> dict[str, Callable[[], Any]]:
    """The stages of `model` as calls; of "step", STEPS steps more than of "first token"."""
    inputs = prompt()

    def generate(tokens: int) -> Callable[[], Any]:
        return lambda: model.generate(**inputs, max_new_tokens=tokens, do_sample=False)

    return {
        "image": lambda: model.get_image_features(pixel_values=inputs["pixel_values"]),
        "prompt": lambda: model(**inputs, logits_to_keep=1),
        "first token": generate(1),
        "step": generate(1 + STEPS),
    }


@functools.cache
def prompt() -> dict[str, Any]:
    """A question on an image."""
    _, processor = tiny.load()
    scene = Scene("test", 1)
    text = tiny.prompt(scene.questions[0].text)
    return dict(processor(images=scene.image, text=text, return_tensors="pt"))


def measure(names: tuple[str, ...] = tuple(VARIANTS), time_them: bool = True) -> Iterator[Launches]:
    """The records of each of the variants `names`, stage by stage.

    Raises
    ------
    ValueError
        If Triton was imported without its interpreter.
    """
    require_interpreter()
    for name in names:
        with variant(name) as model:
            found = {}
            for stage, call in calls(model).items():
                call()  # what happens at the first call only does not count
                found[stage] = counts(call) | {"us": _microseconds(call) if time_them else 0.0}
            first = found["first token"]
            found["step"] = {key: (each - first[key]) / STEPS for key, each in found["step"].items()}
        for stage, each in found.items():
            facts = record.provenance(torch.device("cpu"))
            yield Launches(model="bundled", stage=stage, variant=name, keep=KEEP, **each, **facts)


def require_interpreter() -> None:
    """Have the launchers run without a GPU, or raise ValueError."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    if not importlib.import_module("vtc_kernels.tuning").INTERPRETED:
        raise ValueError("bench launches plays Triton's launches; set TRITON_INTERPRET=1 before Python starts")


def _microseconds(call: Callable[[], Any], samples: int = 5) -> float:
    best = float("inf")
    call()
    for _ in range(samples):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return round(1e6 * best, 1)


def run(out: Path | None, say: Callable[[str], None] = print) -> int:
    """Measure all variants; replaces the record `out` / FILE. Returns the exit status."""
    if out:
        out.mkdir(parents=True, exist_ok=True)
    made = list(measure())
    say(table(made))
    if out:
        (out / FILE).unlink(missing_ok=True)
        record.append(out / FILE, made)
    return 0


def table(after: list[Launches], before: Sequence[Launches] = ()) -> str:
    """Markdown: the counts of each stage and variant; in brackets those of an earlier revision where they differ."""
    known = {(each.stage, each.variant): each for each in before}
    rows = [["stage", "variant", "kernels", "Triton launches", "reads", "calls of VTC"]]
    for stage in STAGES:
        for each in after:
            if each.stage == stage:
                old = known.get((stage, each.variant))
                shown = [_change(getattr(each, name), old and getattr(old, name)) for name in COUNTS]
                rows.append([stage, each.variant, *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _change(now: float, old: float | None) -> str:
    text, before = f"{now:.4g}", None if old is None else f"{old:.4g}"
    return text if before in (None, text) else f"{text} ({before})"

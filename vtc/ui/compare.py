"""One question about one image, answered at several settings: what the page shows, without the page."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

import vtc
from vtc.api import selects
from vtc.config import VTCConfig, kept_count
from vtc.eval import BUNDLED, ask
from vtc.eval.answerer import Answerer
from vtc.eval.measure import RUNS, FirstToken, first_tokens
from vtc.eval.setting import NONE, Setting, ignores_keep
from vtc.images import ImageError, load_image
from vtc.methods import METHODS, PLACES
from vtc.overlay import SIDE
from vtc.plan import patch_grid
from vtc.ui.examples import example_of

CHOICES = tuple(name for name in METHODS if name != NONE)
MAX_QUESTION = 500  # characters
MAX_NEW_TOKENS = 256


class Stopped(Exception):
    """The server ends."""


class Choice(NamedTuple):
    """A method and a number of tokens, as the page gives them. Methods that ignore the number get none."""

    method: str
    keep: int


@dataclass(frozen=True)
class Column:
    """What one setting gave.

    Attributes
    ----------
    name : str
        "all tokens", or the method.
    answer : str
    right : bool, optional
        None if the truth is not known.
    tokens : float
        Visual tokens that the language model got, or kept.
    image : Image
        With the kept patches; the image as the model saw it if there is nothing to draw.
    heatmap : Image, optional
        The scores of the patches.
    note : str
        Why there is nothing to draw, or how many patches are drawn; may be empty.
    cost : FirstToken, optional
        None before it is measured.
    """

    name: str
    answer: str
    right: bool | None
    tokens: float
    image: Image.Image
    heatmap: Image.Image | None = None
    note: str = ""
    cost: FirstToken | None = None


class Comparison:
    """A model and its processor. It holds nothing of a visitor, so that any number of them can use it.

    Parameters
    ----------
    model, processor
        From `vtc.eval.ask.load`. Nothing on them changes.
    name : str
        Of the model, to be shown.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.answerer = Answerer(model, processor)
        self.is_bundled = name == BUNDLED
        self.name = name if self.is_bundled else Path(name).name
        self.grid = patch_grid(model.config.vision_config)
        self._stopping, self._computing = threading.Event(), threading.Lock()

    @property
    def num_tokens(self) -> int:
        """N, the visual tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def default_keep(self) -> int:
        """The number of tokens kept if nothing is said."""
        return kept_count(VTCConfig(), self.num_tokens)

    @property
    def device(self) -> str:
        """Where it runs and how, as text."""
        model = self.answerer.model
        threads = f", {ask.counted(torch.get_num_threads(), 'thread')}" if model.device.type == "cpu" else ""
        return f"{model.device}, {str(model.dtype).removeprefix('torch.')}{threads}"

    def setting(self, choice: Choice) -> Setting:
        """Raises ValueError if there is no such method, or the number of tokens is out of range."""
        if choice.method not in CHOICES:
            raise ValueError(f"there is no method {choice.method!r}; take one of {', '.join(CHOICES)}")
        if ignores_keep(choice.method, {}):
            return Setting(choice.method)
        return Setting(choice.method, {"keep": whole(choice.keep, 1, self.num_tokens, "the number of tokens to keep")})

    def ask(
        self, image: Image.Image, question: str, choices: Sequence[Choice], length: int, timed: bool = True
    ) -> Iterator[list[Column]]:
        """Answer with all tokens, then at each choice; and measure, in turns.

        Parameters
        ----------
        length : int
            Longest answer in tokens.
        timed : bool
            Whether to measure.

        Yields
        ------
        list of Column
            All tokens first. Once with the answers and, if `timed`, once more with what they cost.

        Raises
        ------
        ValueError
            For a question, a choice or a length that is not accepted, before anything is computed.
        Stopped
            Once `stop` was called.
        """
        if not question.strip():
            raise ValueError("the question is empty; ask something about the image")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"the question has {len(question)} characters; shorten it to {MAX_QUESTION}")
        length = whole(length, 1, MAX_NEW_TOKENS, "the longest answer in tokens")
        settings = [Setting(), *map(self.setting, choices)]
        with self._computing:
            self._check()
            model, processor = self.answerer.model, self.answerer.processor
            inputs = ask.prepare(model, processor, [image], question)
            seen = ask.as_seen(image, processor, inputs["pixel_values"][0])
            example = example_of(image) if self.is_bundled else None
            columns = []
            for setting in settings:
                texts, _, kept = self.answerer.generate(
                    inputs, setting, max_new_tokens=length, stopping_criteria=[self._is_done]
                )
                right = example.is_right(question, texts[0]) if example else None
                column = Column(setting.name, texts[0], right, kept.visual_tokens if kept else 0, self._plain(seen))
                columns.append(self._drawn(column, setting, seen, inputs))
        yield columns
        if timed:
            with self._computing:
                self._check()
                costs = first_tokens(self.answerer, inputs, settings, advance=self._check)
            yield [replace(column, cost=cost) for column, cost in zip(columns, costs, strict=True)]

    def stop(self) -> None:
        """End what is computed at its next token or run, and wait for that: a thread in torch must not be cut off."""
        self._stopping.set()
        with self._computing:
            pass

    def unknown_words(self, question: str) -> list[str]:
        """Words that the model's tokenizer does not know."""
        return ask.unknown_words(self.answerer.processor, question)

    def footnote(self) -> str:
        """How costs are measured."""
        return (
            f"First token: median (fastest to slowest) of {RUNS} warm runs that take turns, on {self.device}, from "
            "pixels to token. KV cache: after the prompt, all layers."
        )

    def _check(self, count: int = 0) -> None:
        """Called after every timed run."""
        if self._stopping.is_set():
            raise Stopped

    def _is_done(self, ids: Any, scores: Any) -> bool:
        """Called after every token, as a criterion of `generate()`."""
        self._check()
        return False

    def _plain(self, seen: Image.Image) -> Image.Image:
        """The image as the model saw it, of the size of an overlay."""
        rows, columns = self.grid
        patch = round(SIDE / max(rows, columns))
        return ImageOps.fit(seen.convert("RGB"), (columns * patch, rows * patch), Image.Resampling.BICUBIC)

    def _drawn(self, column: Column, setting: Setting, seen: Image.Image, inputs: Any) -> Column:
        """The column with its pictures, if the method selects patches."""
        if not setting.compresses:
            return replace(column, name="all tokens")
        if not selects(METHODS[setting.name]):
            return replace(column, note=f"No patches to draw: {METHODS[setting.name].scores}.")
        selection = vtc.select(self.answerer.model, inputs, method=setting.method, **setting.options)
        patches = len(selection.indices[0]) if selection.counts is None else int(selection.counts[0])
        note = f"{patches} of the tokens {'is a patch' if patches == 1 else 'are patches'}, outlined below."
        if layers := VTCConfig.of(method=setting.method, **setting.options).prune_after:
            note += f" All tokens pass the first {layers} layers."
        heatmap = vtc.heatmap(seen, selection)
        return replace(column, image=vtc.overlay(seen, selection), heatmap=heatmap, note=note)


def whole(value: Any, low: int, high: int, what: str) -> int:
    """`value`, which is what a browser sent, as an int. Raises ValueError if it is no whole number in this range."""
    if isinstance(value, int | float) and low <= value <= high and value == int(value):
        return int(value)
    raise ValueError(f"{what} is {value!r:.40}; take a whole number from {low} to {high}")


def described(method: str) -> str:
    """What a method does, in a line."""
    about = METHODS[method]
    places = " or ".join(PLACES[place] for place in about.prunes)
    paper = f" {about.paper}." if about.paper else ""
    return f"Scores: {about.scores}. Drops tokens {places}.{paper}"


def read(file: Mapping[str, Any] | None, folder: Path) -> Image.Image:
    """The image in an uploaded file, which has a "path". Raises ValueError if there is none or it cannot be used.

    The path comes from the browser. Uploads lie in `folder`; what is elsewhere is refused unseen, there or not.
    """
    if file is None:
        raise ValueError("there is no image; upload or paste one, or take an example")
    path = str(file.get("path")) if isinstance(file, Mapping) else ""
    if "\0" in path or not Path(path).resolve().is_relative_to(folder.resolve()):
        raise ValueError("this file was not uploaded here; upload or paste an image")
    try:
        return load_image(path)
    except ImageError as error:  # the visitor knows the file by its name
        raise ImageError(str(error).replace(str(path), Path(path).name)) from error

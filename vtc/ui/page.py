"""The page: image and controls left, one column a setting right. What it shows is computed in `vtc.ui.compare`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vtc.eval.setting import ignores_keep
from vtc.ui import cards
from vtc.ui.compare import (
    CHOICES,
    MAX_NEW_TOKENS,
    MAX_QUESTION,
    Choice,
    Column,
    Comparison,
    Stopped,
    described,
    read,
)
from vtc.ui.examples import EXAMPLES, example_of

OFF = "none"  # of the second method
COLUMNS = 3
QUEUE = 16  # requests that wait; further ones are refused
STYLE = Path(__file__).with_name("style.css")

_log = logging.getLogger("vtc")


def theme() -> gr.themes.Base:
    """Fonts of the visitor's system, so that none is loaded."""
    font, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=font, font_mono=mono)


def build(comparison: Comparison, folder: Path) -> gr.Blocks:
    """The page of a model.

    Parameters
    ----------
    folder : Path
        For the examples' images; gradio must be allowed to show what is in it.
    """
    files = [str(folder / example.name) for example in EXAMPLES]
    for example, file in zip(EXAMPLES, files, strict=True):
        example.scene.image.save(file)
    total, keep = comparison.num_tokens, comparison.default_keep

    # A handler holds nothing between calls but the model, so visitors do not meet.
    # Its inputs come as the browser sent them: gradio would decode the image itself, and `compare` checks the others.
    def look(file: dict[str, Any] | None, question: str) -> tuple[str, str]:
        if file is None:
            return "", ""
        try:
            return "", cards.truth(example_of(read(file, folder)), question)
        except ValueError as error:
            return cards.error(str(error)), ""

    def fill(number: int) -> tuple[str, str]:
        return files[number], EXAMPLES[number].question

    def adapt(method: str) -> tuple[Any, str]:
        if method == OFF:
            return gr.update(visible=False), ""
        fixed = ignores_keep(method, {})
        label = f"{method} chooses how many" if fixed else "Keep"
        return gr.update(visible=True, interactive=not fixed, label=label), cards.hint(described(method))

    def answer(file: dict[str, Any] | None, question: str, *controls: Any) -> Iterator[list[Any]]:
        try:
            first, first_keep, second, second_keep, length, timed = controls
            choices = [Choice(first, first_keep), *([] if second == OFF else [Choice(second, second_keep)])]
            for columns in comparison.ask(read(file, folder), question, choices, length, timed):
                done = columns[0].cost is not None
                yield [said(question), *shown(columns, timed), cards.hint(comparison.footnote()) if done else ""]
        except Stopped:
            return
        except ValueError as error:
            yield failed(str(error))
        except Exception as error:  # a visitor gets one line, whoever runs the server the rest
            _log.exception("a request failed")
            yield failed(f"this could not be computed ({type(error).__name__}); the server's terminal says more")

    def said(question: str) -> str:
        words = comparison.unknown_words(question)
        return cards.hint(f"The model does not know: {' '.join(words)}") if words else ""

    def shown(columns: list[Column], timed: bool) -> list[Any]:
        updates: list[Any] = []
        for column in columns:
            updates += [
                gr.update(visible=True),
                cards.card(column, total, columns[0], timed),
                gr.update(value=column.image, label="Kept patches" if column.heatmap else "The image"),
                gr.update(value=column.heatmap, visible=column.heatmap is not None),
            ]
        return updates + hidden(COLUMNS - len(columns))

    def hidden(count: int) -> list[Any]:
        return [gr.update(visible=False), "", None, gr.update(value=None, visible=False)] * count

    def failed(text: str) -> list[Any]:
        return [cards.error(text), *hidden(COLUMNS), ""]

    with gr.Blocks(title="VTC", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        _text(cards.header(comparison.name, comparison.is_bundled, total))
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                image = gr.Image(
                    files[0], label="Image", sources=["upload", "clipboard"], height=220, elem_id="image", buttons=[]
                )
                bad = _text("", "bad")
                question = gr.Textbox(
                    EXAMPLES[0].question, label="Question", max_lines=4, max_length=MAX_QUESTION, elem_id="question"
                )
                with gr.Row():
                    method = gr.Dropdown(
                        list(CHOICES), value=CHOICES[0], label="Method", min_width=110, scale=4, elem_id="method"
                    )
                    kept = gr.Slider(1, total, keep, step=1, label="Keep", min_width=160, scale=5, elem_id="keep")
                about = _text(cards.hint(described(CHOICES[0])))
                with gr.Row():
                    second = gr.Dropdown(
                        [OFF, *CHOICES], value=OFF, label="Compare with", min_width=110, scale=4, elem_id="second"
                    )
                    second_kept = gr.Slider(
                        1,
                        total,
                        keep,
                        step=1,
                        label="Keep",
                        min_width=160,
                        scale=5,
                        elem_id="second-keep",
                        visible=False,
                    )
                second_about = _text("")
                run = gr.Button("Ask", variant="primary", elem_id="ask")
                with gr.Accordion("More", open=False):
                    length = gr.Slider(1, MAX_NEW_TOKENS, 64, step=1, label="Longest answer, in tokens")
                    timed = gr.Checkbox(True, label="Measure time to first token")
            with gr.Column(scale=9, min_width=320):
                examples = gr.Dataset(
                    components=[gr.Image(visible=False)],
                    samples=[[file] for file in files],
                    label="Examples: scenes whose truth is known. One click asks a question about it.",
                    type="index",
                    elem_id="examples",
                )
                truth = _text(cards.truth(EXAMPLES[0], EXAMPLES[0].question), "truth")
                status = _text(cards.START, "status")
                outputs: list[Any] = []
                with gr.Row():
                    for number in range(COLUMNS):
                        with gr.Column(visible=False, min_width=220, elem_id=f"column-{number}") as column:
                            card = _text("", f"card-{number}")
                            picture = _picture("The image", f"kept-{number}")
                            scores = _picture("Scores, black to yellow", f"scores-{number}")
                        outputs += [column, card, picture, scores]
                footnote = _text("", "footnote")

        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        method.change(adapt, method, [kept, about], **quick)
        second.change(adapt, second, [second_kept, second_about], **quick)
        gr.on(
            [image.change, question.change],
            look,
            [image, question],
            [bad, truth],
            preprocess=False,
            trigger_mode="always_last",
            **quick,
        )
        slow: dict[str, Any] = {
            "fn": answer,
            "inputs": [image, question, method, kept, second, second_kept, length, timed],
            "outputs": [status, *outputs, footnote],
            "show_progress": "minimal",
            "show_progress_on": [run],
            "api_visibility": "private",
            "preprocess": False,
            "concurrency_id": "model",
            "concurrency_limit": 1,
        }
        gr.on([run.click, question.submit], trigger_mode="once", **slow)
        examples.click(fill, examples, [image, question], **quick).then(**slow)
    page.queue(max_size=QUEUE, default_concurrency_limit=4, api_open=False)
    return page


def _text(html: str, name: str | None = None) -> gr.HTML:
    return gr.HTML(html, elem_id=name, elem_classes=["vtc-text"])


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes=["vtc-picture"],
    )

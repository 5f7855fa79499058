"""The parts of the page that are text, as HTML. Whatever a visitor, a file or a model may have said is escaped."""

from __future__ import annotations

from html import escape

from vtc.eval.measure import FirstToken
from vtc.ui.compare import Column
from vtc.ui.examples import Example

VERDICTS = {
    None: "",
    True: '<span class="vtc-right">&#10003; right</span>',
    False: '<span class="vtc-wrong">&#10007; wrong</span>',
}
START = '<div class="vtc-hint">Press <b>Ask</b>, or take an example.</div>'


def header(name: str, is_bundled: bool, num_tokens: int) -> str:
    """The head of the page."""
    model = "the bundled model" if is_bundled else f"<code>{escape(name)}</code>"
    hint = ""
    if is_bundled:
        hint = " It knows its own scenes only: for photographs, start <code>vtc ui --model</code> with a LLaVA-1.5."
    return (
        '<div class="vtc-header"><h1>VTC</h1><p>One question, answered with all '
        f"{num_tokens} visual tokens of an image and with fewer, by {model}.{hint}</p></div>"
    )


def card(column: Column, num_tokens: int, first: Column, timed: bool = True) -> str:
    """One setting: its answer and, if `timed`, what it costs, also as a share of what `first`, all tokens, costs."""
    is_first = column is first
    share = "" if is_first else f" ({100 * column.tokens / num_tokens:.0f}&nbsp;%)"
    rows = [("tokens", f"{column.tokens:.0f} of {num_tokens}{share}")]
    if column.cost is not None:
        rows += _cost(column.cost, None if is_first else first.cost)
    elif timed:
        rows += [("first token", "measuring &hellip;"), ("KV cache", "&hellip;")]
    answer = escape(column.answer) or "<i>(nothing)</i>"
    figures = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return (
        f'<div class="vtc-card"><div class="vtc-name">{escape(column.name)}</div>'
        f'<div class="vtc-answer"><span>{answer}</span>{VERDICTS[column.right]}</div>'
        f"<dl>{figures}</dl><p>{escape(column.note)}</p></div>"
    )


def _cost(cost: FirstToken, full: FirstToken | None) -> list[tuple[str, str]]:
    low, high = min(cost.seconds), max(cost.seconds)
    time = f"{1000 * cost.median:.0f}&nbsp;ms <small>({1000 * low:.0f} to {1000 * high:.0f})</small>"
    cache = f"{cost.kv_bytes / 2**20:.2f}&nbsp;MiB"
    if full is None:
        return [("first token", time), ("KV cache", cache)]
    if low <= max(full.seconds) and min(full.seconds) <= high:
        time += "<br><span>no clear difference</span>"
    else:
        time += f"<br><span>{full.median / cost.median:.1f} times as fast</span>"
    return [("first token", time), ("KV cache", f"{cache} ({100 * cost.kv_bytes / full.kv_bytes:.0f}&nbsp;%)")]


def truth(example: Example | None, question: str = "") -> str:
    """What an example shows, and the right answer to the question if it is known."""
    if example is None:
        return ""
    right = example.answer_to(question)
    answer = "" if right is None else f" Right answer: <b>{escape(right)}</b>."
    return f'<div class="vtc-truth"><b>Truth.</b> {escape(example.truth)}{answer}</div>'


def error(text: str) -> str:
    """An error, in one line."""
    return f'<div class="vtc-error" role="alert">{escape(" ".join(text.split()))}</div>'


def hint(text: str) -> str:
    """A remark."""
    return f'<div class="vtc-hint">{escape(text)}</div>'

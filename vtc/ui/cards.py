"""The parts of the page that are text, as HTML. Whatever a visitor, a file or a model may have said is escaped."""

from __future__ import annotations

from html import escape

from vtc.eval.measure import FirstToken
from vtc.ui.compare import Column
from vtc.ui.examples import Example

VERDICTS = {
    True: '<span class="vtc-right">&#10003; right</span>',
    False: '<span class="vtc-wrong">&#10007; wrong</span>',
}


def header(name: str, is_bundled: bool, num_tokens: int) -> str:
    """The head of the page."""
    model = "the bundled model" if is_bundled else f"<code>{escape(name)}</code>"
    hint = ""
    if is_bundled:
        hint = (
            " It knows its own scenes only and says nothing sensible about photographs: for those, start "
            "<code>vtc ui --model</code> with a LLaVA-1.5."
        )
    return (
        f'<div class="vtc-header"><h1>VTC</h1><p>One question, answered with all {num_tokens} visual tokens of an image '
        f"and with fewer, by {model}.{hint}</p></div>"
    )


def card(column: Column, num_tokens: int, first: Column, timed: bool = True) -> str:
    """One setting: its answer and, if `timed`, what it costs, also as a share of what `first`, all tokens, costs."""
    tokens = f"{column.tokens:.0f} of {num_tokens}"
    rows = [("visual tokens", tokens, "" if column is first else f"{100 * column.tokens / num_tokens:.0f} %")]
    if timed and column.cost is None:
        rows += [("first token", "&hellip;", ""), ("KV cache", "&hellip;", "")]
    elif column.cost is not None:
        rows += _cost(column.cost, first.cost if column is not first else None)
    answer = escape(column.answer) or "<i>(nothing)</i>"
    verdict = "" if column.right is None else VERDICTS[column.right]
    body = "".join(f"<tr><th>{name}</th><td>{value}</td><td>{change}</td></tr>" for name, value, change in rows)
    return (
        f'<div class="vtc-card"><div class="vtc-name">{escape(column.name)}</div>'
        f'<div class="vtc-answer"><span>{answer}</span>{verdict}</div>'
        f"<table>{body}</table><p>{escape(column.note)}</p></div>"
    )


def _cost(cost: FirstToken, full: FirstToken | None) -> list[tuple[str, str, str]]:
    low, high = min(cost.seconds), max(cost.seconds)
    time = f"{1000 * cost.median:.0f} ms <small>({1000 * low:.0f}&ndash;{1000 * high:.0f})</small>"
    cache = f"{cost.kv_bytes / 2**20:.2f} MiB"
    if full is None:
        return [("first token", time, ""), ("KV cache", cache, "")]
    faster = f"{full.median / cost.median:.1f}&times; as fast"
    if low <= max(full.seconds) and min(full.seconds) <= high:
        faster = "no clear difference"
    return [("first token", time, faster), ("KV cache", cache, f"{100 * cost.kv_bytes / full.kv_bytes:.0f} %")]


def truth(example: Example | None, question: str = "") -> str:
    """What an example shows, and the right answer to the question if it is known."""
    if example is None:
        return ""
    right = example.answer_to(question)
    answer = "" if right is None else f" Right answer: <b>{escape(right)}</b>."
    return f'<div class="vtc-truth"><b>Truth.</b> {escape(example.truth)}{answer}</div>'


def message(text: str) -> str:
    """An error, in one line."""
    return f'<div class="vtc-error" role="alert">{escape(" ".join(text.split()))}</div>'


def hint(text: str) -> str:
    """A remark."""
    return f'<div class="vtc-hint">{escape(text)}</div>'

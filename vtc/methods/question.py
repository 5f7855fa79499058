"""The question of a prompt: which of its tokens count as words."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vtc.methods.base import Question

# The classes of words that MMTok (arXiv 2508.18264) leaves out; the words are VTC's choice.
FUNCTION_WORDS = (
    *("a", "an", "the"),
    *("am", "is", "are", "was", "were", "be", "been", "being"),
    *("have", "has", "had", "having", "do", "does", "did", "doing", "done"),
    *("i", "me", "my", "mine", "you", "your", "yours", "he", "him", "his", "she", "her", "hers", "it", "its"),
    *("we", "us", "our", "ours", "they", "them", "their", "theirs", "this", "that", "these", "those", "there"),
    *("what", "which", "who", "whom", "whose", "where", "when", "why", "how"),
    *("and", "or", "but", "so", "if", "then"),
    *("of", "in", "on", "at", "to", "from", "by", "with", "for", "about", "into", "over", "under"),
    *("question", "answer"),
)
PUNCTUATION = "?!.,:;'\"()[]-/\n"


def ignored_ids(tokenizer: Any, template: str | Iterable[str] = ()) -> tuple[int, ...]:
    """The tokens of a prompt that are no words of its question, for the option `ignore` of "mmtok" and "cdpruner".

    They are the tokenizer's special tokens, punctuation, and function words: articles, forms of be, have and do,
    pronouns, question words, conjunctions, prepositions, "question" and "answer". MMTok (arXiv 2508.18264) names these
    classes, and the words are VTC's choice. A word is ignored in lower case, capitalised and in upper case, at the
    beginning of a line and after a space, if it is one token there: parts of a word may be in others.

    Parameters
    ----------
    tokenizer
        Of transformers, as in `processor.tokenizer`.
    template : str or iterable of str
        Texts of the prompt around the question, such as "USER:", or an instruction that all questions of a benchmark
        end with. All of their tokens are ignored, also where a question has them.

    Returns
    -------
    tuple of int
        Ascending.
    """

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = set(tokenizer.all_special_ids)
    for text in [template] if isinstance(template, str) else template:
        found.update(tokens(text))
    forms = {form for word in FUNCTION_WORDS for form in (word, word.capitalize(), word.upper())}
    contexts = [("", ""), ("a ", "a"), ("a\n", "a\n")]  # what is before a word, and which of it makes tokens of its own
    texts = [(before + form, own) for form in forms for before, own in contexts]
    texts += [(before + mark, before) for mark in PUNCTUATION for before in ("", "a", "a ")]
    for text, before in texts:
        first = tokens(before.rstrip(" ")) if before else []
        ids = tokens(text)
        if ids[: len(first)] == first and len(ids) == len(first) + 1:
            found.add(ids[-1])
    return tuple(sorted(found))


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """The option `name` as a tuple. A list is accepted, as a saved config has it.

    Raises
    ------
    ValueError
        If `value` is no tuple or list of token ids.
    """
    if not isinstance(value, (tuple, list)) or not all(type(each) is int and each >= 0 for each in value):
        raise ValueError(
            f"{name} must be a tuple of token ids, integers of at least 0, got {value!r}; "
            "vtc.methods.question.ignored_ids(processor.tokenizer) makes one"
        )
    return tuple(value)


def word_weights(question: Question, ignore: tuple[int, ...]) -> Tensor:
    """The share of each token in a mean over the words of its question: float32 `[B, T]`, 0 at all others.

    Words are the text tokens that are not among `ignore`; all text tokens where no other is left.
    """
    words = question.is_text
    if ignore:
        ignored = _ascending(ignore, question.ids)
        places = torch.searchsorted(ignored, question.ids.contiguous()).clamp(max=len(ignored) - 1)
        words = words & (ignored[places] != question.ids)  # not torch.isin, which waits for the device
    words = torch.where(words.any(dim=1, keepdim=True), words, question.is_text)
    return words.float() / words.sum(dim=1, keepdim=True).clamp(min=1)


def _ascending(ids: tuple[int, ...], like: Tensor) -> Tensor:
    """The `ids` in ascending order, int64, on the device of `like`: copied there once, not at every call."""
    # A tracer's tensors have no values, and must not outlive it.
    if type(like) is Tensor and not torch.compiler.is_compiling():
        return _kept(ids, like.device)
    return torch.tensor(sorted(ids), dtype=torch.int64, device=like.device)


@functools.lru_cache(maxsize=16)
def _kept(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sorted(ids), dtype=torch.int64, device=device)


def sum_of_tokens(terms: Tensor) -> Tensor:
    """Sums over the tokens of `[B, T, N]`: `[B, N]`.

    The upper half is added to the lower half until one is left. So zeros at the end change no bit, and an image's sum
    does not depend on how many tokens the other images of the batch have.
    """
    length = terms.shape[1]
    while length > 1:
        half = 1 << (length - 1).bit_length() - 1  # the largest power of 2 below the length
        terms = torch.cat([terms[:, : length - half] + terms[:, half:length], terms[:, length - half : half]], dim=1)
        length = half
    return terms[:, 0]

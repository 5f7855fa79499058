"""DART's choice against a slow transcription of its rule."""

import pytest
import torch
from support.golden import methods as golden

from vtc.methods import METHODS

LENGTH, IMAGES = 30, range(4, 24)


def choose(keys, hidden, is_image, real, keep, **options):
    """Which of the tokens `[B, L]` stay, and the scores."""
    method = METHODS["dart"](**options)
    keep = torch.tensor(keep)
    scores = method.prompt_scores(keys, hidden, is_image, real, keep)
    assert scores.dtype == torch.float32
    return method.keep_prompt(scores, is_image, keep), scores


def prompts(seed=0, rows=3, heads=2):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, heads, LENGTH, 4, generator=generator)
    hidden = torch.randn(rows, LENGTH, 7, generator=generator)
    is_image = torch.zeros(rows, LENGTH, dtype=torch.bool)
    is_image[:, IMAGES.start : IMAGES.stop] = True
    return keys, hidden, is_image, torch.ones_like(is_image)


@pytest.mark.parametrize("keep", [1, 3, 4, 5, 11, 12, 13, 19, 20])
@pytest.mark.parametrize("options", [{}, {"image_pivots": 1, "text_pivots": 0}, {"image_pivots": 2, "text_pivots": 9}])
def test_the_choice_is_that_of_the_rule(keep, options):
    keys, hidden, is_image, real = prompts(seed=keep)
    stays, scores = choose(keys, hidden, is_image, real, [keep] * 3, **options)
    for row in range(3):
        expected = golden.dart(keys[row].double(), hidden[row].double(), is_image[row].tolist(), keep, **options)
        assert stays[row].nonzero().flatten().tolist() == expected
        chosen = scores[row][is_image[row]].sort(descending=True).values[:keep]
        assert torch.equal(chosen, 1 - torch.arange(keep) / keep)


def test_rows_do_not_depend_on_each_other():
    """Other numbers of tokens, padding on the left, and a row without an image."""
    keys, hidden, is_image, real = prompts()
    is_image[2] = False
    real[1, :3] = False
    keys[1, :, :3] = 99.0  # padding would be a pivot
    stays, _ = choose(keys, hidden, is_image, real, [7, 9, 0])
    for row, keep in enumerate([7, 9, 0]):
        own = real[row].nonzero().flatten()
        expected = golden.dart(keys[row][:, own].double(), hidden[row][own].double(), is_image[row][own].tolist(), keep)
        assert stays[row][own].nonzero().flatten().tolist() == expected
    half, single = ([each.half().to(dtype) for each in (keys, hidden)] for dtype in (torch.half, torch.float))
    assert torch.equal(choose(*half, is_image, real, [7, 9, 0])[0], choose(*single, is_image, real, [7, 9, 0])[0])


@pytest.mark.parametrize("rows", [2, 3])
def test_tokens_that_are_almost_alike_do_not_depend_on_the_batch(rows):
    """Their cosines differ by rounding only, as those of wide hidden states are rounded in a batch and alone."""
    generator = torch.Generator().manual_seed(rows)
    keys = torch.randn(rows, 2, 300, 4, generator=generator)
    hidden = torch.randn(rows, 1, 1024, generator=generator) + 1e-3 * torch.randn(rows, 300, 1024, generator=generator)
    is_image = torch.zeros(rows, 300, dtype=torch.bool)
    is_image[:, 4:290] = True
    given = keys, hidden, is_image, torch.ones_like(is_image)
    _, scores = choose(*given, [64] * rows)
    for row in range(rows):
        assert torch.equal(choose(*(each[row : row + 1] for each in given), [64])[1][0], scores[row])


def test_scores_are_float32_whatever_the_default_dtype():
    given = prompts()
    _, expected = choose(*given, [9] * 3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(choose(*given, [9] * 3)[1], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_earlier_of_equal_tokens():
    keys, hidden, is_image, real = prompts()
    for value in (1, 0):
        stays, _ = choose(torch.full_like(keys, value), torch.full_like(hidden, value), is_image, real, [6] * 3)
        assert all(row.nonzero().flatten().tolist() == list(IMAGES[:6]) for row in stays & is_image)


@pytest.mark.parametrize("options", [{}, {"image_pivots": 1, "text_pivots": 9}])
def test_hidden_tokens_come_last(options):
    """They are neither pivots nor chosen while others are left, as if they were not in the prompt."""
    keys, hidden, is_image, real = prompts()
    real[:, IMAGES.start : IMAGES.start + 10] = False
    keys[0, :, IMAGES.start] = 99.0
    hidden[1, IMAGES.start] = float("nan")
    real[:, -3:] = False
    seen = real[0].nonzero().flatten()
    for keep in (6, 10, 13):
        stays, scores = choose(keys, hidden, is_image, real, [keep] * 3, **options)
        for row in range(3):
            few = min(keep, 10)
            expected = golden.dart(
                keys[row][:, seen].double(), hidden[row][seen].double(), is_image[row][seen].tolist(), few, **options
            )
            assert stays[row][seen].nonzero().flatten().tolist() == expected
            assert int((stays & is_image)[row].sum()) == keep  # hidden ones fill up
            assert scores[row][seen][is_image[row][seen]].sort(descending=True).values[:few].gt(1 - few / keep).all()


@pytest.mark.parametrize("where", ["keys", "hidden"])
def test_tokens_of_nan_come_last(where):
    """Before those that are hidden: neither pivots nor chosen while others are left."""
    keys, hidden, is_image, real = prompts()
    bad = [5, 9, 20, 26]  # three image tokens, and one of the text after the image
    real[:, 7] = False
    expected, _ = choose(keys, hidden, is_image & real, real.index_fill(1, torch.tensor(bad), False), [8] * 3)
    keys[:, :, bad] = float("nan") if where == "keys" else 99.0
    hidden[:, bad] = float("nan")
    stays, _ = choose(keys, hidden, is_image, real, [8] * 3)
    assert torch.equal(stays & is_image, expected & is_image & real)
    assert not stays[:, [5, 7, 9, 20]].any()
    stays, _ = choose(keys, hidden, is_image, real, [19] * 3)  # of 20
    assert not stays[:, 7].any()
    assert stays[:, bad].all()


def test_text_before_the_last_image_is_no_pivot():
    """The prompts of a conversation begin alike; what is asked stands after the image."""
    keys, hidden, is_image, real = prompts()
    is_image[:, -1] = True  # nothing follows the last image: the pivots are image tokens
    alone = choose(keys, hidden, is_image, real, [9] * 3, text_pivots=0)
    assert torch.equal(choose(keys, hidden, is_image, real, [9] * 3)[1], alone[1])
    keys[:, :, : IMAGES.start] = 99.0
    assert torch.equal(choose(keys, hidden, is_image, real, [9] * 3)[1], alone[1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_pivots": 0}, "image_pivots must be an integer of at least 1"),
        ({"text_pivots": -1}, "text_pivots .*at least 0"),
    ],
)
def test_options(options, says):
    with pytest.raises(ValueError, match=says):
        METHODS["dart"](**options)

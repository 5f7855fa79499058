"""DART's choice against a slow transcription of its rule."""

import pytest
import torch
from support.golden import methods as golden

from vtc.methods import METHODS

LENGTH, IMAGES = 30, range(4, 24)


def choose(keys, is_image, real, keep, **options):
    """Which of the tokens `[B, L]` stay, and the scores."""
    method = METHODS["dart"](**options)
    keep = torch.tensor(keep)
    scores = method.prompt_scores(keys, is_image, real & ~is_image, keep)
    assert scores.dtype == torch.float32
    return method.keep_prompt(scores, is_image, keep), scores


def prompts(seed=0, rows=3, heads=2):
    keys = torch.randn(rows, heads, LENGTH, 4, generator=torch.Generator().manual_seed(seed))
    is_image = torch.zeros(rows, LENGTH, dtype=torch.bool)
    is_image[:, IMAGES.start : IMAGES.stop] = True
    return keys, is_image, torch.ones_like(is_image)


@pytest.mark.parametrize("keep", [1, 3, 4, 5, 11, 12, 13, 19, 20])
@pytest.mark.parametrize("options", [{}, {"image_pivots": 1, "text_pivots": 0}, {"image_pivots": 2, "text_pivots": 9}])
def test_the_choice_is_that_of_the_rule(keep, options):
    keys, is_image, real = prompts(seed=keep)
    stays, scores = choose(keys, is_image, real, [keep] * 3, **options)
    for row in range(3):
        expected = golden.dart(keys[row].double(), is_image[row].tolist(), keep, **options)
        assert stays[row].nonzero().flatten().tolist() == expected
        chosen = scores[row][is_image[row]].sort(descending=True).values[:keep]
        assert torch.equal(chosen, 1 - torch.arange(keep) / keep)


def test_rows_do_not_depend_on_each_other():
    """Other numbers of tokens, padding on the left, and a row without an image."""
    keys, is_image, real = prompts()
    is_image[2] = False
    real[1, :3] = False
    keys[1, :, :3] = 99.0  # padding would be a pivot
    stays, _ = choose(keys, is_image, real, [7, 9, 0])
    for row, keep in enumerate([7, 9, 0]):
        own = real[row].nonzero().flatten()
        expected = golden.dart(keys[row][:, own].double(), is_image[row][own].tolist(), keep)
        assert stays[row][own].nonzero().flatten().tolist() == expected
    assert torch.equal(
        choose(keys.half(), is_image, real, [7, 9, 0])[0], choose(keys.half().float(), is_image, real, [7, 9, 0])[0]
    )


def test_the_earlier_of_equal_tokens():
    keys, is_image, real = prompts()
    stays, _ = choose(torch.ones_like(keys), is_image, real, [6] * 3)
    assert (stays & is_image)[0].nonzero().flatten().tolist() == list(IMAGES[:6])
    assert (choose(torch.zeros_like(keys), is_image, real, [6] * 3)[0] & is_image).sum() == 18


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

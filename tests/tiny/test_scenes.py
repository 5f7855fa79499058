"""The scenes are what they say they are: deterministic, balanced, disjoint, and their answers are true."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from vtc.tiny.scenes import (
    COLOURS,
    COUNTING,
    FAMILIES,
    MAX_OBJECTS,
    PATCH,
    PHRASES,
    SHAPES,
    SIZES,
    SPLITS,
    WORDS,
    Question,
    Scene,
    balanced_questions,
)

SIDES = (70, 112, 224, 336, (224, 84), (112, 336))
SCENES = [Scene("train", index, size) for size in SIDES for index in range(40)]
CLOSE_UPS = [Scene("train", index, 336, zoom) for zoom in (1.5, 2.0) for index in range(40)]


def true_answer(scene: Scene, text: str) -> str:
    """The answer read off the objects, by a route that shares nothing with the generator."""
    words = text.removesuffix(" ?").split()
    by_colour = {o.colour: o for o in scene.objects}
    if text.startswith("is there"):
        return "yes" if any((o.colour, o.shape) == (words[-2], words[-1]) for o in scene.objects) else "no"
    if text.startswith("what shape"):
        return by_colour[words[-2]].shape
    if text.startswith("what colour"):
        (owner,) = (o for o in scene.objects if o.shape == words[-1])
        return owner.colour
    if text.startswith("how many"):
        return str(len(scene.objects))
    if text.startswith("what digit"):
        return str(by_colour[words[-2]].digit)
    first, second = by_colour[words[2]], by_colour[words[-2]]
    if "left or right" in text:
        return "left" if first.x < second.x else "right"
    return "above" if first.y < second.y else "below"


def test_every_answer_is_true() -> None:
    for scene in SCENES:
        for draw in range(3):
            for question in scene.ask(draw):
                assert question.answer == true_answer(scene, question.text), (scene.objects, question)


def test_every_phrase_is_true_and_in_the_vocabulary() -> None:
    for scene in SCENES:
        assert set(scene.phrases) <= set(PHRASES)
        assert scene.phrases[0].startswith(("one", "two", "three", "four", "five")[len(scene.objects) - 1])
        for thing in scene.objects:
            column = ("left", "centre", "right")[(scene.origin[0] + thing.x) // 112]
            row = ("top", "middle", "bottom")[(scene.origin[1] + thing.y) // 112]
            assert sum(f"{thing.colour} object at the {row} {column}" in p for p in scene.phrases) == 1
            assert sum(f"{thing.colour} {thing.shape}" in p for p in scene.phrases) == 1
    words = {word for scene in SCENES for q in scene.questions for word in f"{q.text} {q.answer}".split()}
    assert words <= set(WORDS)


def test_objects_fit_do_not_touch_and_differ_in_colour() -> None:
    for scene in SCENES:
        assert 1 <= len(scene.objects) <= MAX_OBJECTS
        assert len({o.colour for o in scene.objects}) == len(scene.objects)
        for i, a in enumerate(scene.objects):
            assert a.radius <= min(a.x, a.y)
            assert a.x <= scene.width - a.radius
            assert a.y <= scene.height - a.radius
            assert (a.x - a.radius) % PATCH == (a.y - a.radius) % PATCH == 0
            for b in scene.objects[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_every_object_is_painted_where_it_is_said_to_be() -> None:
    for scene in SCENES[::6]:
        pixels = np.asarray(scene.image, float)
        for thing in scene.objects:
            box = int(0.3 * thing.radius)
            patch = pixels[thing.y - box : thing.y + box, thing.x - box : thing.x + box].reshape(-1, 3)
            distance = np.abs(patch - COLOURS[thing.colour]).max(1)
            # A digit hides part of the centre, never all of it.
            assert (distance < 45).mean() > (0.95 if thing.digit is None else 0.1), thing


def test_variety() -> None:
    things = [o for scene in SCENES for o in scene.objects]
    assert {o.shape for o in things} == set(SHAPES)
    assert {o.colour for o in things} == set(COLOURS)
    assert {o.size for o in things} == set(SIZES)
    assert {o.digit for o in things} == {None, *range(10)}


def test_background_takes_most_of_the_area() -> None:
    for scene in (s for s in SCENES if s.width == s.height == 336):
        assert sum((2 * o.radius) ** 2 for o in scene.objects) < 0.5 * scene.width * scene.height


def test_a_window_lies_on_the_canvas() -> None:
    windows = [s for s in SCENES if (s.width, s.height) == (112, 336)]
    assert {s.image.size for s in windows} == {(112, 336)}
    assert {s.origin[1] for s in windows} == {0}
    assert len({s.origin[0] for s in windows}) > 5
    assert all(s.origin[0] % PATCH == 0 and s.origin[0] + s.width <= 336 for s in windows)
    assert max(len(s.objects) for s in windows) == MAX_OBJECTS


def test_a_close_up_shows_the_same_things_larger() -> None:
    for scene in CLOSE_UPS[::4]:
        pixels = np.asarray(scene.image, float)
        assert scene.image.size == (336, 336)
        for thing in scene.objects:
            x, y, box = (int(scene.zoom * v) for v in (thing.x, thing.y, 0.3 * thing.radius))
            distance = np.abs(pixels[y - box : y + box, x - box : x + box].reshape(-1, 3) - COLOURS[thing.colour]).max(
                1
            )
            assert (distance < 45).mean() > (0.95 if thing.digit is None else 0.1), thing
    shares = [sum((s.zoom * o.radius / 168) ** 2 for o in s.objects) for s in CLOSE_UPS]
    assert max(shares) > 0.4
    assert {len(s.objects) for s in CLOSE_UPS} == {1, 2, 3, 4, 5}
    for scene in CLOSE_UPS:
        first = scene.objects[0]
        column = ("left", "centre", "right")[int(3 * scene.zoom * first.x / 336)]
        assert any(p.startswith(("a", "an")) and p.endswith(column) and first.colour in p for p in scene.phrases)


def test_a_close_up_has_room_for_its_objects() -> None:
    """80 x 80 pixels before the zoom: two objects never fit, and looking for room for them would never end."""
    code = """
from vtc.tiny.scenes import Scene
print({len(Scene("train", index, 112, 1.4).objects) for index in range(20)})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "{1}\n"
    crowded = [Scene("train", index, (112, 168), 1.0001) for index in range(40)]
    assert {len(scene.objects) for scene in crowded} == {1, 2, 3, 4, 5}


def test_a_blank_scene_shows_background_only() -> None:
    for index in range(20):
        blank = Scene("val", index, (196, 112), blank=True)
        assert blank.image.size == (196, 112)
        pixels = np.asarray(blank.image, np.int16)
        assert np.ptp(pixels, axis=-1).max() < 60, "as colourful as an object"
        assert pixels.std() > 1
        assert (blank.objects, blank.phrases, blank.caption) == ([], [], "")
        assert blank.ask(0) == blank.ask(1) == [Question("counting", COUNTING, "0")]


def test_deterministic_and_disjoint() -> None:
    for split in SPLITS:
        assert Scene(split, 3).image.tobytes() == Scene(split, 3).image.tobytes()
        assert Scene(split, 3).questions == Scene(split, 3).questions
    pictures = {Scene(split, index).image.tobytes() for split in SPLITS for index in range(20)}
    assert len(pictures) == 3 * 20


def test_balanced_questions_are_balanced() -> None:
    asked = balanced_questions("test", 500)
    assert [q for _, q in asked] == [q for _, q in balanced_questions("test", 500)]
    assert len({scene.index for scene, _ in asked}) == 500
    families = Counter(question.family for _, question in asked)
    assert families == dict.fromkeys(FAMILIES, 100)
    for family, most in (
        ("existence", 0.5),
        ("relation", 0.27),
        ("counting", 0.2),
        ("digit", 0.1),
        ("attribute", 0.08),
    ):
        answers = Counter(question.answer for _, question in asked if question.family == family)
        assert max(answers.values()) <= most * 100 + 1, (family, answers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 0), "train, val, test"),
        (("test", -1), "numbered from 0"),
        (("test", 0, 64), "from 70 to 336"),
        (("test", 0, (336, 350)), "from 70 to 336"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scene(*arguments)

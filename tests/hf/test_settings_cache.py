"""Settings that were checked once are not checked again, and are never those of before."""

import copy
import pickle
import sys
from pathlib import Path

import numpy
import pytest
import torch
from support import models
from transformers import DynamicCache, LlavaForConditionalGeneration

import vtc
from vtc.hf import settings
from vtc.hf.settings import Settings
from vtc.methods import METHODS

HOME = str(Path(vtc.__file__).parent)


def of(model):
    return Settings.of(model).config


@pytest.fixture
def own():
    model = models.build()
    vtc.enable(model, keep=9)
    assert of(model).keep == 9
    return model


def test_the_same_values_are_checked_once(own):
    assert of(own) is of(own)
    other = models.build()
    vtc.enable(other, keep=9)
    assert of(other) is of(own)


def test_configure_counts_at_once(own):
    for keep in (5, 7, 5, 9):
        vtc.configure(own, keep=keep)
        assert of(own).keep == keep
    vtc.configure(own, method="prumerge", neighbors=4)
    assert of(own).build_method().neighbors == 4
    vtc.configure(own, neighbors=5)
    assert of(own).build_method().neighbors == 5


def test_an_edit_in_place_counts_at_once(own):
    own.config.vtc["keep"] = 5
    assert of(own).keep == 5
    own.model.config.vtc = {"keep": 6}
    assert of(own).keep == 6
    del own.config.vtc["keep"]
    assert of(own).keep is None
    own.config.vtc = None
    assert of(own) == vtc.VTCConfig()


@pytest.mark.parametrize(("wrong", "right"), [(True, 1), (1.0, 1), (9.0, 9)])
def test_values_that_are_equal_but_of_another_type(own, wrong, right):
    own.config.vtc["keep"] = right
    assert of(own).keep == right
    own.config.vtc["keep"] = wrong
    with pytest.raises(ValueError, match="keep must be an integer"):
        of(own)
    own.config.vtc["keep"] = right
    assert of(own).keep == right


def test_values_that_can_change_are_read_each_time(own):
    keep = numpy.array(5)
    own.config.vtc["keep"] = keep
    assert of(own).keep == 5
    keep[...] = 6
    assert of(own).keep == 6


def test_copies_have_settings_of_their_own(own, tmp_path):
    own.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    copies = [copy.deepcopy(own), pickle.loads(pickle.dumps(own)), loaded]
    for keep, each in enumerate(copies, start=3):
        assert of(each).keep == 9
        vtc.configure(each, keep=keep)
    assert [of(each).keep for each in copies] == [3, 4, 5]
    assert of(own).keep == 9
    vtc.disable(own)
    assert of(own) == vtc.VTCConfig()
    assert not any(name.startswith("_vtc") for name in vars(own.model))


def test_blocks_and_threads_have_settings_of_their_own(own):
    with vtc.compress(own, keep=4):
        assert of(own).keep == 4
        vtc.configure(own, keep=3)
        assert of(own).keep == 3
    assert of(own).keep == 9


@pytest.fixture
def registry():
    """The methods by name, whose order is put back, too."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def test_a_name_that_is_registered_again(own, registry):
    """The class that the name stands for is part of what was checked."""

    class Random(registry["random"]):
        kv = "full"

    vtc.configure(own, method="random")
    assert type(of(own).build_method()) is registry["random"]
    registry["random"] = Random
    assert of(own).kept_kv == "full"
    del registry["random"]
    with pytest.raises(ValueError, match="method must be one of"):
        of(own)


def test_a_method_object_is_read_from_the_model(own):
    class Mine(METHODS["vtc-cls"]):
        name = "mine"

    first, second = Mine(), Mine(ensemble_layers=2)
    for method in (first, second, first):
        vtc.configure(own, method=method)
        assert of(own).method is method


def calls_of(run):
    """The functions of VTC that `run` calls."""
    seen = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            seen.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        with torch.no_grad():
            run()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("way", ["stock", "enable", "block"])
def test_a_decoding_step_asks_its_cache_for_a_note_and_nothing_else(way):
    """The guards of the model and of its head, whether it compresses or not."""
    model = models.build()
    call = {**models.batch([models.ids(3, "image", 5)]), "pixel_values": models.images(1)}
    if way == "enable":
        vtc.enable(model, keep=9)
    context = vtc.compress(model, keep=9) if way == "block" else torch.no_grad()
    with context:
        model.generate(**call, max_new_tokens=1)  # the first call announces which operations run
        few, many = (
            calls_of(lambda new=new: model.generate(**call, max_new_tokens=new, do_sample=False)) for new in (2, 12)
        )
    assert len(many) - len(few) == 10 * 2
    assert many.count("guarded") - few.count("guarded") == 10 * 2


def test_a_decoding_step_with_two_caches_is_refused(own):
    cache = DynamicCache()
    with pytest.raises(ValueError, match="two names of one argument"):
        own(input_ids=torch.tensor([[5]]), cache=cache, past_key_values=cache)


def test_the_cache_of_settings_is_bounded():
    assert settings._checked.cache_info().maxsize == 64

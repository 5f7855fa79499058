"""With a transformers too old for models, or with none, the rest of VTC works and models say what they need.

These tests run where no supported transformers is installed: `.ci/run` installs an old one at its end, then none.
"""

import importlib.util
from importlib import metadata

import pytest
import torch
from packaging.version import Version

import vtc
from vtc import ops, reference

INSTALLED = Version(metadata.version("transformers")) if importlib.util.find_spec("transformers") else None
pytestmark = pytest.mark.skipif(INSTALLED is not None and Version("5.23") <= INSTALLED, reason="a supported one")
old = pytest.mark.skipif(INSTALLED is None, reason="no transformers")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operations_and_reference(backend):
    scores = torch.tensor([[0.1, 0.4, 0.4, 0.2]])
    assert ops.topk(scores, 2, backend=backend).tolist() == [[1, 2]]
    assert reference.topk(scores, 2).tolist() == [[1, 2]]


def test_methods_and_settings():
    method = vtc.VTCConfig.of(keep=2, ensemble_layers=1).build_method()
    from vtc.methods import VisionOutputs

    outputs = VisionOutputs(torch.randn(1, 5, 3), (2, 2), cls_probs=torch.tensor([[[[0.1, 0.4, 0.3, 0.2]]]]))
    assert method.reduce(outputs, 2).indices.tolist() == [[1, 2]]


@old
def test_models_are_refused_with_one_clear_error():
    from transformers import LlavaForConditionalGeneration

    from vtc import tiny

    says = rf"transformers 5\.23 or newer, and this is {INSTALLED}"
    stock = LlavaForConditionalGeneration.from_pretrained(tiny.CHECKPOINT)
    for function in (vtc.enable, vtc.configure, lambda model: vtc.compress(model).__enter__()):
        with pytest.raises(ValueError, match=says):
            function(stock)
    asked = LlavaForConditionalGeneration.from_pretrained(tiny.CHECKPOINT, attn_implementation="vtc")
    with pytest.raises(ValueError, match=says):
        asked.get_image_features(torch.zeros(1, 3, 336, 336))
    assert not hasattr(LlavaForConditionalGeneration.generate, "_vtc_guard")


@pytest.mark.skipif(INSTALLED is not None, reason="there is one")
def test_models_need_transformers():
    with pytest.raises(ImportError, match="transformers"):
        vtc.enable  # noqa: B018

"""torch.compile and torch.export of a model that compresses, against the same model as it is."""

import pytest
import torch
from support import models
from support.models import TOKENS, ids
from support.prompts import detailed, inputs, prompts

import vtc
from vtc.hf import generate


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    generate._warn_of_compiling.cache_clear()


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        call = dict(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return self.model(**call, use_cache=False).logits


@pytest.mark.supported("Compiling", "`torch.export` of the whole model, for rows with the same images")
@pytest.mark.parametrize("method", ["vtc-cls", "pool"])
@torch.no_grad()
def test_an_exported_model_is_the_model(model, method):
    vtc.configure(model, keep=9, method=method)
    call = inputs([ids(3, "image", 5), ids(2, "image", 4)])  # left-padded
    exported = torch.export.export(Logits(model), (), call, strict=False).module()
    other = inputs([ids(1, "image", 5, seed=1), ids(5, "image", 3, seed=2)])
    other["pixel_values"] = models.images(2, seed=3)
    for each in (call, other):
        found, expected, real = exported(**each), model(**each).logits, each["attention_mask"].bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=rf"each row of input_ids must hold {TOKENS} placeholders"):
        exported(**other | {"input_ids": torch.full_like(other["input_ids"], 7)})


@pytest.mark.refused(
    "`torch.export` for rows with different images", instead="export the vision tower and the language model"
)
def test_rows_with_different_images_are_not_exported(model):
    vtc.configure(model, keep=9)
    call = inputs(prompts("text_only_row"))
    with pytest.raises(ValueError, match="the same images in each row"):
        torch.export.export(Logits(model), (), call, strict=False)


@pytest.mark.supported("Compiling", "`model.forward` compiled as one graph, with every method")
@pytest.mark.parametrize("options", [{}, {"prune_layer": 1}, {"method": "fastv", "prune_layer": 1, "kv": "full"}])
def test_forward_compiled_as_one_graph(model, options, caplog):
    vtc.configure(model, keep=9, **options)
    call = inputs(prompts("one"))
    expected = model.generate(**call, **detailed())
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    static = {} if options.get("kv") else {"cache_implementation": "static"}
    with caplog.at_level("WARNING", "vtc"):
        out = model.generate(**call, **detailed(**static))
    assert torch.equal(out.sequences, expected.sequences)
    assert ("cannot trace" in caplog.text) == bool(options)

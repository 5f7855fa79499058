"""One row with one image: read once, one concatenation, and the same results as for any prompt."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import models
from torch.utils._python_dispatch import TorchDispatchMode

import vtc
from vtc.hf import generate
from vtc.hf.lone_image import LoneImage
from vtc.hf.prompt import Patches, Prompt

IMAGE, VIDEO, PAD = 90, 91, 0
TEXT = st.lists(st.integers(1, 80), max_size=5)
MASKS = {
    "none": lambda ids: None,
    "int64": torch.ones_like,
    "bool": lambda ids: torch.ones_like(ids, dtype=torch.bool),
    "int32": lambda ids: torch.ones_like(ids, dtype=torch.int32),
}


def both(ids, mask, tokens):
    lone, any_ = (kind.read(ids, mask, {IMAGE: [tokens]}) for kind in (LoneImage, Prompt))
    assert lone is not None
    return lone, any_


@given(
    before=TEXT,
    after=TEXT,
    tokens=st.integers(1, 9),
    count=st.integers(1, 10),
    mask=st.sampled_from([*MASKS]),
    kind=st.sampled_from(["mask", "function", "patches"]),
    is_merged=st.booleans(),
    positions=st.sampled_from(["none", "given", "packed"]),
    counted=st.booleans(),
    original=st.booleans(),
    data=st.data(),
)
def test_the_same_as_for_any_prompt(
    before, after, tokens, count, mask, kind, is_merged, positions, counted, original, data
):
    ids = torch.tensor([[*before, *[IMAGE] * tokens, *after]])
    mask, count = MASKS[mask](ids), min(count, tokens + 1)
    if is_merged or count > tokens:
        kept = None
    else:
        chosen = data.draw(st.permutations(range(tokens)))[:count]
        kept = torch.tensor([number in chosen for number in range(tokens)])
    lazy = kept
    if kept is not None and kind != "mask":
        lazy = Patches(kept.nonzero().T, tokens) if kind == "patches" else lambda: kept
    given = None if positions == "none" else torch.arange(3, 3 + ids.shape[1])[None]
    more = {"pad": PAD, "counted": counted, "packed": positions == "packed" and mask is None, "original": original}
    results = []
    for prompt, own in zip(both(ids, mask, tokens), (lazy, kept), strict=True):
        shortening = prompt.shortening({IMAGE: [(tokens, count)]}, {IMAGE: own}, original)
        results.append((shortening, prompt.shortened(shortening, mask, given, **more)))
    (lone, short), (any_, expected) = results
    assert short.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(short[name], value), name
        assert short[name].dtype == value.dtype
    if any_ is None:
        assert lone is None
        return
    assert (lone.longest, lone.is_even) == (any_.longest, any_.is_even)
    for name in ("stays", "columns", "filled"):
        assert torch.equal(getattr(lone, name), getattr(any_, name)), name
        assert getattr(lone, name).dtype == getattr(any_, name).dtype
    hidden = torch.randn(1, lone.longest, 3)
    assert torch.equal(lone.spread(hidden), any_.spread(hidden))


@pytest.mark.parametrize(
    ("rows", "mask", "sizes"),
    [
        ([[1, IMAGE, IMAGE, 2]] * 2, None, {IMAGE: [2, 2]}),
        ([[1, IMAGE, IMAGE, 2], [1, 2, 3, 4]], None, {IMAGE: [2]}),
        ([[1, IMAGE, IMAGE, 2, IMAGE, IMAGE]], None, {IMAGE: [2, 2]}),
        ([[1, IMAGE, IMAGE, 2, VIDEO]], None, {IMAGE: [2], VIDEO: [1]}),
        ([[1, IMAGE, 2, IMAGE]], None, {IMAGE: [2]}),
        ([[PAD, IMAGE, IMAGE, 2]], [[0, 1, 1, 1]], {IMAGE: [2]}),
        ([[1, IMAGE, IMAGE, 2]], [[1, 1, 0, 1]], {IMAGE: [2]}),
        ([[1, IMAGE, IMAGE, 2]], [[1, 1, 2, 1]], {IMAGE: [2]}),
        ([[1, IMAGE, IMAGE, 2]], [[1.0, 1.0, 1.0, 1.0]], {IMAGE: [2]}),
        ([[1, IMAGE, IMAGE, 2]], [[[[1, 1, 1, 1]]]], {IMAGE: [2]}),
        ([[1, IMAGE, IMAGE, 2]], None, {IMAGE: [1]}),
        ([[1, 2]], None, {IMAGE: [2]}),
        ([[1, 2]], None, {IMAGE: []}),
    ],
)
def test_other_prompts_are_not_read_so(rows, mask, sizes):
    ids = torch.tensor(rows)
    assert LoneImage.read(ids, None if mask is None else torch.tensor(mask), sizes) is None


def test_a_traced_prompt_is_not_read():
    def read(ids):
        return ids + 1 if LoneImage.read(ids, None, {IMAGE: [2]}) is None else ids

    ids = torch.tensor([[1, IMAGE, IMAGE, 2]])
    assert torch.equal(torch.compile(read, fullgraph=True, backend="eager")(ids), ids + 1)


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(each.alias_info for each in func._schema.returns):
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_three_kernels_and_one_read(monkeypatch):
    """One that puts ids and mask together to be read, one for the short ids, and one for their mask."""
    reads, stock = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or stock(self))
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, 2]])
    mask = torch.ones_like(ids)
    with Kernels() as kernels:
        prompt = LoneImage.read(ids, mask, {IMAGE: [3]})
        shortening = prompt.shortening({IMAGE: [(3, 2)]}, {IMAGE: lambda: pytest.fail("not needed")})
        prompt.shortened(shortening, mask)
    assert kernels.names == ["cat", "cat", "new_ones"]
    assert reads == [(1, 10)]


def test_original_positions_take_four_more_kernels():
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, 2]])
    mask = torch.ones_like(ids)
    with Kernels() as kernels:
        prompt = LoneImage.read(ids, mask, {IMAGE: [3]})
        kept = Patches(torch.tensor([[0, 2]]), 3)
        shortening = prompt.shortening({IMAGE: [(3, 2)]}, {IMAGE: kept}, True)
        short = prompt.shortened(shortening, mask, original=True)
    more = ["arange", "arange", "add", "cat"]
    assert [name for name in kernels.names if name != "lift_fresh"] == ["cat", *more, "cat", "new_ones"]
    assert short["position_ids"].tolist() == [[0, 1, 3, 4]]


def test_neither_ids_nor_mask_are_the_callers():
    """Who overwrites them afterwards, for the next prompt, changes neither the short ones nor what is made later."""
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, 2]])
    mask = torch.ones_like(ids)
    prompt = LoneImage.read(ids, mask, {IMAGE: [3]})
    shortening = prompt.shortening({IMAGE: [(3, 2)]}, {IMAGE: torch.tensor([True, False, True])})
    short = prompt.shortened(shortening, mask)
    ids.fill_(7)
    mask.fill_(0)
    assert short["input_ids"].tolist() == [[1, IMAGE, IMAGE, 2]]
    assert short["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert shortening.columns.tolist() == [[0, 1, 3, 4]]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("method", ["vtc-cls", "visionzip", "prumerge"])
def test_a_model_gives_the_same(stock, method, mask, monkeypatch):
    """`generate()`, a further turn of it, and `forward()`, with the prompt read this way and the other."""
    row = models.ids(3, "image", 5)
    call = {"input_ids": torch.tensor([row]), "pixel_values": models.images(1)}
    call |= {"attention_mask": torch.ones(1, len(row), dtype=torch.int64)} if mask else {}
    found = []
    with torch.no_grad(), vtc.compress(stock, method=method, **({} if method == "prumerge" else {"keep": 9})):
        for _ in range(2):
            first = stock.generate(**call, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            turn = torch.cat([first.sequences, torch.tensor([models.ids(4, "image", 2, seed=1)])], 1)
            second = stock.generate(
                turn,
                pixel_values=models.images(1, seed=1),
                past_key_values=first.past_key_values,
                max_new_tokens=3,
                do_sample=False,
            )
            out = stock(**call)
            found.append((first.sequences, second, out.logits, *(layer.keys for layer in out.past_key_values.layers)))
            monkeypatch.setattr(generate.LoneImage, "read", lambda *_: None)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)

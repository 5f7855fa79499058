"""Which attention runs where nothing is scored: flash-attn or SDPA, chosen in one place."""

import json
import logging
import sys
import types
import weakref

import pytest
import torch
from support import models
from support.golden import llava as golden
from typer.testing import CliRunner

import vtc
from vtc import ops
from vtc.cli.__main__ import app
from vtc.config import VTCConfig
from vtc.hf import attention
from vtc.scores import ClsScores

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def flash_attn_func(query, key, value, dropout_p=0.0, softmax_scale=None, causal=False):
    """The documented behaviour: `[B, N, H, D]`, grouped heads, the causal mask aligned to the last query and key."""
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (softmax_scale or query.shape[-1] ** -0.5)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(~allowed, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.fixture(autouse=True)
def forget():
    """What has been imported and announced is remembered; tests must not see each other's."""
    attention.flash_attention.cache_clear()
    attention._announce.cache_clear()
    yield
    attention.flash_attention.cache_clear()
    attention._announce.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "masked", "choice", "reason"),
    [
        (CUDA, HALF, 64, False, "flash-attn", "qualify"),
        (CUDA, BRAIN, 128, False, "flash-attn", "qualify"),
        (CUDA, BRAIN, 256, False, "flash-attn", "qualify"),
        (CUDA, FULL, 64, False, "sdpa", "float32; flash-attn needs float16 or bfloat16"),
        (CUDA, HALF, 64, True, "sdpa", "there is a mask"),
        (CUDA, HALF, 257, False, "sdpa", "head size 257; flash-attn takes at most 256"),
        (CPU, HALF, 64, False, "sdpa", "tensors on cpu"),
        (CPU, FULL, 64, True, "sdpa", "tensors on cpu"),
    ],
)
def test_choice_where_flash_attn_is_installed(installed, device, dtype, head_dim, masked, choice, reason):
    chosen, why = attention.plain_attention(device, dtype, head_dim, masked)
    assert chosen == choice
    assert reason in why


def test_choice_on_an_old_gpu(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert attention.plain_attention(CUDA, HALF) == ("sdpa", "flash-attn needs compute capability 8.0 or newer")


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_choice_where_flash_attn_is_absent(absent, dtype):
    assert attention.plain_attention(CUDA, dtype) == ("sdpa", "flash-attn is not installed")


def test_logged_once(absent, caplog):
    model = models.build()
    vtc.enable(model, keep=9)
    model.set_attn_implementation("vtc")
    with caplog.at_level(logging.INFO, "vtc"):
        for _ in range(2):
            model.get_image_features(models.images(1))
    lines = [record.message for record in caplog.records if "attention without scores" in record.message]
    assert lines == ["attention without scores uses sdpa: tensors on cpu; flash-attn needs a CUDA GPU"]


def test_flash_attn_is_called_as_it_documents(installed, monkeypatch):
    """A whole answer through it, from vision layers, prefill and decoding; the mock computes what flash-attn would."""
    model = models.build()
    call = {**models.batch([models.ids(3, "image", 5)]), "pixel_values": models.images(1)}
    asked = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    vtc.enable(model, keep=9)
    model.set_attn_implementation("vtc")
    expected = model.generate(**call, **asked)
    shapes = []

    def choose(device, dtype, head_dim, masked):
        return ("sdpa", "there is a mask") if masked else ("flash-attn", "")

    def recorded(query, key, value, **kwargs):
        shapes.append((tuple(query.shape), tuple(key.shape), kwargs["causal"]))
        return flash_attn_func(query, key, value, **kwargs)

    monkeypatch.setattr(attention, "plain_attention", choose)
    monkeypatch.setattr(attention, "flash_attention", lambda: recorded)
    out = model.generate(**call, **asked)
    monkeypatch.undo()
    assert torch.equal(out.sequences, expected.sequences)
    golden.close(torch.stack(out.logits), torch.stack(expected.logits))
    prompt = len(call["input_ids"][0]) - models.TOKENS + 9
    assert shapes[:6] == [((1, 1 + models.TOKENS, 4, 16), (1, 1 + models.TOKENS, 4, 16), False)] * 6
    assert shapes[6:8] == [((1, prompt, 4, 16), (1, prompt, 2, 16), True)] * 2
    assert shapes[8:10] == [((1, 1, 4, 16), (1, prompt + 1, 2, 16), False)] * 2
    assert len(shapes) == 6 + 5 * 2


def test_env_shows_the_choice():
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert found["attention"]["cpu"]["bfloat16"] == {
        "choice": "sdpa",
        "why": "tensors on cpu; flash-attn needs a CUDA GPU",
    }
    plain = CliRunner().invoke(app, ["env"]).stdout
    assert "attention of layers without scores" in plain


def layer(seed, scale=1.0):
    """Query and key `[B, H, 1 + N, D]` as an attention module has them, and the probabilities of the first query."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, 10, 3, 8, generator=generator).transpose(2, 3)
    return query, key, (query[:, :, :1] @ key.mT * scale).softmax(-1)[:, :, 0]


@pytest.mark.parametrize("order", ["nnn", "fff", "nfn", "fnf", "nNn", "NfnN"])
def test_layers_that_are_noted_and_fused_keep_their_order(order, monkeypatch):
    """n: noted; N: with another scale; f: fused. Noted layers of one scale take one launch."""
    calls, real = [], ops.cls_probs
    monkeypatch.setattr(ops, "cls_probs", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    scores = ClsScores(VTCConfig(), [torch.nn.Identity() for _ in order])
    expected = []
    for seed, kind in enumerate(order):
        assert scores.cls_probs is None
        assert not scores.is_complete
        scale = {"n": 0.5, "N": 0.3, "f": 0.5}[kind]
        query, key, probs = layer(seed, scale)
        expected.append(probs[:, :, 1:])
        scores.add(probs) if kind == "f" else scores.note(query, key, scale)
    assert scores.is_complete
    torch.testing.assert_close(scores.cls_probs, torch.stack(expected))
    assert len(calls) == len(set(order) - {"f"})
    assert set(scores.ops) == {"cls_attention" if kind == "f" else "cls_probs" for kind in order}


def test_what_is_noted_does_not_outlive_the_last_scored_layer():
    scores = ClsScores(VTCConfig(), [torch.nn.Identity() for _ in range(2)])
    noted = []
    for seed in range(2):
        query, key, _ = layer(seed)
        key = key.clone()
        noted.append(weakref.ref(key))
        scores.note(query, key)
    del query, key
    assert [each() for each in noted] == [None, None]
    assert scores.cls_probs.shape == (2, 2, 3, 9)

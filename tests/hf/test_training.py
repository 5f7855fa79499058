"""Training and threads: gradients, checkpointing, several blocks at the same time."""

import threading

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.models import IMAGE, ids
from support.prompts import STEPS, inputs, prompts

import vtc

KEEP = 9


@pytest.fixture
def stock():
    return models.build()


@pytest.fixture(scope="module")
def call():
    return inputs(prompts("left_padded"))


@pytest.mark.supported("Training", "gradient checkpointing")
def test_gradient_checkpointing(stock, call):
    """The same loss and gradients as without; those are compared with the golden ones in test_generate."""
    vtc.enable(stock, keep=KEEP)
    labels = call["input_ids"].masked_fill((call["input_ids"] == IMAGE) | (call["attention_mask"] == 0), -100)
    stock.train()

    def step():
        stock.zero_grad()
        loss = stock(**call, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in stock.named_parameters() if p.grad is not None}

    loss, grads = step()
    runs = []
    stock.model.vision_tower.encoder.layers[3].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    stock.gradient_checkpointing_enable()
    again, checkpointed = step()
    assert len(runs) == 2  # once more in the backward pass
    assert again == pytest.approx(loss, rel=1e-6)
    assert checkpointed.keys() == grads.keys()
    for name in grads:
        golden.close(checkpointed[name], grads[name])
    assert {name.split(".")[1] for name in grads if grads[name].abs().max() > 0} >= {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }


@pytest.mark.supported("Training", "frozen parts")
def test_frozen_parts_get_no_gradient(stock, call):
    vtc.enable(stock, keep=KEEP)
    stock.model.vision_tower.requires_grad_(False)
    stock(**call, labels=call["input_ids"]).loss.backward()
    assert all(p.grad is None for p in stock.model.vision_tower.parameters())
    assert all(p.grad is not None for p in stock.model.multi_modal_projector.parameters())


def together(*functions):
    """Run in threads at the same time; return their results, or raise the first error."""
    results = [None] * len(functions)

    def run(i, function):
        try:
            results[i] = function()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i, function)) for i, function in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def alone(model, call, keep):
    with vtc.compress(model, keep=keep):
        return model.generate(**call, max_new_tokens=STEPS, do_sample=False)


def test_two_models_in_two_threads(call):
    one, other = models.build(), models.build(seed=1)
    expected = [alone(one, call, 3), alone(other, call, 20)]
    vtc.enable(one, keep=3)
    vtc.enable(other, keep=20)
    for _ in range(3):
        out = together(
            lambda: one.generate(**call, max_new_tokens=STEPS, do_sample=False),
            lambda: other.generate(**call, max_new_tokens=STEPS, do_sample=False),
        )
        assert all(map(torch.equal, out, expected))


@pytest.mark.supported("Switching and blocks", "a block per thread on one model")
def test_one_model_in_two_threads(stock, call):
    """Each thread has its own scope open while the other's is; the model is stock again when the last one closes."""
    expected = {keep: alone(stock, call, keep) for keep in (3, 20)}
    full = stock.generate(**call, max_new_tokens=STEPS, do_sample=False)
    both_open, both_done = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def answer(keep):
        with vtc.compress(stock, keep=keep) as run:
            both_open.wait()
            outs = [stock.generate(**call, max_new_tokens=STEPS, do_sample=False) for _ in range(3)]
            assert vtc.configure(stock, ensemble="mean").keep == keep
            both_done.wait()
        return outs, run

    for keep, (outs, run) in zip((3, 20), together(lambda: answer(3), lambda: answer(20)), strict=True):
        assert all(torch.equal(out, expected[keep]) for out in outs)
        assert (run.tokens_after, run.images) == (keep, 3 * len(call["pixel_values"]))
    assert torch.equal(stock.generate(**call, max_new_tokens=STEPS, do_sample=False), full)
    assert not [name for name in stock.model.__dict__ if name.startswith("_vtc")]
    assert not hasattr(stock.config, "vtc")


@pytest.mark.parametrize("how", ["text", "none"])
def test_a_batch_that_is_not_compressed_has_the_stock_loss(stock, how):
    """Also of labels at the first tokens of left-padded rows."""
    rows = [ids(3), ids(8)] if how == "text" else [ids(3, "image", 2), ids(3, "image", 6)]
    call = inputs(rows) if how == "none" else models.batch(rows)
    labels = call["input_ids"].masked_fill((call["attention_mask"] == 0) | (call["input_ids"] == IMAGE), -100)
    expected = stock(**call, labels=labels).loss
    with vtc.compress(stock, keep=9, **({"method": "none"} if how == "none" else {})):
        assert torch.equal(stock(**call, labels=labels).loss, expected)

"""`vtc.compress` blocks belong to a context: whatever runs at the same time sees its own block and no other's."""

import asyncio
import contextvars
import copy
import logging
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from support import models
from support.models import TOKENS
from support.prompts import inputs, prompts

import vtc
from vtc.hf.settings import CONTEXT, OPEN, Settings


@pytest.fixture
def stock():
    return models.build()


@pytest.fixture(scope="module")
def call():
    return inputs(prompts("one"))


@pytest.fixture(scope="module")
def answers(call):
    """The answer by number of tokens; they differ."""
    model = models.build()
    found = {TOKENS: answer(model, call)}
    for keep in (3, 9, 12):
        model = models.build()
        vtc.enable(model, keep=keep)
        found[keep] = answer(model, call)
    assert len({str(each) for each in found.values()}) == 4
    return found


def answer(model, call):
    return model.generate(**call, max_new_tokens=6, do_sample=False)[0, call["input_ids"].shape[1] :].tolist()


def during(action, model, **options):
    """What `action` returns while another thread has a block open."""
    opened, closing = threading.Event(), threading.Event()

    def work():
        with vtc.compress(model, **options):
            opened.set()
            closing.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    assert opened.wait(30)
    try:
        return action()
    finally:
        closing.set()
        thread.join()


def in_thread(action):
    found = []
    thread = threading.Thread(target=lambda: found.append(action()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.supported(
    "Switching and blocks", "a block for each asyncio task, with worker threads (`asyncio.to_thread`)"
)
def test_two_tasks_with_worker_threads_have_their_own_blocks(stock, call, answers):
    async def request(keep, everyone):
        with vtc.compress(stock, keep=keep) as run:
            await everyone.wait()
            return await asyncio.to_thread(answer, stock, call), run.tokens_after

    async def server():
        everyone = asyncio.Barrier(3)
        return await asyncio.gather(*(request(keep, everyone) for keep in (3, 9, 12)))

    assert asyncio.run(server()) == [(answers[keep], keep) for keep in (3, 9, 12)]


def test_a_thread_has_its_own_block_and_not_that_of_another(stock, call, answers):
    def work(keep):
        with vtc.compress(stock, keep=keep):
            return answer(stock, call)

    with vtc.compress(stock, keep=12):
        assert in_thread(lambda: work(3)) == answers[3]
        assert answer(stock, call) == answers[12]
    assert during(lambda: answer(stock, call), stock, keep=3) == answers[TOKENS]


def test_a_thread_without_the_block_says_so_once(stock, call, answers, caplog):
    with caplog.at_level(logging.WARNING, "vtc"), vtc.compress(stock, keep=9):
        assert in_thread(lambda: answer(stock, call)) == answers[TOKENS]
        in_thread(lambda: answer(stock, call))
        assert [record.message for record in caplog.records if "not in this one" in record.message] == [
            caplog.records[0].message
        ]
        assert "copy_context().run" in caplog.text
        caplog.clear()
        assert in_thread(lambda: answer(models.build(), call)) == answers[TOKENS]  # another model
        context = contextvars.copy_context()
        assert in_thread(lambda: context.run(answer, stock, call)) == answers[9]
    assert not caplog.records


def test_a_block_that_is_closed_is_closed_in_every_context(stock, call, answers, caplog):
    with vtc.compress(stock, keep=9):
        context = contextvars.copy_context()
    assert context.run(answer, stock, call) == answers[TOKENS]
    assert "block of this call is closed" in caplog.text


def test_a_call_that_has_begun_goes_on_when_its_block_is_closed(stock, call, answers):
    """Prefill and decoding are one call, so they see the same settings."""
    block = vtc.compress(stock, keep=9, prune_layer=1)
    block.__enter__()
    expected = answer(stock, call)
    hook = stock.model.vision_tower.register_forward_hook(lambda *_: block.__exit__(None, None, None) or None)
    out = answer(stock, call)
    hook.remove()
    assert not OPEN
    assert out == expected != answers[TOKENS]
    assert answer(stock, call) == answers[TOKENS]


def test_blocks_may_close_in_any_order_and_in_another_context(stock, call, answers):
    def generator(keep):
        with vtc.compress(stock, keep=keep):
            yield

    outer, inner = generator(3), generator(9)
    next(outer)
    next(inner)
    assert answer(stock, call) == answers[9]
    outer.close()
    assert answer(stock, call) == answers[9]
    in_thread(inner.close)
    assert not vtc.is_enabled(stock)
    assert answer(stock, call) == answers[TOKENS]


@pytest.mark.supported(
    "Switching and blocks", "`vtc.enable`, `vtc.disable` and `vtc.configure` while another thread has a block open"
)
@pytest.mark.parametrize("first", ["on", "off"])
def test_what_others_do_meanwhile_stays(stock, call, answers, first):
    if first == "on":
        vtc.enable(stock, keep=3)
    during(lambda: vtc.enable(stock, keep=9), stock, keep=4)
    assert answer(stock, call) == answers[9]
    during(lambda: vtc.configure(stock, keep=12), stock, keep=4)
    assert answer(stock, call) == answers[12]
    during(lambda: stock.set_attn_implementation("eager"), stock, keep=4)
    assert not vtc.is_enabled(stock)
    assert stock.config.text_config._attn_implementation == "eager"
    vtc.enable(stock)
    during(lambda: vtc.disable(stock), stock, keep=4)
    assert not vtc.is_enabled(stock)
    assert stock.model.vision_tower.config._attn_implementation == "eager"
    assert not hasattr(stock.config, "vtc")


def test_configure_changes_the_block_of_this_context_only(stock, call, answers):
    with vtc.compress(stock, keep=9):
        with vtc.compress(stock, keep=4):
            vtc.configure(stock, keep=3)
            assert answer(stock, call) == answers[3]
        assert answer(stock, call) == answers[9]
        assert contextvars.copy_context().run(vtc.configure, stock, keep=12).keep == 12
        assert answer(stock, call) == answers[9]
    assert not hasattr(stock.config, "vtc")


def test_blocks_of_two_models_do_not_meet(stock, call, answers):
    other = models.build()
    with vtc.compress(stock, keep=9), vtc.compress(other, keep=3):
        assert (answer(stock, call), answer(other, call)) == (answers[9], answers[3])
    with vtc.compress(stock, keep=9):
        assert (vtc.is_enabled(stock), vtc.is_enabled(other)) == (True, False)


@pytest.mark.supported("Loading", "`copy.deepcopy` and pickling in a block: the copy is not in it")
def test_a_copy_made_in_a_block_is_the_model_alone(stock, call, answers):
    pickled = pickle.dumps(stock)
    with vtc.compress(stock, keep=3):
        assert pickle.dumps(stock) == pickled
        copies = [copy.deepcopy(stock), pickle.loads(pickled)]
        assert [vtc.is_enabled(each) for each in copies] == [False, False]
    for each in copies:
        with vtc.compress(each, keep=9):
            assert answer(each, call) == answers[9]
        assert answer(each, call) == answers[TOKENS]
        vtc.enable(each, keep=12)
        assert answer(copy.deepcopy(each), call) == answers[12]
        vtc.disable(each)
        assert not [name for name in vars(each.model) if "vtc" in name]
        assert answer(each, call) == answers[TOKENS]


@pytest.mark.supported("Loading", "an enabled model, unpickled in a process that has not imported vtc")
def test_an_enabled_model_is_unpickled_where_vtc_was_not_imported(stock, call, answers, tmp_path):
    vtc.enable(stock, keep=9)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((stock, call)))
    code = (
        "import pickle, sys\n"
        f"model, call = pickle.load(open({str(tmp_path / 'model.pkl')!r}, 'rb'))\n"
        "out = model.generate(**call, max_new_tokens=6, do_sample=False)\n"
        "print(out[0, call['input_ids'].shape[1]:].tolist())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == str(answers[9])


@pytest.mark.refused("`nn.DataParallel` in a block", instead="`vtc.enable`")
def test_a_replica_in_a_block_is_refused(stock, call):
    with vtc.compress(stock, keep=9):
        replica = copy.deepcopy(stock)
        replica.model._is_replica = True  # as nn.DataParallel marks the modules that it copies
        with pytest.raises(ValueError, match=r"nn\.DataParallel"):
            replica(**call)


def test_nothing_is_left_of_a_block(stock, call):
    before = {name: dict(vars(module)) for name, module in stock.named_modules() if "vision" not in name}
    with vtc.compress(stock, keep=9):
        inside = {name: dict(vars(module)) for name, module in stock.named_modules() if "vision" not in name}
        assert Settings.of(stock).config.keep == 9
    assert inside == before
    assert (OPEN, CONTEXT.blocks) == ([], ())


@pytest.mark.supported("Compiling", "compiled calls in blocks of several threads")
def test_compiled_calls_see_the_block_of_their_context(stock, call, answers):
    vtc.enable(stock, keep=12)
    pixels = models.images(1)
    stock.get_image_features(pixels)
    torch._dynamo.reset()
    compiled = torch.compile(stock.get_image_features, fullgraph=True, backend="eager")

    def count():
        with torch.no_grad():
            return len(compiled(pixels).pooler_output[0])

    def work(keep):
        with vtc.compress(stock, keep=keep):
            return count()

    assert [count(), work(3), count(), work(9), in_thread(lambda: work(3))] == [12, 3, 12, 9, 3]
    with vtc.compress(stock, keep=3):
        assert in_thread(count) == 12
        assert asyncio.run(asyncio.to_thread(count)) == 3
    torch._dynamo.reset()

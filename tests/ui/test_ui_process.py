"""How the page begins and how it ends, without a browser."""

import contextlib
import os
import signal

import pytest
import torch
from support.cli import succeed

from vtc.tiny.scenes import Scene
from vtc.ui import server
from vtc.ui.compare import Choice, Comparison, Stopped


def test_what_goes_on_after_the_end_computes_nothing(comparison, monkeypatch):
    model, processor = comparison.answerer.model, comparison.answerer.processor
    own = Comparison(model, processor, "bundled")
    steps = own.ask(Scene("test", 1).image, "how many objects are there ?", [Choice("vtc-cls", 9)], 1)
    next(steps)
    own.stop()
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(Stopped):
        next(steps)


def test_further_signals_do_not_cut_off_the_end(monkeypatch):
    names, ended = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), []

    @contextlib.contextmanager
    def running(*arguments):
        try:
            yield "http://127.0.0.1:7860/"
        finally:
            for name in names:
                os.kill(os.getpid(), name)
            ended.append(True)

    monkeypatch.setattr(server, "running", running)
    monkeypatch.setattr(server.webbrowser, "open", lambda address: os.kill(os.getpid(), signal.SIGTERM))
    handlers = [signal.getsignal(name) for name in names]
    server.serve(None, "127.0.0.1", 7860, True)
    assert ended == [True]
    assert [signal.getsignal(name) for name in names] == handlers


@pytest.mark.parametrize("given", [(), ("--model", "bundled")])
def test_the_bundled_model_takes_one_thread_by_any_spelling(monkeypatch, given):
    names, threads = [], torch.get_num_threads()
    monkeypatch.setattr(server, "require_port", lambda host, port: None)
    monkeypatch.setattr(server, "serve", lambda page, *rest: names.append((page.name, torch.get_num_threads())))
    torch.set_num_threads(2)
    try:
        succeed("ui", "--device", "cpu", *given)
    finally:
        torch.set_num_threads(threads)
    assert names == [("bundled", 1)]

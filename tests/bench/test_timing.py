"""Times: samples, turns, captured graphs, and which SDPA ran."""

import pytest
import torch
from support.bench import CPU
from support.kernels import DEVICE

from bench import graphs, timing


def test_times_have_seven_samples_or_more_in_order():
    calls = []
    times = timing.measure([lambda: calls.append(1)], CPU, rep_ms=0.0)
    assert 0 <= times.host[0] <= times.host[1] <= times.host[2]
    assert len(calls) == 1 + timing.SAMPLES == 8
    assert (times.device, times.why) == (None, "no GPU")


def test_inputs_take_turns():
    seen = []
    timing.measure([lambda: seen.append("a"), lambda: seen.append("b")], CPU, rep_ms=0.0)
    assert "".join(seen) == "ab" + "abababa"


def test_what_a_call_is_compared_with_takes_turns_with_it(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "host_ms", lambda call, device: call() or 2.0)
    times = timing.measure([lambda: seen.append("a")], CPU, rep_ms=0.0, other=lambda: seen.append("b") or 6.0)
    assert "".join(seen) == "ab" + 7 * "ba"
    assert times.host == (2.0, 2.0, 2.0)
    assert times.speedup == (3.0, 3.0, 3.0)


def test_a_played_graph_gives_a_time_and_refuses_what_a_capture_refuses():
    x = torch.randn(64, 64)
    times = timing.measure([lambda: x @ x], CPU, rep_ms=1.0, played=True)
    assert 0 < times.device[0] <= times.device[1] <= times.device[2]
    assert times.why is None
    for waits, name in (
        (lambda: x.sum().item(), "_local_scalar_dense"),
        (lambda: x.nonzero(), "nonzero"),
        (lambda: x[x > 0], "index"),
        (lambda: torch.equal(x, x), "equal"),
    ):
        times = timing.measure([waits], CPU, rep_ms=1.0, played=True)
        assert times.device is None
        assert times.why == f"not captured: RuntimeError: aten.{name} waits for the device"
        assert times.host[1] > 0


def test_the_sdpa_that_ran_is_known():
    query = torch.randn(1, 2, 8, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert timing.sdpa_backend(lambda: sdpa(query, query, query)) == "flash (CPU)"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert timing.sdpa_backend(lambda: sdpa(query, query, query)) == "math"
    assert timing.sdpa_backend(lambda: query @ query.mT) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")
def test_a_captured_graph_on_a_gpu():
    x = torch.randn(64, 64, device=DEVICE)
    times = timing.measure([lambda: x @ x], DEVICE, rep_ms=1.0)
    assert 0 < times.device[1] < times.host[1]
    assert timing.measure([lambda: x.sum().item()], DEVICE, rep_ms=1.0).device is None
    assert (x + 1).sum().isfinite()  # a capture that failed leaves the GPU usable


def test_transformers_does_under_a_capture_as_without(monkeypatch):
    from transformers.utils import import_utils

    if not hasattr(import_utils, "is_cuda_stream_capturing"):
        pytest.skip("this transformers does not ask")
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    assert import_utils.is_tracing(torch.ones(1))
    with graphs.uncaptured():
        assert not import_utils.is_tracing(torch.ones(1))

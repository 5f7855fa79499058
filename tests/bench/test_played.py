"""The stand-in for CUDA graphs: it replays what a graph would, and refuses what a capture would."""

import pytest
import torch

from bench.played import PlayedRecorder

WEIGHT = torch.randn(4, 4)
FOREIGN = torch.randn(3, 4)


def record(function, inputs, outputs):
    return PlayedRecorder(lambda: [WEIGHT]).record(function, inputs, outputs)


@pytest.fixture
def x():
    return torch.randn(3, 4)


def test_a_replay_computes_anew_from_its_inputs(x):
    out, made = torch.empty(3, 4), []

    def function():
        middle = (x @ WEIGHT).t().contiguous()
        made.append(middle)
        middle[:2].add_(1)
        torch.mul(middle.t(), 2, out=out)

    replay = record(function, [x], [out])
    assert len(made) == 2  # once to warm up
    for seed in (1, 2):
        given = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        x.copy_(given)
        replay()
        expected = (given @ WEIGHT).t().contiguous()
        expected[:2] += 1
        assert torch.equal(out, 2 * expected.t())
        assert made[1].isnan().all()  # other graphs use the memory
        assert x.isnan().all()


def test_a_weight_that_changes_in_place_is_read(x):
    out = torch.empty(3, 4)
    replay = record(lambda: out.copy_(x @ WEIGHT), [x], [out])
    given = torch.randn(3, 4)
    before = WEIGHT.clone()
    try:
        WEIGHT.mul_(2)
        x.copy_(given)
        replay()
        assert torch.equal(out, given @ WEIGHT)
    finally:
        WEIGHT.copy_(before)


def test_an_input_that_is_an_output_stays(x):
    replay = record(lambda: x.add_(1), [x], [x])
    x.zero_()
    replay()
    replay()
    assert torch.equal(x, torch.full((3, 4), 2.0))


@torch.library.custom_op("played_tests::split", mutates_args={"total"})
def split(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    total.copy_(x.sum(1))
    return x * 2


def test_an_operation_that_writes_and_returns(x):
    total, out = torch.empty(3), torch.empty(3, 4)
    replay = record(lambda: out.copy_(split(x, total)), [x], [total, out])
    for number in (1, 2):
        x.fill_(number)
        replay()
        assert torch.equal(total, torch.full((3,), 4.0 * number))
        assert torch.equal(out, torch.full((3, 4), 2.0 * number))


REFUSED = {
    "aten._local_scalar_dense waits for the device": lambda x: x.sum().item(),
    "aten.nonzero waits for the device": lambda x: (x > 0).nonzero(),
    "aten.index waits for the device": lambda x: x[x > 0],
    "aten.equal waits for the device": lambda x: torch.equal(x, x),
    "a constant of the host is copied to the device": lambda x: x + torch.tensor([1.0], device=x.device),
    r"torch.arange\(\) without a device makes a tensor on the host": lambda x: x + torch.arange(4),
    r"aten.add reads a tensor \[3, 4\] that is no input and no weight": lambda x: x + FOREIGN,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_capture_refuses_or_a_replay_would_miss(x, message):
    with pytest.raises(RuntimeError, match=message):
        record(lambda: REFUSED[message](x), [x], [])


def test_tolist_is_refused(x):
    """On a CPU it dispatches nothing."""
    with pytest.raises(RuntimeError, match="tolist waits for the device"):
        record(lambda: x.sum(1).tolist(), [x], [])

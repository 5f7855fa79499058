"""A plugin of pytest: every model that compresses uses graphs, which are played on the CPU.

    pytest -p support.played tests/hf

Numbers differ in their last digits then, so tests that ask for the same bits are left out, by name.
"""

from collections import Counter

from bench.played import PlayedRecorder
from vtc.hf import patch, settings
from vtc.hf.graphs import model as graphs

# Tests that do not hold with graphs, and why.
LEFT_OUT: dict[str, str] = {}
LEAST = {"vision": 100, "prompt": 100, "step": 1000}  # replays of a run over all of tests/hf, or it tested nothing
REPLAYS: Counter[str] = Counter()
REFUSALS: Counter[str] = Counter()


def switch_on(base):
    """Give a LLaVA without its head graphs, unless it has some."""
    if graphs.of(base) is not None or next(base.parameters()).device.type != "cpu":
        return
    made = graphs.Graphs(base, recorder=lambda _: PlayedRecorder(lambda: [*base.parameters(), *base.buffers()]))
    made._recorded.replays, made._recorded.refusals = REPLAYS, REFUSALS
    try:
        graphs.switch_on(base, made)
    except ValueError as error:  # of accelerate
        REFUSALS[str(error)] += 1


def pytest_configure():
    is_on = settings.is_on

    def with_graphs(model):
        on = is_on(model)
        if on:
            switch_on(model.base_model)
        return on

    patch.is_on = with_graphs


def pytest_collection_modifyitems(config, items):
    left = [item for item in items if item.nodeid.partition("[")[0] in LEFT_OUT]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_sessionfinish(session):
    print("\nreplays", dict(REPLAYS))
    for reason, count in REFUSALS.most_common():
        print(f"not replayed {count}: {reason}")

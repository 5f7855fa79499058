"""A plugin of pytest: every model that compresses uses graphs, which are played on the CPU.

    pytest -p support.played tests/hf

A replayed prompt is longer and has no mask, so numbers differ in their last digits. Here `torch.equal` of
floating-point tensors means equal up to that. Tests that look into what graphs replace are left out, by name.
"""

import collections

import torch

HIDDEN = "looks at columns that the mask hides, where graphs have other values"
LEFT_OUT = {  # tests that do not hold with graphs, and why
    "tests/hf/test_attention.py::test_flash_attn_is_called_as_it_documents": "counts calls that a replay does not make",
    "tests/hf/test_cost.py::test_the_cache_holds_the_short_prompt_and_nothing_else": "the tensors share their memory",
    "tests/hf/test_cost.py::test_vision_activations_are_linear_in_the_tokens": "counts the memory of graphs, too",
    "tests/hf/test_encode.py::test_which_way_a_scored_layer_takes": "counts calls that a recording makes, too",
    "tests/hf/test_families.py::test_features_take_their_places_without_a_count_on_the_device": HIDDEN,
    "tests/hf/test_families.py::test_forward": HIDDEN,
    "tests/hf/test_generate.py::test_keep_all_is_bit_identical": HIDDEN,
    "tests/hf/test_methods_model.py::test_none_is_the_stock_model": HIDDEN,
    "tests/hf/test_settings_cache.py::test_a_decoding_step_asks_its_cache_for_a_note_and_nothing_else": "counts calls",
    "tests/hf/test_status.py::test_an_enabled_model_and_what_it_has_compressed": "reads a status",
    "tests/hf/test_training.py::test_one_model_in_two_threads": "graphs are an attribute of the model",
    "tests/hf/test_positions.py::test_keeping_all_is_the_stock_model": HIDDEN,
    "tests/hf/test_own_method.py::test_an_object_gives_the_tokens_of_the_built_in_that_it_copies": "reads a report",
}
LEAST = {"vision": 500, "prompt": 500, "step": 2000}  # replays of a run over all of tests/hf
replays, refusals = collections.Counter(), collections.Counter()
really_equal = torch.equal


def switch_on(base):
    """Give a LLaVA without its head graphs, unless it has some."""
    from bench import played
    from vtc.hf.graphs import model as graphs

    if graphs.of(base) is None:
        try:
            made = played.switch_on(base)
        except ValueError as error:  # accelerate moves its weights
            refusals[str(error)] += 1
        else:
            made._recorded.replays, made._recorded.refusals = replays, refusals


def equal(one, other):
    """`torch.equal`, up to rounding."""
    if one.is_floating_point() and one.shape == other.shape and one.dtype == other.dtype:
        return torch.allclose(one, other, rtol=1e-4, atol=2e-5, equal_nan=True)
    return really_equal(one, other)


def pytest_configure():
    """After conftest.py: it sets what Triton reads when it is imported."""
    from vtc.hf import patch

    is_on = patch.is_on

    def with_graphs(model):
        on = is_on(model)
        if on and not torch.compiler.is_compiling():
            switch_on(model.base_model)
        return on

    patch.is_on = with_graphs
    torch.equal = equal


def pytest_collection_modifyitems(config, items):
    left = [item for item in items if item.nodeid.partition("[")[0] in LEFT_OUT]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_testnodedown(node, error):
    """For a worker of xdist that has ended."""
    counts = getattr(node, "workeroutput", {}).get("played", ({}, {}))
    replays.update(counts[0])
    refusals.update(counts[1])


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["played"] = (dict(replays), dict(refusals))
        return
    print("\nreplayed:", ", ".join(f"{kind} {count}" for kind, count in replays.items()))
    for reason, count in refusals.most_common():
        print(f"not replayed: {reason} ({count})")
    few = [kind for kind, least in LEAST.items() if replays[kind] < least]
    if few and session.testscollected > 500:
        print("too few replays:", *few)
        session.exitstatus = 1

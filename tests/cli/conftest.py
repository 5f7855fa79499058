"""The model and the image that the command is called with."""

import functools
import json

import pytest
import torch

from vtc.cli import demo
from vtc.eval import measure
from vtc.tiny.scenes import Scene


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A LLaVA like the bundled one with random weights, large enough that the answer depends on every visual token."""
    from vtc.tiny.model import build_model, build_processor

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = build_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, (3.0 if "q_proj" in name or "k_proj" in name else 1.2) * weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["temperature"] = 0.7  # as in LLaVA-1.5; with greedy decoding transformers warns about it
    (folder / "generation_config.json").write_text(json.dumps(generation))
    build_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "scene.png"
    Scene("test", 3).image.save(file)
    return str(file)


@pytest.fixture(autouse=True)
def _restore_logging():
    """The command silences transformers for the whole process, here for one test only."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture
def few_runs(monkeypatch):
    """Times are not looked at here: measure once."""
    once = functools.partial(measure.first_tokens, runs=1)
    for module in (measure, demo):
        monkeypatch.setattr(module, "first_tokens", once)


@pytest.fixture(autouse=True)
def _restore_threads():
    """The command sets the threads of torch for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

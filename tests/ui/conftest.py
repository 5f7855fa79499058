"""The bundled model, which the page shows and the tests ask, too."""

import pytest
import torch

from vtc.eval import BUNDLED, ask
from vtc.ui.compare import Comparison


@pytest.fixture(scope="session")
def comparison():
    threads = torch.get_num_threads()
    ask.use_threads(None)
    yield Comparison(*ask.load(BUNDLED, "cpu", "auto"), BUNDLED)
    torch.set_num_threads(threads)

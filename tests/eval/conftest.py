"""The bundled model, loaded once for the tests of the evaluation."""

import pytest

from vtc.eval.local import LocalEngine
from vtc.eval.model import ModelSpec


@pytest.fixture(scope="session")
def spec():
    return ModelSpec()


@pytest.fixture(scope="session")
def engine(spec):
    engine = LocalEngine()
    engine.answerer(spec)
    return engine

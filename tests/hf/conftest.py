"""A small LLaVA, plain, saved, compressing, and with eager attention for the golden path."""

import pytest
from support import models
from support.golden import llava as golden
from transformers import LlavaForConditionalGeneration


@pytest.fixture(scope="module")
def stock():
    return models.build()


@pytest.fixture(scope="module")
def saved(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    stock.save_pretrained(path)
    return path


@pytest.fixture
def model(saved):
    return LlavaForConditionalGeneration.from_pretrained(saved, attn_implementation="vtc")


@pytest.fixture(scope="module")
def eager(stock):
    return golden.eager(stock)

"""Block sizes of cls_attention: what was measured on a GPU is taken there, and nowhere else."""

import pytest
import torch
from support.kernels import LAYOUTS, in_layout

from vtc_kernels import tuning

HOPPER = (9, 0)


def test_measured_blocks_are_taken_where_they_were_measured(monkeypatch):
    shipped = tuning.attention_blocks(64, 2, HOPPER)
    chosen = next(choice for choice in tuning.ATTENTION_CHOICES if choice != (*shipped[:2], *shipped[3:5]))
    monkeypatch.setattr(tuning, "MEASURED", {(HOPPER, 64, 2): chosen})
    assert tuning.attention_blocks(64, 2, HOPPER) == (*chosen[:2], 64, *chosen[2:], True)
    assert tuning.attention_blocks(64, 2, HOPPER, strided=True) != tuning.attention_blocks(64, 2, HOPPER)
    for other in ((64, 2, (8, 0)), (64, 2, None), (32, 2, HOPPER)):
        assert tuning.attention_blocks(*other)[:2] == shipped[:2]
    assert tuning.attention_blocks(64, 4, HOPPER) == tuning.attention_blocks(64, 4)


def test_every_measured_choice_is_one_of_the_choices():
    assert set(tuning.MEASURED.values()) <= set(tuning.ATTENTION_CHOICES)


@pytest.mark.parametrize("peel", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 63, 64, 65, 66, 128, 577, 730])
def test_each_key_is_in_one_block(num_tokens, peel):
    split = tuning.attention_split(num_tokens, 64, 64, peel)
    whole = 64 * split["NUM_BLOCKS"]
    if peel:
        assert not split["MASKED"]
        assert whole <= num_tokens <= whole + split["REST"] <= whole + 64
        assert bool(split["REST"]) == (num_tokens > whole)
    else:
        assert split["REST"] == 0
        assert whole - 64 < num_tokens <= whole
        assert split["MASKED"] == (whole > num_tokens)
    assert split["EVEN"] == ((num_tokens - 1) % 64 == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_tensors_have_16_aligned_bytes_everywhere(layout):
    dense = layout in ("contiguous", "tokens first")
    assert tuning.is_dense(in_layout(torch.zeros(2, 3, 5, 72, dtype=torch.float16), layout)) == dense
    assert not tuning.is_dense(in_layout(torch.zeros(2, 3, 5, 20, dtype=torch.float16), layout))
    assert not tuning.is_dense(in_layout(torch.zeros(2, 3, 5, 72, dtype=torch.float16), layout)[..., 1:])
    assert tuning.is_dense(torch.zeros(1, 3, 5, 64)[:, :, ::2])


def test_capability_is_that_of_nvidia_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    assert tuning.capability(torch.device("cpu")) is None
    monkeypatch.setattr(torch.version, "hip", None)
    assert tuning.capability(torch.device("cuda")) == HOPPER
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert tuning.capability(torch.device("cuda")) is None  # an MI250 says 9.0, too

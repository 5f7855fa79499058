"""Reading and shortening prompts, against a few lines of Python that go row by row and token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtc.hf.prompt import FullPrompt, Prompt, Shortening

IMAGE, VIDEO, PAD = 90, 91, 0
TEXT = st.lists(st.integers(1, 80), max_size=4)


@st.composite
def batches(draw):
    """Rows of text and images, padded on either side, with N and K of each image."""
    rows, counts = [], {IMAGE: [], VIDEO: []}
    for _ in range(draw(st.integers(1, 3))):
        row = draw(TEXT)
        for token in draw(st.lists(st.sampled_from([IMAGE, VIDEO]), max_size=3)):
            size = draw(st.integers(1, 5))
            counts[token].append((size, draw(st.integers(1, size))))
            row += [token] * size + draw(TEXT) + [7]
        rows.append(row or [7])
    length = max(map(len, rows)) + draw(st.integers(0, 2))
    left = [draw(st.integers(0, length - len(row))) for row in rows]
    return rows, counts, left, length


def tensors(rows, left, length):
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for i, (row, start) in enumerate(zip(rows, left, strict=True)):
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask


def shorten_slowly(rows, counts):
    """Of each row the places that stay, among its own tokens."""
    left = {token: list(own) for token, own in counts.items()}
    stays = []
    for row in rows:
        kept, at = [], 0
        while at < len(row):
            if row[at] in left:
                size, keep = left[row[at]].pop(0)
                kept += [at + min(number, size - 1) for number in range(keep)]
                at += size
            else:
                kept.append(at)
                at += 1
        stays.append(kept)
    return stays


def sizes(counts):
    return {token: [size for size, _ in own] for token, own in counts.items()}


def choose(rows, counts, draw):
    """`kept` for `Prompt.shortening`: of each image which placeholders stay, drawn; and the same row by row."""
    kept, stays, left = {token: [] for token in counts}, [], {token: list(own) for token, own in counts.items()}
    for row in rows:
        own, at = [], 0
        while at < len(row):
            if row[at] in left:
                size, keep = left[row[at]].pop(0)
                numbers = sorted(draw(st.permutations(range(size)))[:keep])
                kept[row[at]] += [number in numbers for number in range(size)]
                own += [at + number for number in numbers]
                at += size
            else:
                own.append(at)
                at += 1
        stays.append(own)
    return {token: torch.tensor(each, dtype=torch.bool) for token, each in kept.items()}, stays


def shorten(prompt, counts, kept, mask=None, positions=None, **more):
    shortening = prompt.shortening(counts, kept)
    return shortening, prompt.shortened(shortening, mask, positions, pad=PAD, **more)


@given(batches(), st.data())
def test_shortened_is_what_stays_of_each_row(batch, data):
    rows, counts, left, length = batch
    ids, mask = tensors(rows, left, length)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    merges = data.draw(st.booleans())  # a method whose tokens are no patches: the first K, and maybe one more than N
    if merges:
        more = {token: [(n, k + data.draw(st.integers(0, k == n))) for n, k in own] for token, own in counts.items()}
        counts = more
    prompt = Prompt.read(ids, mask, sizes(counts))
    if merges:
        kept, stays = dict.fromkeys(counts), shorten_slowly(rows, counts)
    else:
        kept, stays = choose(rows, counts, data.draw)
    assert prompt.num_tokens == [len(row) for row in rows]
    assert prompt.lengths(counts) == [len(own) for own in stays]
    shortening, short = shorten(prompt, counts, kept, mask, positions)
    if all(size == keep for own in counts.values() for size, keep in own):
        assert shortening is None
        assert short["input_ids"] is ids
        assert short["attention_mask"] is mask
        return
    width = max(map(len, stays))
    counted = shorten(prompt, counts, kept, mask, counted=True)[1]["position_ids"]
    full = shortening.spread(counted[..., None])[..., 0]
    for i, (row, own) in enumerate(zip(rows, stays, strict=True)):
        pad = width - len(own)
        assert short["input_ids"][i].tolist() == [PAD] * pad + [row[at] for at in own]
        assert short["attention_mask"][i].tolist() == [0] * pad + [1] * len(own)
        assert short["position_ids"][i].tolist() == [0] * pad + list(range(len(own)))
        assert counted[i].tolist() == [0] * pad + list(range(len(own)))
        places = [max(sum(at <= j - left[i] for at in own) - 1, 0) for j in range(length)]
        assert full[i].tolist() == places


@given(batches())
def test_without_a_mask_every_column_is_a_token(batch):
    rows, counts, _, _ = batch
    length = max(map(len, rows))
    rows = [row + [7] * (length - len(row)) for row in rows]
    ids, _ = tensors(rows, [0] * len(rows), length)
    _, short = shorten(Prompt.read(ids, None, sizes(counts)), counts, dict.fromkeys(counts))
    stays = shorten_slowly(rows, counts)
    lengths = {len(kept) for kept in stays}
    assert ("attention_mask" in short) == (len(lengths) > 1)
    for i, (row, kept) in enumerate(zip(rows, stays, strict=True)):
        assert short["input_ids"][i].tolist()[-len(kept) :] == [row[at] for at in kept]


def test_the_prompt_is_read_back_once(monkeypatch):
    reads, stock = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or stock(self))
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, VIDEO, VIDEO, VIDEO]])
    counts = {IMAGE: [(2, 1)], VIDEO: [(3, 2)]}
    prompt = Prompt.read(ids, None, sizes(counts))
    assert reads == [(4, 1)]
    shorten(prompt, counts, dict.fromkeys(counts))
    assert len(reads) == 1


def test_a_mask_of_a_static_cache_is_read_from_its_last_row():
    ids = torch.tensor([[PAD, 5, IMAGE, IMAGE, 6]])
    seen = torch.tensor([[False, True, True, True, True, False, False]])
    for mask in (seen[:, None, None], torch.where(seen, 0.0, -torch.inf)[:, None, None]):
        prompt = Prompt.read(ids, mask.expand(1, 1, 5, 7), {IMAGE: [2]}, static=True)
        assert prompt.real.tolist() == [[False, True, True, True, True]]
        assert prompt.is_padded
        with pytest.raises(ValueError, match=r"attention_mask must be \[B, L\] = \[1, 5\], got \[1, 1, 5, 7\]"):
            Prompt.read(ids, mask.expand(1, 1, 5, 7), {IMAGE: [2]})


@pytest.mark.parametrize(
    ("row", "images", "says"),
    [
        ([1, IMAGE, IMAGE, 2], [2, 2], r"got 2 image\(s\), but the rows of input_ids hold 2 image placeholders"),
        ([1, IMAGE, IMAGE, IMAGE, 2], [2], "each image takes 2, all in one row"),
        ([1, 2], [2], "hold 0 image placeholders"),
        ([1, IMAGE], [], "each image takes none"),
    ],
)
def test_images_and_placeholders_that_do_not_match(row, images, says):
    with pytest.raises(ValueError, match=says):
        Prompt.read(torch.tensor([row]), None, {IMAGE: images})


def test_an_image_in_two_rows_is_refused():
    with pytest.raises(ValueError, match="all in one row"):
        Prompt.read(torch.tensor([[1, IMAGE], [IMAGE, 2]]), None, {IMAGE: [2]})


def test_a_mask_may_hide_kept_patches_and_text_in_the_middle():
    ids, mask = torch.tensor([[PAD, 1, 5, IMAGE, IMAGE, IMAGE, 6]]), torch.tensor([[0, 1, 0, 1, 0, 0, 1]])
    prompt = Prompt.read(ids, mask, {IMAGE: [3]})
    kept = {IMAGE: torch.tensor([True, False, True])}
    shortening, short = shorten(prompt, {IMAGE: [(3, 2)]}, kept, mask, counted=True)
    assert prompt.hides_images
    assert shortening.stays.tolist() == [[False, True, True, True, False, True, True]]
    assert short["input_ids"].tolist() == [[1, 5, IMAGE, IMAGE, 6]]
    assert short["attention_mask"].tolist() == [[1, 0, 1, 0, 1]]
    assert short["position_ids"].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("hidden", [[2], [3], [2, 3]])
def test_merged_tokens_are_hidden_all_or_not_at_all(hidden):
    ids, mask = torch.tensor([[1, 5, IMAGE, IMAGE, 6]]), torch.ones(1, 5, dtype=torch.long)
    mask[0, hidden] = 0
    prompt = Prompt.read(ids, mask, {IMAGE: [2]})
    if len(hidden) == 2:
        _, short = shorten(prompt, {IMAGE: [(2, 1)]}, {IMAGE: None}, mask)
        assert short["attention_mask"].tolist() == [[1, 1, 0, 1]]
    else:
        with pytest.raises(ValueError, match="hides 1 of the 2 placeholders of image 0"):
            prompt.shortening({IMAGE: [(2, 1)]}, {IMAGE: None})
    _, short = shorten(prompt, {IMAGE: [(2, 2)]}, {IMAGE: None}, mask)
    assert short["attention_mask"] is mask  # nothing is dropped


def test_packed_rows_get_no_mask_and_padding_is_a_sample():
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, 1, 3], [1, 4, 5, 6, 1, 7]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]])
    prompt = Prompt.read(ids, None, {IMAGE: [2]})
    _, short = shorten(prompt, {IMAGE: [(2, 1)]}, {IMAGE: None}, None, positions, packed=True)
    assert "attention_mask" not in short
    assert short["position_ids"].tolist() == [[0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 1]]


def test_one_token_more_than_placeholders_moves_its_own_sample_only():
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, 1, 3, 4, 1, 5]])
    positions = torch.tensor([[4, 5, 6, 7, 0, 1, 2, 0, 1]])
    prompt = Prompt.read(ids, None, {IMAGE: [2]})
    shortening, short = shorten(prompt, {IMAGE: [(2, 3)]}, {IMAGE: None}, None, positions, packed=True)
    assert short["input_ids"].tolist() == [[1, IMAGE, IMAGE, IMAGE, 2, 1, 3, 4, 1, 5]]
    assert short["position_ids"].tolist() == [[4, 5, 6, 7, 8, 0, 1, 2, 0, 1]]
    assert shortening.stays.tolist() == [[1, 1, 2, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("name", ["mask", "position_ids"])
def test_whatever_goes_with_the_ids_has_their_columns(name):
    prompt = Prompt.read(torch.tensor([[1, IMAGE, IMAGE]]), None, {IMAGE: [2]})
    given = {"mask": None, name: torch.ones(1, 2)}
    with pytest.raises(ValueError, match=r"must have the 3 columns of input_ids, got shape \[1, 2\]"):
        prompt.shortened(None, **given)


def test_a_mask_of_one_row_is_for_all():
    ids, mask = torch.tensor([[PAD, 1, IMAGE, IMAGE], [PAD, 2, IMAGE, IMAGE]]), torch.tensor([[0, 1, 1, 1]])
    assert Prompt.read(ids, mask, {IMAGE: [2, 2]}).num_tokens == [3, 3]


def test_a_shortening_is_right_aligned():
    stays = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    shortening = Shortening(stays, 3, 1)
    assert shortening.columns[0].tolist() == [0, 2, 3]
    assert shortening.columns[1, -1] == 2
    assert shortening.filled.tolist() == [[True] * 3, [False, False, True]]
    assert shortening.take(torch.arange(10).view(2, 5), -1).tolist() == [[0, 2, 3], [-1, -1, 7]]


def test_the_full_prompt_comes_back_for_every_copy():
    full = torch.tensor([[1, 2, 3], [4, 5, 6]])
    prompt = FullPrompt(full, short_length=2)
    short = torch.tensor([[1, 3, 10], [1, 3, 11], [4, 6, 12], [4, 6, 13]])
    expected = [[1, 2, 3, 10], [1, 2, 3, 11], [4, 5, 6, 12], [4, 5, 6, 13]]
    assert prompt.restore(short).tolist() == expected

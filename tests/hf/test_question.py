"""Methods that select by the question, and the image made smaller: prompts, tiles and frames, in the golden path too.

What is the same for every method is in `test_methods_model.py`.
"""

import re

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.golden import methods as golden_methods
from support.models import GRID, IMAGE, TOKENS, VIDEO, ids
from test_compiling import Logits
from test_families import SIZES
from test_methods_model import DEPTH, KEEP, Seen, detailed, options, projected
from test_settings_cache import of

import vtc
from vtc import reference, tiny
from vtc.hf.families import FAMILIES
from vtc.hf.prompt import Prompt
from vtc.hf.question import question_of
from vtc.hf.settings import Settings
from vtc.methods import METHODS
from vtc.methods.question import ignored_ids
from vtc.ops import lazy

GOLDEN = {"mmtok": golden_methods.mmtok, "cdpruner": golden_methods.cdpruner}


@pytest.fixture(scope="module")
def built():
    made = {}

    def get(family="llava", tower="clip_vision_model", **overrides):
        key = (family, tower, *overrides.items())
        if key not in made:
            model = models.build(DEPTH, family=family, tower=tower, **overrides)
            made[key] = model, golden.eager(model)
        vtc.disable(made[key][0])
        return made[key]

    return get


def kept_of(eager, image, row, method, keep=KEEP):
    seen = Seen(eager, image, row=row)
    return GOLDEN[method](seen.hidden, seen.projected, seen.words, keep)[0]


@pytest.mark.parametrize("method", GOLDEN)
def test_the_question_decides(built, method):
    model, eager = built()
    rows, pixels = [ids(3, "image", 5, seed=seed) for seed in (0, 1)], models.images(1).repeat(2, 1, 1, 1)
    found = vtc.select(model, {**models.batch(rows), "pixel_values": pixels}, method=method, keep=KEEP)
    assert found.indices.tolist() == [kept_of(eager, pixels[0], row, method) for row in rows]
    assert not torch.equal(*found.indices)


@pytest.mark.parametrize("method", GOLDEN)
def test_what_is_ignored_does_not_count(built, method):
    """Everywhere in the prompt; if nothing is left, the whole text counts."""
    model, eager = built()
    row, pixels = ids(3, "image", 5), models.images(1)
    call = {**models.batch([row]), "pixel_values": pixels}
    for ignore in ((row[1], row[-2]), tuple(range(models.VOCAB))):
        short = [token for token in row if token == IMAGE or token not in ignore]
        expected = kept_of(eager, pixels[0], short if len(short) > TOKENS else row, method)
        assert vtc.select(model, call, method=method, keep=KEEP, ignore=ignore).indices[0].tolist() == expected
        with vtc.compress(model, method=method, keep=KEEP, ignore=ignore):
            logits = model(**call).logits[0, -1].detach()
        features = projected(eager, Seen(eager, pixels[0]).hidden[1:][expected])
        embeds = golden.splice_features(eager, row, [(TOKENS, features)])
        golden.close(logits, golden.logits(eager, embeds)[-1].detach())


@pytest.mark.parametrize("method", GOLDEN)
@pytest.mark.parametrize("side", ["left", "no embedding", "right", "none"])
def test_what_the_mask_hides_is_no_text(built, method, side):
    model, eager = built()
    rows, pixels = [ids(3, "image", 5), ids(2, "image", 1, seed=1)], models.images(2)
    call = {**models.batch(rows), "pixel_values": pixels}
    expected = [kept_of(eager, image, row, method) for image, row in zip(pixels, rows, strict=True)]
    if side == "no embedding":  # the id of padding in the first conversions of LLaMA
        call["input_ids"].masked_fill_(call["attention_mask"] == 0, -1)
    if side == "right":
        call |= {name: torch.stack([call[name][0], call[name][1].roll(-5)]) for name in ("input_ids", "attention_mask")}
    if side == "none":  # a token within the text is hidden, as a sample may have it that was edited
        call["attention_mask"][0, -2] = 0
        expected[0] = kept_of(eager, pixels[0], [*rows[0][:-2], rows[0][-1]], method)
    assert vtc.select(model, call, method=method, keep=KEEP).indices.tolist() == expected


@pytest.mark.parametrize("method", GOLDEN)
def test_a_prompt_of_an_image_alone(built, method):
    model, _ = built()
    call = {"input_ids": torch.full((1, TOKENS), IMAGE), "pixel_values": models.images(1)}
    for mask in ({}, {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}):
        with vtc.compress(model, method=method, keep=KEEP) as run:
            assert model(**call, **mask).logits.isfinite().all()
        assert run.tokens_after == KEEP


@pytest.mark.parametrize("method", GOLDEN)
def test_beams_and_samples_of_a_prompt_share_its_images(built, method):
    model, eager = built()
    rows, pixels = [ids(3, "image", 2), ids(1, "image", 4, seed=1)], models.images(2)
    with vtc.compress(model, method=method, keep=KEEP):
        out = model.generate(
            **models.batch(rows), pixel_values=pixels, max_new_tokens=4, num_beams=3, num_return_sequences=2
        )
    for i, (row, image) in enumerate(zip(rows, pixels, strict=True)):
        kept = kept_of(eager, image, row, method)
        features = projected(eager, Seen(eager, image).hidden[1:][kept])
        embeds = golden.splice_features(eager, row, [(TOKENS, features)])
        alone = eager.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2]),
            max_new_tokens=4,
            num_beams=3,
            num_return_sequences=2,
        )
        assert torch.equal(out[2 * i : 2 * i + 2, max(map(len, rows)) :], alone)


@pytest.mark.supported("Caches", "a new image in a further turn, selected by the question of that turn")
@pytest.mark.parametrize("method", GOLDEN)
def test_a_further_turn_asks_its_own_question(built, method):
    model, eager = built()
    pixels = models.images(2)
    vtc.enable(model, method=method, keep=KEEP)
    first = model.generate(**models.batch([ids(3, "image", 2)]), pixel_values=pixels[:1], **detailed())
    more = ids("image", 4, seed=3)[1:]
    row = first.sequences[0].tolist() + more
    cache = first.past_key_values if hasattr(first, "past_key_values") else first.cache
    second = model.generate(**models.batch([row]), pixel_values=pixels[1:], past_key_values=cache, **detailed())
    # The last generated token is not in the cache, so it belongs to the new columns.
    questions = [ids(3, "image", 2), row[first.sequences.shape[1] - 1 :]]
    visuals = []
    for image, question in zip(pixels, questions, strict=True):
        kept = kept_of(eager, image, question, method)
        visuals.append((TOKENS, projected(eager, Seen(eager, image).hidden[1:][kept])))
    new, logits = golden.decode(eager, golden.splice_features(eager, row, visuals), 5)
    assert second.sequences[0, len(row) :].tolist() == new
    golden.close(torch.stack(second.logits)[:, 0], logits)


@pytest.mark.refused(
    "`get_image_features(pixel_values)` alone with a method that selects by the question",
    instead="`generate()`, `forward()` or `vtc.select(model, inputs)`",
)
@pytest.mark.parametrize("method", GOLDEN)
def test_pixels_alone_have_no_question(built, method):
    model, _ = built()
    pixels = models.images(1)
    with (
        vtc.compress(model, method=method, keep=KEEP),
        pytest.raises(
            ValueError, match=rf"'{method}' selects patches by the question, and pixels alone have none; pass"
        ),
    ):
        model.get_image_features(pixels)
    for given in (pixels, {"pixel_values": pixels}):
        with pytest.raises(ValueError, match=rf"'{method}' selects patches by the question; pass all of the processor"):
            vtc.select(model, given, method=method, keep=KEEP)


@pytest.mark.parametrize("method", GOLDEN)
def test_a_tower_without_cls(built, method):
    model, eager = built(tower="siglip_vision_model", vision_feature_select_strategy="full")
    row, pixels = ids(3, "image", 5), models.images(1)
    seen = Seen(eager, pixels[0], row=row)
    expected = GOLDEN[method](seen.hidden, seen.projected, seen.words, KEEP)[0]
    call = {**models.batch([row]), "pixel_values": pixels}
    assert vtc.select(model, call, method=method, keep=KEEP).indices[0].tolist() == expected
    with torch.no_grad(), vtc.compress(model, method=method, keep=KEEP):
        features = models.image_features(model(**call))
    golden.close(features, projected(eager, seen.hidden[1:][expected]))


@pytest.mark.parametrize("method", GOLDEN)
def test_the_tiles_of_an_image_are_one(built, method):
    """Of two prompts, one with two images: all patches of an image compete, and newlines come last."""
    model, eager = built("llava_next")
    names = [(50, 120), (168, 168), (150, 70)]
    tokens = [golden.tile_tokens(GRID, *SIZES[size], size) for size in names]
    counts = [1 + SIZES[size][0] * SIZES[size][1] for size in names]
    views = list(models.images(sum(counts)).split(counts))
    rows = [[1, 7, *[IMAGE] * len(tokens[0]), 8, *[IMAGE] * len(tokens[1]), 9], [1, *[IMAGE] * len(tokens[2]), 5, 6]]
    visuals, keep = [], 20
    for own, layout, row in zip(views, tokens, (rows[0], rows[0], rows[1]), strict=True):
        seen = [Seen(eager, view, row=row) for view in own]
        hidden = torch.stack([seen[token[0]].hidden[1 + token[1]] for token in layout if token is not None])
        every = torch.cat([hidden[:1], hidden])
        features = projected(eager, hidden)
        kept = GOLDEN[method](every, features.double(), seen[0].words, keep)[0]
        visuals.append((len(layout), features[kept]))
    call = {
        **models.batch(rows),
        "pixel_values": torch.nn.utils.rnn.pad_sequence(views, batch_first=True),
        "image_sizes": torch.tensor(names),
    }
    with vtc.compress(model, method=method, keep=keep):
        out = model.generate(**call, **detailed())
    for i, (row, own) in enumerate(zip(rows, (visuals[:2], visuals[2:]), strict=True)):
        new, logits = golden.decode(eager, golden.splice_features(eager, row, own), 5)
        assert out.sequences[i, call["input_ids"].shape[1] :].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


@pytest.mark.parametrize("method", GOLDEN)
def test_select_shows_the_tiles_one_by_one(built, method):
    model, eager = built("llava_next")
    views, size = models.images(3), (50, 120)
    row = [1, 7, *[IMAGE] * len(golden.tile_tokens(GRID, *SIZES[size], size)), 8, 9]
    call = {"input_ids": torch.tensor([row]), "pixel_values": views[None], "image_sizes": torch.tensor([size])}
    found = vtc.select(model, call, method=method, keep=KEEP)
    assert found.indices.tolist() == [kept_of(eager, view, row, method) for view in views]


def video_call(model, videos=2, frames=3):
    per_frame = (GRID // 2) ** 2
    pixels = models.images(videos * frames).unflatten(0, (videos, frames))
    rows = [[1, 7 + i, *[VIDEO] * (frames * per_frame), 8, 9 + i] for i in range(videos)]
    return {"input_ids": torch.tensor(rows), "pixel_values_videos": pixels}


@pytest.mark.parametrize("method", GOLDEN)
def test_every_frame_is_selected_by_the_question_of_its_prompt(built, method):
    model, eager = built("llava_next_video")
    call = video_call(model)
    with torch.no_grad(), vtc.compress(model, method=method, keep=4) as run:
        logits = model(**call).logits[:, -1]
    assert run.tokens_after == 4
    for i, (frames, row) in enumerate(zip(call["pixel_values_videos"], call["input_ids"].tolist(), strict=True)):
        features = []
        for frame in frames:
            pooled = pooled_patches(eager, Seen(eager, frame).hidden[1:])
            words = eager.get_input_embeddings()(torch.tensor([t for t in row if t != VIDEO])).detach().double()
            every = projected(eager, pooled)
            features.append(every[GOLDEN[method](torch.cat([pooled[:1], pooled]), every.double(), words, 4)[0]])
        embeds = golden.splice_features(eager, row, [(row.count(VIDEO), torch.cat(features))])
        golden.close(logits[i], golden.logits(eager, embeds)[-1].detach())


@torch.no_grad()
def pooled_patches(eager, patches):
    """Cells of 2 x 2 patches, averaged."""
    side = round(len(patches) ** 0.5)
    cells = [
        [r * side + c for r in (y, y + 1) for c in (x, x + 1)]
        for y in range(0, side - 1, 2)
        for x in range(0, side - 1, 2)
    ]
    return torch.stack([sum(patches[n] for n in cell) / 4 for cell in cells])


def test_every_tile_is_made_smaller(built):
    """Tokens of V views: V times the largest square that is at most keep // V, and no newline."""
    model, eager = built("llava_next")
    names, keep = [(50, 120), (168, 168)], 30
    tokens = [golden.tile_tokens(GRID, *SIZES[size], size) for size in names]
    views = list(models.images(3 + 5).split([3, 5]))
    rows, embeds = [[1, 7, *[IMAGE] * len(own), 8] for own in tokens], []
    for own, row, side in zip(views, rows, (3, 2), strict=True):
        small = [golden_methods.downsampled(view, 14 * side, 14 * side) for view in own]
        features = projected(eager, torch.cat([Seen(eager, view).hidden[1:] for view in small]))
        embeds.append(golden.splice_features(eager, row, [(row.count(IMAGE), features)]))
    call = {
        **models.batch(rows),
        "pixel_values": torch.nn.utils.rnn.pad_sequence(views, batch_first=True),
        "image_sizes": torch.tensor(names),
    }
    with vtc.compress(model, method="downsample", keep=keep) as run:
        out = model.generate(**call, **detailed())
    assert (run.images, run.tokens_after) == (2, round((3 * 3**2 + 5 * 2**2) / 2))
    for i, own in enumerate(embeds):
        new, logits = golden.decode(eager, own, 5)
        assert out.sequences[i, call["input_ids"].shape[1] :].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


def test_every_frame_is_made_smaller(built):
    """So that as many tokens are left after pooling."""
    model, eager = built("llava_next_video")
    call = video_call(model)
    with torch.no_grad(), vtc.compress(model, method="downsample", keep=7):
        logits = model(**call).logits[:, -1]
    for i, (frames, row) in enumerate(zip(call["pixel_values_videos"], call["input_ids"].tolist(), strict=True)):
        small = [golden_methods.downsampled(frame, 14 * 4, 14 * 4) for frame in frames]
        pooled = torch.cat([pooled_patches(eager, Seen(eager, frame).hidden[1:]) for frame in small])
        embeds = golden.splice_features(eager, row, [(row.count(VIDEO), projected(eager, pooled))])
        golden.close(logits[i], golden.logits(eager, embeds)[-1].detach())


@pytest.mark.parametrize("tower", [name for name in models.TOWERS if "registers" not in name])
def test_every_tower_sees_a_smaller_image(built, tower):
    strategy = {"vision_feature_select_strategy": "full"} if "siglip" in tower else {}
    model, _ = built(tower=tower, **strategy)
    sizes = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    with torch.no_grad(), vtc.compress(model, method="downsample", keep=17):
        features = model.get_image_features(models.images(2)).pooler_output
    with torch.no_grad(), vtc.compress(model, method="downsample", keep=TOKENS):
        same = model.get_image_features(models.images(2)).pooler_output
    hook.remove()
    assert [tuple(size) for size in sizes] == [(2, 3, 56, 56), (2, 3, 84, 84)]
    assert [tuple(own.shape) for own in features] == [(16, 64)] * 2
    stock = model.get_image_features(models.images(2)).pooler_output
    assert all(map(torch.equal, same, stock))


def test_a_tower_of_one_size_is_explained(built, monkeypatch):
    model, _ = built()
    tower = type(model.model.vision_tower)
    stock = tower.forward
    monkeypatch.setattr(tower, "forward", lambda self, pixel_values, **kwargs: stock(self, pixel_values, **kwargs))
    says = (
        r"'downsample' makes images smaller, and the vision tower, a CLIPVisionModel, has no interpolate_pos_encoding"
    )
    with pytest.raises(ValueError, match=says):
        vtc.configure(model, method="downsample", keep=KEEP)
    vtc.configure(model, method="downsample", keep=TOKENS)  # nothing is smaller


@pytest.mark.supported("Compiling", "methods that select by the question, in `torch.export` of the whole model")
@pytest.mark.parametrize("method", [*GOLDEN, "downsample"])
@torch.no_grad()
def test_an_exported_model_reads_the_question(built, method):
    model, _ = built()
    vtc.enable(model, **options(method))
    calls = []
    for seed in (0, 5):
        rows = [ids(3, "image", 5, seed=seed), ids(2, "image", 4, seed=seed + 1)]
        calls.append({**models.batch(rows), "pixel_values": models.images(2, seed=seed)})
    torch._dynamo.reset()
    exported = torch.export.export(Logits(model), (), calls[0], strict=False).module()
    for call in calls:
        real = call["attention_mask"].bool()
        torch.testing.assert_close(exported(**call)[real], model(**call).logits[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", GOLDEN)
def test_the_question_is_not_read_back(built, method, monkeypatch):
    """The prompt is read once, for its length, as with any method."""
    model, _ = built()
    reads, stock = [], torch.Tensor.tolist
    rows = [ids(2, "image", 3), ids(1, "image", "image", 6, seed=1)]
    vtc.enable(model, **options(method))
    monkeypatch.setattr(lazy, "coverage", reference.coverage)  # on a GPU a kernel chooses, and reads nothing back
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(tuple(self.shape)) or stock(self))
    with torch.no_grad():
        model(**models.batch(rows), pixel_values=models.images(3))
        assert reads == [(3, 2)]
        reads.clear()
        model(input_ids=torch.tensor(rows[:1]), pixel_values=models.images(1))
    assert reads == [(1, len(rows[0]))]


def test_a_placeholder_needs_no_embedding(built):
    """Its id may be beyond the vocabulary."""
    model, _ = built()
    row = torch.tensor([ids(3, "image", 5), ids(7, seed=1) + [0] * (TOKENS + 1)])
    mask = (row != 0).long()
    row[row == IMAGE] = 10**6
    question = question_of(Settings.of(model), Prompt.read(row, mask, {10**6: [TOKENS]}), {10**6: [TOKENS]}, 10**6)
    assert question.ids.tolist() == [ids(3, 5)[:1] + row[0, 1:4].tolist() + row[0, -5:].tolist()]
    assert question.is_text.all()
    assert torch.equal(question.embeddings, model.get_input_embeddings()(question.ids))


def test_ignored_tokens_are_saved_and_checked_once(built, tmp_path):
    model, _ = built()
    vtc.enable(model, method="mmtok", keep=KEEP, ignore=[5, 3])
    assert of(model) is of(model)
    assert of(model).build_method().ignore == (5, 3)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="vtc")
    assert loaded.config.vtc["ignore"] == [5, 3]
    assert of(loaded) == of(model)
    assert of(loaded) is of(loaded)
    assert vtc.status(loaded).settings == {"keep": KEEP, "ignore": (5, 3)}
    loaded.config.vtc["ignore"] = [True]
    with pytest.raises(
        ValueError, match=re.escape("ignore must be a tuple of token ids, integers of at least 0, got [True]")
    ):
        of(loaded)


def test_the_setting_of_the_paper_on_the_bundled_model():
    model, processor = tiny.load(attn_implementation="vtc")
    scene = tiny.scenes.Scene("test", 1)
    inputs = processor(images=scene.image, text=tiny.prompt("what colour is the circle ?"), return_tensors="pt")
    ignore = ignored_ids(processor.tokenizer, "USER: ASSISTANT:")
    words = [token for token in inputs["input_ids"][0].tolist() if token not in ignore]
    assert processor.tokenizer.convert_ids_to_tokens(words) == ["colour", "circle"]
    kept = [vtc.select(model, inputs, method="mmtok", keep=32, **own).indices for own in ({}, {"ignore": ignore})]
    assert not torch.equal(*kept)


def test_methods_of_this_file():
    assert {name for name, method in METHODS.items() if method.needs.question} == set(GOLDEN)
    assert set(FAMILIES) == {"llava", "vipllava", "llava_next", "llava_next_video"}

"""Every model and vision tower of the registry, as a tiny random instance, against its golden path."""

import copy
import re

import pytest
import torch
from PIL import Image
from support import models
from support.golden import llava as golden
from support.models import GRID, IMAGE, REGISTERS, TOKENS, VIDEO
from test_api import python

import vtc
from vtc import tiles
from vtc.hf.families import FAMILIES
from vtc.hf.towers import TOWERS

LAYERS = (2, 3, 4)  # of 6; the deepest feature layer is hidden_states[-2]
STEPS = 5
SIDE = 14 * GRID

# Every tower in a LLaVA, every other model with CLIP.
CASES = {f"llava-{tower}": ("llava", tower) for tower in TOWERS if TOWERS[tower].cls}
CASES |= {family: (family, "clip_vision_model") for family in FAMILIES if family != "llava"}
# (height, width) -> rows and columns of tiles; one needs unpadding above and below, one left and right, one not at all
SIZES = {(50, 120): (1, 2), (168, 168): (2, 2), (150, 70): (2, 1), (250, 60): (3, 1)}
FRAMES = 3
POOLED = (GRID // 2) ** 2


@pytest.fixture(scope="module")
def built():
    """Stock model and eager copy of each case, built once."""
    made = {}

    def get(family, tower="clip_vision_model", **overrides):
        key = (family, tower, *map(str, overrides.items()))
        if key not in made:
            model = models.build(family=family, tower=tower, **overrides)
            made[key] = model, golden.eager(model)
        model, eager = made[key]
        vtc.disable(model)
        return model, eager

    return get


class Prompts:
    """Prompts with images or videos for one model: the call, and each row's golden embeddings."""

    def __init__(self, family, tower, rows, seed=0):
        self.family, self.rows, self.call = family, rows, {}
        self.registers = REGISTERS if "registers" in tower else 0
        pictures = models.images(60, seed=seed)
        self.visuals, ids = [], []  # of each row: (kind, pictures, size)
        for number, row in enumerate(rows):
            parts, own = [], []
            for part in row:
                if isinstance(part, int):
                    parts += models.ids(part, seed=10 * seed + number)[1:]
                    continue
                if part == "video":
                    own.append(("video", pictures[:FRAMES], None))
                    parts += [VIDEO] * (FRAMES * POOLED)
                elif part == "image":
                    own.append(("image", pictures[:1], None))
                    parts += [IMAGE] * (TOKENS + self.registers)
                else:
                    tiles = 1 + SIZES[part][0] * SIZES[part][1]
                    own.append(("tiles", pictures[:tiles], part))
                    parts += [IMAGE] * len(golden.tile_tokens(GRID, *SIZES[part], part))
                pictures = pictures[len(own[-1][1]) :]
            self.visuals.append(own)
            ids.append([1, *parts])
        self.ids = ids
        self.call = models.batch(ids)
        flat = [visual for own in self.visuals for visual in own]
        if images := [pixels for kind, pixels, _ in flat if kind == "image"]:
            self.call["pixel_values"] = torch.cat(images)
        if tiled := [pixels for kind, pixels, _ in flat if kind == "tiles"]:
            self.call["pixel_values"] = torch.nn.utils.rnn.pad_sequence(tiled, batch_first=True)
            self.call["image_sizes"] = torch.tensor([size for kind, _, size in flat if kind == "tiles"])
        if videos := [pixels for kind, pixels, _ in flat if kind == "video"]:
            self.call["pixel_values_videos"] = torch.stack(videos)

    def to_double(self):
        self.visuals = [[(kind, pictures.double(), size) for kind, pictures, size in own] for own in self.visuals]
        self.call = {name: t.double() if t.is_floating_point() else t for name, t in self.call.items()}

    def tokens(self, visual):
        kind, _, size = visual
        if kind == "tiles":
            return len(golden.tile_tokens(GRID, *SIZES[size], size))
        return FRAMES * POOLED if kind == "video" else TOKENS + self.registers

    def features(self, eager, visual, keep, equal=False):
        """Projected features of the tokens kept; `keep` counts them, or is a function of their number."""
        kind, pictures, size = visual
        project = eager.model.multi_modal_projector
        seen = [golden.view(eager, pixels, LAYERS) for pixels in pictures]
        if kind == "tiles":
            tokens = golden.tile_tokens(GRID, *SIZES[size], size)
            values = [0 if token is None else seen[token[0]][1][token[1]] for token in tokens]
            kept = golden.share_out(values, tokens, keep(len(tokens)) if callable(keep) else keep, equal)
            rows = [tokens[i] for i in kept]
            newline = eager.model.image_newline
            return torch.stack([newline if row is None else project(seen[row[0]][0][row[1]]) for row in rows])
        if kind == "video":  # 2 x 2 patches become one token
            side = GRID // 2
            cells = [
                [(2 * y + dy) * GRID + 2 * x + dx for dy in (0, 1) for dx in (0, 1)]
                for y in range(side)
                for x in range(side)
            ]
            seen = [
                (torch.stack([f[cell].mean(0) for cell in cells]), [sum(s[i] for i in cell) / 4 for cell in cells])
                for f, s in seen
            ]
        return torch.cat([project(features[golden.top(values, keep)]) for features, values in seen])

    @torch.no_grad()
    def kept(self, eager, visual, keep):
        """Which of a visual's placeholders stay, ascending; `features` has their features."""
        kind, pictures, size = visual
        values = [golden.view(eager, pixels, LAYERS)[1] for pixels in pictures]
        if kind == "tiles":
            tokens = golden.tile_tokens(GRID, *SIZES[size], size)
            own = [0 if token is None else values[token[0]][token[1]] for token in tokens]
            return golden.share_out(own, tokens, keep, False)
        if kind == "video":
            side = GRID // 2
            corners = [2 * y * GRID + 2 * x for y in range(side) for x in range(side)]
            values = [[sum(own[at + i] for i in (0, 1, GRID, GRID + 1)) / 4 for at in corners] for own in values]
        return [view * len(own) + patch for view, own in enumerate(values) for patch in golden.top(own, keep)]

    @torch.no_grad()
    def spliced(self, eager, keep, equal=False):
        for row, own in zip(self.ids, self.visuals, strict=True):
            given = [(self.tokens(v), self.features(eager, v, keep, equal)) for v in own]
            yield golden.splice_features(eager, row, given)

    def check(self, out, eager, keep, equal=False):
        length = self.call["input_ids"].shape[1]
        assert torch.equal(out.sequences[:, :length], self.call["input_ids"])
        for i, embeds in enumerate(self.spliced(eager, keep, equal)):
            new, logits = golden.decode(eager, embeds, STEPS)
            assert out.sequences[i, length:].tolist() == new
            golden.close(torch.stack(out.logits)[:, i], logits)


def prompts(family, tower="clip_vision_model", seed=0):
    """A text-only row, and rows with one and two images (or videos) of several sizes."""
    rows = {
        "llava_next": [[3, (50, 120), 4], [5], [2, (168, 168), 3, (150, 70), 2]],
        "llava_next_video": [[3, "video", 2], [2, (250, 60), 3, "video", 4]],
    }
    return Prompts(family, tower, rows.get(family, [[3, "image", 5], [4], [1, "image", "image", 6]]), seed)


def detailed(**kwargs):
    return dict(max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs)


def test_every_entry_is_tested():
    assert {family for family, _ in CASES.values()} == set(FAMILIES) == set(models.FAMILIES)
    assert {tower for _, tower in CASES.values()} | {"siglip_vision_model"} == set(TOWERS)


def test_hooks_come_with_each_model_in_any_order():
    seen = python(
        "import json, sys\n"
        "from transformers import LlavaNextForConditionalGeneration as before\n"
        "import vtc\n"
        "from transformers import LlavaNextVideoForConditionalGeneration as after\n"
        "from transformers import VipLlavaForConditionalGeneration as later\n"
        "guards = [hasattr(m.forward, '_vtc_guard') and hasattr(m.generate, '_vtc_guard')\n"
        "          and not hasattr(m.forward.__wrapped__, '_vtc_guard') for m in (before, after, later)]\n"
        "print(json.dumps(guards))"
    )
    assert seen == [True, True, True]


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("case", CASES)
def test_generate(built, case, how):
    model, eager = built(*CASES[case])
    vtc.enable(model, keep=7)
    batch = prompts(*CASES[case])
    batch.check(model.generate(**batch.call, **detailed(**how)), eager, 7)


@pytest.mark.parametrize("case", CASES)
def test_forward(built, case):
    """Logits, and that nothing is left of the model's own way when everything is kept: bit-identical."""
    model, eager = built(*CASES[case])
    batch = prompts(*CASES[case])
    with torch.no_grad():
        expected = model(**batch.call).logits
        with vtc.compress(model, keep=7):
            logits = model(**batch.call).logits
        with vtc.compress(model, ratio=1.0) as run:
            everything = model(**batch.call).logits
    assert torch.equal(everything, expected)
    assert run.prompt_after == run.prompt_before
    for i, embeds in enumerate(batch.spliced(eager, 7)):
        golden.close(logits[i, -1], golden.logits(eager, embeds)[-1].detach())


def noted(outputs):
    """What the outputs of the class without a head note of images and videos: their features, since 5.24 by image."""
    each = [outputs.get(f"{kind}_outputs", outputs.get(f"{kind}_hidden_states")) for kind in ("image", "video")]
    by_image = [getattr(own, "pooler_output", None) for own in each if own is not None]
    features = [own for own in each if isinstance(own, torch.Tensor)]
    return features or [torch.cat([image.flatten() for image in own]) for own in by_image]


@pytest.mark.parametrize("case", CASES)
def test_features_take_their_places_without_a_count_on_the_device(built, case, monkeypatch):
    """Stock counts placeholders there, and so waits for the vision tower. Outputs are those of stock."""
    model, _ = built(*CASES[case])
    call, base = prompts(*CASES[case]).call, model.model
    with torch.no_grad():
        expected, plain = base(**call), base(**call, return_dict=False)
        monkeypatch.setattr(type(base), "get_placeholder_mask", None)
        with vtc.compress(model, ratio=1.0):
            found, as_tuple = base(**call), base(**call, return_dict=False)
            model.generate(**call, max_new_tokens=1)
    assert list(found) == list(expected)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert [type(each).__mro__[-3:] for each in as_tuple] == [type(each).__mro__[-3:] for each in plain]
    ours, stock = noted(found), noted(expected)
    assert len(ours) == len(stock) == ("pixel_values" in call) + ("pixel_values_videos" in call)
    assert all(torch.equal(*pair) for pair in zip(ours, stock, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case != "llava-clip_vision_model"])
def test_loss_and_gradients(built, case):
    """In float64, so that rounding explains no difference."""
    model, eager = (copy.deepcopy(each).double() for each in built(*CASES[case]))
    batch = prompts(*CASES[case])
    batch.to_double()
    ids, padded = batch.call["input_ids"], batch.call["attention_mask"] == 0
    placeholder = (ids == IMAGE) | (ids == (VIDEO if "video" in case else IMAGE))
    with vtc.compress(model, keep=7):
        loss = model(**batch.call, labels=ids.masked_fill(padded | placeholder, -100)).loss
    loss.backward()
    total, terms = 0, 0
    for row, own in zip(batch.ids, batch.visuals, strict=True):
        visuals = [(batch.tokens(visual), batch.features(eager, visual, 7)) for visual in own]
        embeds = golden.splice_features(eager, row, visuals)
        marks = golden.splice_features(
            Marks(eager.config), row, [(n, -100 * torch.ones(len(f), 1)) for n, f in visuals]
        )
        part, count = golden.loss(eager, embeds, marks[0, :, 0].long().tolist())
        total, terms = total + part, terms + count
    golden.close(loss.detach().double(), (total / terms).detach())  # transformers takes the loss in float32
    (total / terms).backward()
    compared = set()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        if theirs.grad is not None and theirs.grad.abs().max() > 0 and not re.search(r"(k_proj|key)\.bias", name):
            scale = theirs.grad.abs().max()  # softmax does not see the keys' bias
            golden.close(ours.grad / scale, theirs.grad / scale)
            compared.add(name.split(".")[1])
    assert compared >= {"vision_tower", "multi_modal_projector", "language_model"}


class Marks:
    """Stands for a model whose embedding of a token is the token: splicing then gives a prompt's labels."""

    def __init__(self, config):
        self.config = config

    def get_input_embeddings(self):
        return lambda tokens: tokens[:, None].float()


def test_siglip_has_no_cls_token_but_random_works(built):
    model, eager = built("llava", "siglip_vision_model", vision_feature_select_strategy="full")
    says = r"'vtc-cls' needs a vision tower with a \[CLS\] token, and SigLIP has none; .*: 'coverage', 'scope'"
    with pytest.raises(ValueError, match=says):
        vtc.enable(model, keep=7)
    model.set_attn_implementation("vtc")
    with pytest.raises(ValueError, match=says):
        model.get_image_features(models.images(1))
    vtc.enable(model, keep=7, method="random")
    pixels = models.images(2)
    call = {**models.batch([models.ids(3, "image", 4), models.ids(5, "image", 2)]), "pixel_values": pixels}
    out = model.generate(**call, **detailed())
    indices = vtc.select(model, pixels).indices
    for i in range(2):
        features = eager.model.vision_tower(pixels[i][None], output_hidden_states=True).hidden_states[-2][0, indices[i]]
        row = call["input_ids"][i, call["attention_mask"][i].bool()].tolist()
        with torch.no_grad():
            embeds = golden.splice_features(eager, row, [(TOKENS, eager.model.multi_modal_projector(features))])
        new, logits = golden.decode(eager, embeds, STEPS)
        assert out.sequences[i, call["input_ids"].shape[1] :].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)
    with pytest.raises(ValueError, match="'default' is not supported; VTC accepts 'full'"):
        model.get_image_features(pixels, vision_feature_select_strategy="default")


def test_register_tokens_are_visual_tokens(built):
    """They are ranked as the patches are, and an overlay shows the patches alone."""
    model, eager = built("llava", "dinov2_with_registers")
    pixels = models.images(2)
    selection = vtc.select(model, pixels, keep=7)
    with torch.no_grad():
        expected = [golden.scores(eager, image, LAYERS) for image in pixels]
    torch.testing.assert_close(selection.scores, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert selection.scores.shape == (2, REGISTERS + TOKENS)
    assert selection.indices.tolist() == [golden.top(values, 7) for values in expected]
    chosen = selection._replace(indices=torch.tensor([[0, 1, REGISTERS + 8], [1, 2, 10]]))
    image = Image.new("RGB", (SIDE, SIDE), "red")
    drawn = vtc.overlay(image, chosen, side=SIDE)
    patches = chosen._replace(indices=torch.tensor([[8], [0]]), scores=chosen.scores[:, REGISTERS:])
    assert drawn.tobytes() == vtc.overlay(image, patches, side=SIDE).tobytes()
    assert vtc.overlay(image, chosen, index=1, side=SIDE).tobytes() != drawn.tobytes()


def test_select_takes_tiles_one_by_one(built):
    model, eager = built("llava_next")
    pixels = models.images(3)
    selection = vtc.select(model, pixels, keep=7)
    with torch.no_grad():
        expected = [golden.top(golden.scores(eager, image, LAYERS), 7) for image in pixels]
    assert selection.indices.tolist() == expected


@pytest.mark.parametrize("keep", [1, 30, 60])
@pytest.mark.parametrize("how", ["mass", "equal"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_share_the_budget_of_their_image(built, size, how, keep):
    model, eager = built("llava_next")
    batch = Prompts("llava_next", "clip_vision_model", [[2, size, 1]])
    vtc.enable(model, keep=keep, tiles=how)
    with torch.no_grad():
        (features,) = model.get_image_features(
            pixel_values=batch.call["pixel_values"], image_sizes=batch.call["image_sizes"]
        ).pooler_output
        golden.close(features, batch.features(eager, batch.visuals[0][0], keep, how == "equal"))


def test_share_out():
    """By hand. Newlines come last, a tile without enough tokens leaves its share to the others, NaN ranks last."""
    scores = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]])  # masses 0.4 and 1.2: a quarter and the rest
    layout = torch.tensor([0, 1, 2, 3, 4, 5, -1, 6, 7, -1])

    def kept(count, how, scores=scores, layout=layout):
        return sorted(tiles.share_out(scores, layout, how).argsort(descending=True, stable=True)[:count].tolist())

    assert kept(4, "mass") == [0, 4, 5, 7]
    assert kept(4, "equal") == [0, 1, 4, 5]
    assert kept(6, "mass") == [0, 1, 4, 5, 7, 8]  # 1.5 and 4.5
    assert kept(9, "mass") == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert kept(5, "equal", layout=torch.tensor([0, 1, 4, -1])) == [0, 1, 2, 3]
    worst = scores.clone()
    worst[1, 0] = torch.nan
    assert kept(2, "equal", worst) == [0, 5]
    assert kept(10, "mass", worst) == list(range(10))


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_tiles_with_beams_and_a_ratio(built, more):
    """The images keep different numbers of tokens."""
    model, eager = built("llava_next")
    vtc.enable(model, ratio=0.1)
    batch = Prompts("llava_next", "clip_vision_model", [[3, (50, 120), 4], [2, (168, 168), 3]])
    out = model.generate(**batch.call, max_new_tokens=STEPS, do_sample=False, **more)
    returned = more.get("num_return_sequences", 1)
    for i, embeds in enumerate(batch.spliced(eager, lambda tokens: -(-tokens // 10))):
        mask = torch.ones(embeds.shape[:2])
        alone = eager.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=STEPS, **more)
        assert torch.equal(out[i * returned : (i + 1) * returned, batch.call["input_ids"].shape[1] :], alone)


@pytest.mark.parametrize("method", ["vtc-cls", "scope", "hiprune"])
def test_a_run_counts_the_mean_over_images(built, method):
    """Images of 2, 3 and 5 views; what each alone is given is known from a call of its own."""
    model, _ = built("llava_next")
    calls = [[(50, 120)], [(168, 168)], [(250, 60)], [(50, 120), (168, 168), (250, 60)]]
    runs = []
    for sizes in calls:
        call = Prompts("llava_next", "clip_vision_model", [[3, *sizes, 4]]).call
        with vtc.compress(model, ratio=0.25, method=method) as run:
            model.generate(**call, max_new_tokens=1)
        runs.append(run)
    *alone, run = runs
    found = [(each.tokens_before, each.tokens_after) for each in alone]
    assert len(set(found)) == 3
    means = tuple(round(sum(each) / 3) for each in zip(*found, strict=True))
    assert (run.tokens_before, run.tokens_after, run.token_layers) == (*means, means[1])
    assert (run.images, [each.images for each in alone], run.backend) == (3, [1, 1, 1], alone[0].backend)


def test_a_further_turn_with_tiles(built):
    model, eager = built("llava_next")
    vtc.enable(model, keep=7)
    first = Prompts("llava_next", "clip_vision_model", [[8, (50, 120), 9]])
    out = model.generate(**first.call, **detailed())
    assert IMAGE not in out.sequences[0, first.call["input_ids"].shape[1] :]
    new = Prompts("llava_next", "clip_vision_model", [[2, (150, 70), 3]], seed=1)
    whole = torch.cat([out.sequences, new.call["input_ids"]], 1)
    images = {name: new.call[name] for name in ("pixel_values", "image_sizes")}
    second = model.generate(
        whole, attention_mask=torch.ones_like(whole), past_key_values=out.past_key_values, **images, **detailed()
    )
    first.ids, first.visuals, first.call = whole.tolist(), [first.visuals[0] + new.visuals[0]], {"input_ids": whole}
    first.check(second, eager, 7)


def test_what_tiles_need(built):
    model, _ = built("llava_next")
    vtc.enable(model, keep=7)
    call = prompts("llava_next").call
    for run in (model.generate, model):
        with pytest.raises(ValueError, match="image_sizes is needed"):
            run(**{**call, "image_sizes": None})
        with pytest.raises(ValueError, match=r"does not hold the \[3, 5, 3\] tiles"):
            run(**{**call, "pixel_values": call["pixel_values"][:, 0]})
    vtc.configure(model, keep=500)
    with pytest.raises(ValueError, match="keep=500, but an image of this model has only"):
        model(**call)
    with pytest.raises(ValueError, match="tiles must be one of 'mass', 'equal', got 'fair'"):
        vtc.configure(model, tiles="fair")


def test_frames_whose_grid_the_pooling_does_not_divide(built):
    """6 x 6 patches, 4 x 4 of them pooled into one, the rest dropped as the stock model drops it."""
    model, _ = built("llava_next_video", spatial_pool_stride=4)
    videos = models.images(2 * FRAMES).unflatten(0, (2, FRAMES))
    with torch.no_grad():
        expected = model.get_video_features(videos).pooler_output
        with vtc.compress(model, keep=1):
            features = model.get_video_features(videos).pooler_output
    for ours, theirs in zip(features, expected, strict=True):
        golden.close(ours, theirs.reshape(ours.shape))


def test_frames_are_five_dimensional(built):
    model, _ = built("llava_next_video")
    vtc.enable(model, keep=7)
    with pytest.raises(ValueError, match=r"must be \[videos, frames, 3, height, width\], got shape \(3, 3, 84, 84\)"):
        model.get_video_features(models.images(FRAMES))

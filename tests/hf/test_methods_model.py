"""Every method through a whole model: `generate()` and `forward()` against its slow transcription, prompt by prompt.

The golden path runs the stock model with eager attentions on one image, lets `golden_methods` reduce it, and splices
the prompt by hand.
"""

import copy
import math
import re

import pytest
import torch
from PIL import Image
from support import models
from support.golden import llava as golden
from support.golden import methods as golden_methods
from support.models import GRID, IMAGE, TOKENS, ids

import vtc
from vtc import api
from vtc.hf import encode
from vtc.hf.families import FAMILIES
from vtc.hf.settings import Settings
from vtc.hf.views import plan_of
from vtc.methods import METHODS, Method, Needs, Tokens
from vtc_kernels import tuning

DEPTH, KEEP, STEPS = 6, 9, 5
ROWS = [[2, "image", 3], [8], [4, "image", 2, "image", 1], [1, "image", 7]]  # left-padded, one without an image
ADAPTIVE = ("prumerge", "prumerge+", "prumerge+ adaptive")
SEED = 28  # of images whose counts differ


class Seen:
    """What the stock model's tower leaves of one image `[3, height, width]`, float64 and unsplit.

    `row` are the ids of the prompt that it is in.
    """

    def __init__(self, model, image, feature_layer=DEPTH - 1, row=()):
        tower, self.queries, self.keys = model.model.vision_tower, [], []
        hooks = []
        for name, part in tower.named_modules():
            for ends, outputs in ((("q_proj", "query"), self.queries), (("k_proj", "key"), self.keys)):
                if name.endswith(ends):
                    hooks.append(part.register_forward_hook(lambda *a, outputs=outputs: outputs.append(a[-1][0])))
        with torch.no_grad():
            size = {"interpolate_pos_encoding": True} if image.shape[-1] != 14 * GRID else {}
            out = tower(image[None], output_hidden_states=True, output_attentions=True, **size)
        for hook in hooks:
            hook.remove()
        layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
        self.hidden = torch.cat([out.hidden_states[layer][0] for layer in layers], -1).double()
        self.attentions = [layer[0].double() for layer in out.attentions]
        self.queries, self.keys = ([x.double() for x in each] for each in (self.queries, self.keys))
        self.image, self.layers, self.end, self.model = image, layers, max(layers), model
        text = [token for token in row if token != IMAGE]
        self.words = model.get_input_embeddings()(torch.tensor(text, dtype=torch.long)).detach().double()
        self.cls = len(self.attentions[0][0]) != GRID * GRID
        if not self.cls and len(self.hidden) == GRID * GRID:  # transcriptions expect its row
            self.hidden = torch.cat([torch.zeros_like(self.hidden[:1]), self.hidden])
        assert len(self.queries) == len(self.keys) == DEPTH

    def before_the_last(self, count):
        """The attentions of `count` layers that end at the feature layer, but never at the tower's last."""
        end = min(self.end, DEPTH - 1)
        return self.attentions[end - count : end]

    def saliency(self, count=1, received=False):
        """Of each patch, over `count` layers that end at the feature layer: attention of [CLS], or received."""
        layers = self.attentions[self.end - count : self.end]
        each = [golden_methods.received(x, self.cls) if received else golden_methods.cls_attention(x) for x in layers]
        return [sum(values) for values in zip(*each, strict=True)]

    def received(self, layer):
        return golden_methods.received(self.attentions[layer], self.cls)

    @property
    def last(self):
        return self.hidden, self.queries[-1], self.keys[-1]

    @property
    def projected(self):
        """The patches after the projector."""
        return projected(self.model, self.hidden[1:]).double()


def random(seen, seed=0):
    scores = golden_methods.random_scores(seen.image, len(seen.hidden) - 1, seed)
    kept = sorted(golden_methods.by_score(scores, KEEP))
    return kept, seen.hidden[1:][kept]


def visionzip(seen, dominant, contextual):
    f = seen.end - 1
    return golden_methods.visionzip(seen.hidden, seen.attentions[f], seen.keys[f], 4, dominant, contextual)


def downsampled(seen):
    small = golden_methods.downsampled(seen.image, 14 * 3, 14 * 3)
    return Seen(seen.model, small, seen.layers).hidden[-KEEP:]  # without [CLS]


def hiprune(seen, keep, alpha=0.1):
    """The default object layer is the second of 6."""
    middle, deep = seen.received(min(1, seen.end - 1)), seen.received(seen.end - 1)
    return golden_methods.hiprune(seen.hidden, middle, deep, GRID, keep, alpha)


# By name: the settings, and of an image which patches are kept (None: not to be said) and the features.
CASES = {
    "vtc-cls": ({}, lambda s: golden_methods.vtc_cls(s.hidden, s.before_the_last(3), KEEP)),
    "vtc-cls max": (
        {"ensemble": "max", "ensemble_layers": 2},
        lambda s: golden_methods.vtc_cls(s.hidden, s.before_the_last(2), KEEP, max),
    ),
    "fastervlm": ({}, lambda s: golden_methods.fastervlm(s.hidden, s.attentions[s.end - 1], KEEP)),
    "visionzip": ({}, lambda s: visionzip(s, KEEP - 1, 1)),
    "visionzip contextual": ({"contextual": 3}, lambda s: visionzip(s, KEEP - 3, 3)),
    "prumerge": ({}, lambda s: golden_methods.prumerge(*s.last)),
    "prumerge neighbors": ({"neighbors": 4}, lambda s: golden_methods.prumerge(*s.last, neighbors=4)),
    "prumerge fixed": ({"adaptive_count": False}, lambda s: golden_methods.prumerge(*s.last, KEEP - 1)),
    "prumerge+": ({}, lambda s: golden_methods.prumerge_plus(*s.last, 2, 15)),
    "prumerge+ adaptive": ({"adaptive_count": True}, lambda s: golden_methods.prumerge_plus(*s.last)),
    "coverage": ({}, lambda s: golden_methods.coverage(s.hidden, KEEP)),
    "coverage temperature": ({"temperature": 0.6}, lambda s: golden_methods.coverage(s.hidden, KEEP, 0.6)),
    "scope": ({}, lambda s: golden_methods.scope(s.hidden, s.saliency(received=not s.cls), KEEP)),
    "scope ensemble": ({"ensemble_layers": 3}, lambda s: golden_methods.scope(s.hidden, s.saliency(3), KEEP)),
    "scope received": (
        {"saliency": "received", "ensemble_layers": 2},
        lambda s: golden_methods.scope(s.hidden, s.saliency(2, received=True), KEEP),
    ),
    "divprune": ({}, lambda s: golden_methods.divprune(s.hidden, s.projected, KEEP)),
    "vispruner": ({}, lambda s: golden_methods.vispruner(s.hidden, s.saliency(), KEEP)),
    "vispruner important": ({"important": 0.2}, lambda s: golden_methods.vispruner(s.hidden, s.saliency(), KEEP, 0.2)),
    "hiprune": ({"alpha": 0.5}, lambda s: hiprune(s, KEEP, 0.5)),
    "hiprune layer": (
        {"alpha": 0.6, "object_layer": 4},
        lambda s: golden_methods.hiprune(s.hidden, s.received(3), s.received(s.end - 1), GRID, KEEP, 0.6),
    ),
    "received": ({}, lambda s: golden_methods.ranked(s.hidden, s.received(s.end - 1), KEEP)),
    "mmtok": ({}, lambda s: golden_methods.mmtok(s.hidden, s.projected, s.words, KEEP)),
    "mmtok alpha": (
        {"alpha": 0, "text_temperature": 0.1},
        lambda s: golden_methods.mmtok(s.hidden, s.projected, s.words, KEEP, 0, 0.2, 0.1),
    ),
    "cdpruner": ({}, lambda s: golden_methods.cdpruner(s.hidden, s.projected, s.words, KEEP)),
    "random": ({"seed": 3}, lambda s: random(s, 3)),
    "pool": ({}, lambda s: (None, golden_methods.pool(s.hidden, (GRID, GRID), KEEP))),
    "downsample": ({}, lambda s: (None, downsampled(s))),
}
BY_QUESTION = [case for case in CASES if METHODS[case.split()[0]].needs.question]
PIXELS_ONLY = [case for case in CASES if case not in BY_QUESTION]


def options(case):
    return {"method": case.split()[0], "keep": KEEP, **CASES[case][0]}


@pytest.fixture(scope="module")
def built():
    """(family, tower) -> a model with SDPA, and its golden twin."""
    made = {}

    def get(family="llava", tower="clip_vision_model", **overrides):
        key = (family, tower, *overrides.items())
        if key not in made:
            model = models.build(DEPTH, family=family, tower=tower, **overrides)
            made[key] = model, golden.eager(model)
        return made[key]

    return get


@pytest.fixture
def model(built):
    yield (model := built()[0])
    vtc.disable(model)


@pytest.fixture(scope="module")
def eager(built):
    return built()[1]


@pytest.fixture(scope="module")
def call():
    return {**models.batch([ids(*row, seed=i) for i, row in enumerate(ROWS)]), "pixel_values": models.images(4, SEED)}


@pytest.fixture(scope="module")
def seen(eager, call):
    rows = [ids(*row, seed=i) for i, row in enumerate(ROWS) for part in row if part == "image"]
    return [Seen(eager, image, row=row) for image, row in zip(call["pixel_values"], rows, strict=True)]


@torch.no_grad()
def projected(model, features):
    return model.model.multi_modal_projector(features.float())


def spliced(eager, seen, transcription, rows=None):
    """Golden embeddings `[1, L', D]` of each row."""
    rows = [ids(*row, seed=i) for i, row in enumerate(ROWS)] if rows is None else rows
    visuals = iter([(TOKENS, projected(eager, transcription(s)[1])) for s in seen])
    with torch.no_grad():
        return [
            golden.splice_features(eager, row, [next(visuals) for _ in range(row.count(IMAGE) // TOKENS)])
            for row in rows
        ]


def detailed(**kwargs):
    return dict(max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs)


def check_generated(out, call, eager, embeds):
    length = call["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], call["input_ids"])
    for i, own in enumerate(embeds):
        new, logits = golden.decode(eager, own, STEPS)
        assert out.sequences[i, length:].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


def test_every_method_is_here():
    assert {case.split()[0] for case in CASES} | {"none", "fastv", "dart"} == set(
        METHODS
    )  # for fastv and dart, see test_prune
    assert {case.split()[0] for case in ADAPTIVE} == {name for name in METHODS if METHODS[name].adaptive}


def test_the_images_are_worth_testing_with(seen):
    """Methods differ, and so do the counts of an adaptive one within the batch: or the tests could not fail."""
    for case in ADAPTIVE:
        assert len({len(CASES[case][1](s)[1]) for s in seen}) > 1, case
    kept = {
        case: tuple(tuple(CASES[case][1](s)[0]) for s in seen) for case in CASES if case not in ("pool", "downsample")
    }
    same = [("prumerge", "prumerge neighbors")]  # these differ in what is merged
    assert len(set(kept.values())) >= len(kept) - len(same)


@pytest.mark.parametrize("case", CASES)
def test_generate(model, eager, call, seen, case):
    vtc.enable(model, **options(case))
    check_generated(model.generate(**call, **detailed()), call, eager, spliced(eager, seen, CASES[case][1]))


@pytest.mark.parametrize("case", CASES)
def test_forward(model, eager, call, seen, case):
    embeds = spliced(eager, seen, CASES[case][1])
    with torch.no_grad(), vtc.compress(model, **options(case)) as run:
        logits = model(**call).logits
    assert logits.shape[1] == run.prompt_before
    assert run.prompt_after == max(own.shape[1] for own in embeds)
    for i, own in enumerate(embeds):
        golden.close(logits[i, -1], golden.logits(eager, own)[-1].detach())
    counts = [len(CASES[case][1](s)[1]) for s in seen]
    assert (run.images, run.tokens_before, run.tokens_after) == (4, TOKENS, round(sum(counts) / 4))
    assert f"{TOKENS} -> {run.tokens_after} visual tokens" in run.report()


@pytest.mark.parametrize("case", CASES)
def test_a_sample_alone_is_as_in_a_batch(model, call, case):
    vtc.enable(model, **options(case))
    together = model.generate(**call, **detailed())
    length, at = call["input_ids"].shape[1], 0
    for i, row in enumerate(ROWS):
        one = models.batch([ids(*row, seed=i)])
        if count := row.count("image"):
            one["pixel_values"] = call["pixel_values"][at : at + count]
            at += count
        out = model.generate(**one, **detailed())
        assert out.sequences[0, one["input_ids"].shape[1] :].tolist() == together.sequences[i, length:].tolist()
        golden.close(torch.stack(out.logits)[:, 0], torch.stack(together.logits)[:, i])


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "none"])
@pytest.mark.parametrize("case", ADAPTIVE)
def test_other_caches(model, eager, call, seen, case, how):
    vtc.enable(model, **options(case))
    check_generated(model.generate(**call, **detailed(**how)), call, eager, spliced(eager, seen, CASES[case][1]))


@pytest.mark.parametrize("case", ["prumerge", "prumerge+ adaptive", "visionzip", "downsample"])
def test_beams(model, eager, call, seen, case):
    """One image a prompt, which every transformers can copy; images of different counts."""
    vtc.enable(model, **options(case))
    rows = [ids(3, "image", 2, seed=i) for i in range(4)]
    own = {**models.batch(rows), "pixel_values": call["pixel_values"]}
    out = model.generate(**own, max_new_tokens=STEPS, do_sample=False, num_beams=3, num_return_sequences=2)
    for i, embeds in enumerate(spliced(eager, seen, CASES[case][1], rows)):
        alone = eager.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2]),
            max_new_tokens=STEPS,
            num_beams=3,
            num_return_sequences=2,
        )
        assert torch.equal(out[2 * i : 2 * i + 2, len(rows[0]) :], alone)


@pytest.mark.parametrize("case", [*ADAPTIVE, "mmtok", "cdpruner", "downsample"])
def test_a_second_turn(model, eager, call, seen, case):
    vtc.enable(model, **options(case))
    first = model.generate(**call, **detailed())
    question = torch.tensor([[5, 6, 7]] * len(ROWS))
    whole = torch.cat([first.sequences, question], 1)
    mask = torch.cat([call["attention_mask"], torch.ones(len(ROWS), STEPS + 3, dtype=torch.long)], 1)
    second = model.generate(input_ids=whole, attention_mask=mask, past_key_values=first.past_key_values, **detailed())
    length = call["input_ids"].shape[1]
    rows = [ids(*row, seed=i) + whole[i, length:].tolist() for i, row in enumerate(ROWS)]
    check_generated(second, {"input_ids": whole}, eager, spliced(eager, seen, CASES[case][1], rows))


@pytest.mark.supported("Caches", "a new image in a compressed conversation: it is compressed as the conversation began")
def test_a_further_image_takes_the_method_of_the_conversation(model, call):
    vtc.enable(model, keep=KEEP, method="prumerge")
    one = {**models.batch([ids(2, "image", 3)]), "pixel_values": call["pixel_values"][:1]}
    first = model.generate(**one, **detailed())
    whole = models.batch([first.sequences[0].tolist() + ids("image", 2)])
    more = {**whole, "pixel_values": call["pixel_values"][1:2], "past_key_values": first.past_key_values}
    expected = model.generate(**copy.deepcopy(more), max_new_tokens=2)
    for other in ("visionzip", "none"):
        vtc.configure(model, method=other)
        assert torch.equal(model.generate(**copy.deepcopy(more), max_new_tokens=2), expected)


@pytest.mark.parametrize("case", ["prumerge", "prumerge+", "visionzip", "pool", "downsample", "mmtok", "cdpruner"])
def test_loss_and_gradients(model, eager, call, seen, case):
    """To the projector, of prompts whose lengths differ by what their images keep."""
    labels = call["input_ids"].masked_fill((call["attention_mask"] == 0) | (call["input_ids"] == IMAGE), -100)
    with vtc.compress(model, **options(case)):
        loss = model(**call, labels=labels).loss
    loss.backward()
    total, terms, images = 0, 0, iter(seen)
    for i, parts in enumerate(ROWS):
        row, short, own = ids(*parts, seed=i), [], []
        for _ in range(parts.count("image")):
            own.append((TOKENS, eager.model.multi_modal_projector(CASES[case][1](next(images))[1].float())))
        marks = iter(own)
        at = 0
        while at < len(row):
            short += [-100] * len(next(marks)[1]) if row[at] == IMAGE else [row[at]]
            at += TOKENS if row[at] == IMAGE else 1
        part, count = golden.loss(eager, golden.splice_features(eager, row, own), short)
        total, terms = total + part, terms + count
    (total / terms).backward()
    golden.close(loss.detach(), (total / terms).detach())
    for ours, theirs in zip(
        model.model.multi_modal_projector.parameters(), eager.model.multi_modal_projector.parameters(), strict=True
    ):
        scale = theirs.grad.abs().max()
        assert scale > 0
        golden.close(ours.grad / scale, theirs.grad / scale)
    model.zero_grad()
    eager.zero_grad()


def test_none_is_the_stock_model(model, call):
    """Bit by bit, also where compression would have to refuse, and with a `keep` of more than there is."""
    stock = model.generate(**call, **detailed())
    with torch.no_grad():
        logits = model(**call).logits
        features = torch.cat(list(model.get_image_features(call["pixel_values"]).pooler_output))
        full = model(**call, logits_to_keep=torch.tensor([3, 5])).logits
    with vtc.compress(model, method="none") as run:
        ours = model.generate(**call, **detailed())
        assert torch.equal(ours.sequences, stock.sequences)
        assert all(map(torch.equal, ours.logits, stock.logits))
        assert (run.images, run.tokens_before, run.tokens_after) == (4, TOKENS, TOKENS)
        assert run.prompt_before == run.prompt_after == call["input_ids"].shape[1]
        assert run.kv_bytes_before == run.kv_bytes_after > 0
        assert run.report().startswith(f"{TOKENS} -> {TOKENS} visual tokens per image, 4 image(s)")
        with torch.no_grad():
            assert torch.equal(model(**call).logits, logits)
            assert torch.equal(torch.cat(list(model.get_image_features(call["pixel_values"]).pooler_output)), features)
            assert torch.equal(model(**call, logits_to_keep=torch.tensor([3, 5])).logits, full)


@pytest.mark.supported("Caches", 'a compressed conversation after the settings changed to `method="none"`')
def test_none_continues_a_compressed_cache(model, call):
    """Its columns are what they are, whatever the settings have become."""
    vtc.enable(model, keep=KEEP)
    first, again = (model.generate(**call, **detailed()) for _ in range(2))
    whole = torch.cat([first.sequences, torch.tensor([[5, 6, 7]] * len(ROWS))], 1)
    mask = torch.cat([call["attention_mask"], torch.ones(len(ROWS), STEPS + 3, dtype=torch.long)], 1)
    expected = model.generate(whole, attention_mask=mask, past_key_values=first.past_key_values, **detailed())
    vtc.configure(model, method="none")
    ours = model.generate(whole, attention_mask=mask, past_key_values=again.past_key_values, **detailed())
    assert torch.equal(ours.sequences, expected.sequences)


def check_features(model, eager, case, transcription, **seen):
    pixels = models.images(3, SEED)
    with torch.no_grad(), vtc.compress(model, **options(case)):
        features = model.get_image_features(pixels).pooler_output
    for image, own in zip(pixels, features, strict=True):
        golden.close(own, projected(eager, transcription(Seen(eager, image, **seen))[1]))


ON_TOWERS = ["vtc-cls", "fastervlm", "visionzip contextual", "prumerge", "prumerge+"]
ON_TOWERS += ["coverage", "scope", "scope received", "divprune", "vispruner", "received"]


@pytest.mark.parametrize("case", ON_TOWERS)
@pytest.mark.parametrize("tower", [name for name in models.TOWERS if name != "siglip_vision_model"])
def test_towers(built, tower, case):
    """Register tokens are ranked and merged like patches; the best and the step of PruMerge+ are those for all 38."""
    transcription = CASES[case][1]
    if case == "prumerge+" and "registers" in tower:
        transcription = lambda s: golden_methods.prumerge_plus(*s.last, 2, 18)  # noqa: E731
    check_features(*built(tower=tower), case, transcription)


WITHOUT_CLS = [case for case in PIXELS_ONLY if not METHODS[case.split()[0]].needs_cls() and case != "scope ensemble"]


@pytest.mark.parametrize("case", WITHOUT_CLS)
def test_a_tower_without_cls(built, case):
    check_features(*built(tower="siglip_vision_model", vision_feature_select_strategy="full"), case, CASES[case][1])


def test_the_saliency_of_scope_on_a_tower_without_cls(built):
    model, _ = built(tower="siglip_vision_model", vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match=r'"cls" needs a vision tower with a \[CLS\] token.*use saliency="received"'):
        vtc.configure(model, method="scope", saliency="cls")


WITH_LAYERS = ["visionzip", "visionzip contextual", "prumerge", "fastervlm", "vtc-cls max"]
WITH_LAYERS += ["scope", "scope received", "hiprune", "vispruner", "received"]


@pytest.mark.parametrize("case", WITH_LAYERS)
@pytest.mark.parametrize("layer", [-1, -3, 2])
def test_feature_layers(built, case, layer):
    """The last layer's keys, or scores and keys of the feature layer, whichever it is. VTC-CLS leaves out the last."""
    model, eager = built(vision_feature_layer=layer)
    check_features(model, eager, case, CASES[case][1], feature_layer=layer % (DEPTH + 1))


ON_SEVERAL = ["fastervlm", "visionzip", "coverage", "scope", "divprune", "vispruner", "hiprune", "random", "pool"]
ON_SEVERAL += ["downsample"]


@pytest.mark.parametrize("case", ON_SEVERAL)
def test_features_of_several_layers(built, case):
    check_features(*built("vipllava"), case, CASES[case][1], feature_layer=[DEPTH - 1, DEPTH - 3, 2])


@pytest.mark.parametrize("family", ["llava_next", "llava_next_video"])
def test_tiles_and_frames_take_one_layer_of_fastervlm(built, family):
    """FasterVLM is VTC-CLS with one layer, here too; Random differs."""
    model, _ = built(family)
    visual = FAMILIES[family].inputs[-1]
    call = {visual.pixels: models.images(2)[None]}
    if visual.layout == "tiles":
        call = {visual.pixels: models.images(3)[None], "image_sizes": torch.tensor([[84, 160]])}
    features = {}
    for method, layers in (("fastervlm", 3), ("vtc-cls", 1), ("random", 3)):
        with (
            torch.no_grad(),
            vtc.compress(model, keep=7, method=method, **({"ensemble_layers": layers} if method == "vtc-cls" else {})),
        ):
            features[method] = getattr(model.model, visual.get)(**call).pooler_output[0]
    assert torch.equal(features["fastervlm"], features["vtc-cls"])
    assert not torch.equal(features["fastervlm"], features["random"])


@pytest.mark.parametrize("family", ["llava_next", "llava_next_video"])
def test_none_is_the_stock_model_with_tiles_and_frames(built, family):
    model, _ = built(family)
    visual = FAMILIES[family].inputs[-1]
    pixels, sizes = models.images(2)[None], {}
    if visual.layout == "tiles":
        pixels, sizes = models.images(3)[None], {"image_sizes": torch.tensor([[84, 160]])}
    encode = getattr(model.model, visual.get)
    with torch.no_grad():
        stock = encode(pixels, **sizes).pooler_output[0]
        with vtc.compress(model, method="none", keep=5000) as run:
            assert torch.equal(encode(pixels, **sizes).pooler_output[0], stock)
    assert run.images == 1


@pytest.mark.refused("a method that needs [CLS] on a tower without it", instead='`"coverage"` or `"scope"`')
@pytest.mark.parametrize("method", ["vtc-cls", "fastervlm", "visionzip", "prumerge", "prumerge+", "vispruner"])
def test_a_tower_without_cls_is_explained(built, method):
    model, _ = built(tower="siglip_vision_model", vision_feature_select_strategy="full")
    says = (
        rf"method '{re.escape(method)}' needs a vision tower with a \[CLS\] token, and SigLIP has none; methods that "
        r"work with it: 'coverage', 'scope', 'mmtok', 'divprune', 'cdpruner', 'hiprune', 'received', 'fastv', 'dart', "
        r"'random', 'pool', 'downsample', 'none', e.g. vtc.configure\(model, method='coverage'\)"
    )
    with pytest.raises(ValueError, match=says):
        vtc.configure(model, keep=KEEP, method=method)


TILED = {(50, 120): (1, 2), (168, 168): (2, 2)}  # (height, width) -> rows and columns of tiles


@pytest.mark.parametrize(
    ("given", "splits"),  # of each image's views: the dominant and contextual tokens
    [
        ({"keep": 30}, [(9, 1), (6, 0)]),
        ({"keep": 31, "contextual": 2}, [(8, 2), (4, 2)]),
        ({"ratio": 0.5}, [(17, 2), (17, 2)]),
        ({"ratio": 1.0}, [(31, 5), (31, 5)]),
    ],
)
def test_visionzip_reduces_every_tile_alone(built, given, splits):
    """As many tokens of the base image as of each tile, one after the other, and no newline."""
    model, eager = built("llava_next")
    sizes = [golden.tile_tokens(GRID, *TILED[size], size) for size in TILED]
    views, rows = models.images(3 + 5), [[1, 7, *[IMAGE] * len(own), 8, 9] for own in sizes]
    seen = [Seen(eager, view) for view in views]
    visuals = []
    for own, placeholders, (dominant, contextual) in zip((seen[:3], seen[3:]), map(len, sizes), splits, strict=True):
        tokens = torch.cat([visionzip(view, dominant, contextual)[1] for view in own])
        assert len(tokens) <= placeholders
        visuals.append((placeholders, projected(eager, tokens)))
    call = {
        **models.batch([*rows, [*rows[0], *rows[1]]]),
        "pixel_values": torch.nn.utils.rnn.pad_sequence([views[:3], views[3:]] * 2, batch_first=True),
        "image_sizes": torch.tensor(list(TILED) * 2),
    }
    with torch.no_grad():
        embeds = [golden.splice_features(eager, row, [own]) for row, own in zip(rows, visuals, strict=True)]
        embeds.append(golden.splice_features(eager, [*rows[0], *rows[1]], visuals))
    with vtc.compress(model, method="visionzip", **given) as run:
        check_generated(model.generate(**call, **detailed()), call, eager, embeds)
    assert (run.images, run.tokens_after) == (4, round(sum(len(own) for _, own in visuals) / 2))


class Part:
    """Some patches of an image's views as one image, or groups of a view's patches as its patches: what `Seen` has."""

    def __init__(self, model, cells, views):
        """`cells`: of each patch the (view, patch) whose mean it is."""
        rows = [sum(views[v].hidden[1 + patch] for v, patch in cell) / len(cell) for cell in cells]
        self.hidden = torch.stack([torch.zeros_like(rows[0]), *rows])
        self.projected = projected(model, torch.stack(rows)).double()
        self.cells, self.views, self.cls, self.end = cells, views, True, views[0].end

    def mean(self, of_views):
        return [sum(of_views[v][patch] for v, patch in cell) / len(cell) for cell in self.cells]

    def saliency(self, count=1, received=False):
        return self.mean([view.saliency(count, received) for view in self.views])

    def received(self, layer):
        return self.mean([view.received(layer) for view in self.views])


JOINT = ["coverage", "scope", "scope received", "divprune", "vispruner"]


@pytest.mark.parametrize("case", JOINT)
@pytest.mark.parametrize("sizes", [list(TILED), [(168, 168), (50, 120), (50, 120)]], ids=["two", "three"])
def test_methods_that_choose_among_all_tiles(built, case, sizes):
    """An image's patches without the padding are those of one image; newlines are dropped."""
    model, eager = built("llava_next")
    views, call, first = models.images(15, 3), {"image_sizes": torch.tensor(sizes)}, 0
    expected, pixels = [], []
    for size in sizes:
        tokens = golden.tile_tokens(GRID, *TILED[size], size)
        own = views[first : (first := first + 1 + TILED[size][0] * TILED[size][1])]
        pixels.append(own)
        seen = Part(eager, [[token] for token in tokens if token], [Seen(eager, view) for view in own])
        expected.append(projected(eager, CASES[case][1](seen)[1]))
    call["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)
    with torch.no_grad(), vtc.compress(model, **options(case)) as run:
        features = model.get_image_features(**call).pooler_output
        assert list(run.backend) == list(vtc.status(model).backends)
    for own, wanted in zip(features, expected, strict=True):
        golden.close(own, wanted)


@pytest.mark.parametrize("method", ["coverage", "divprune"])
def test_newlines_are_the_last_of_all_tiles(built, method):
    """Of 36 + 144 patches and 12 newlines 185 stay; all of them are what the stock model has."""
    model, _ = built("llava_next")
    call = {"pixel_values": models.images(5)[None], "image_sizes": torch.tensor([[168, 168]])}
    tokens = golden.tile_tokens(GRID, 2, 2, (168, 168))
    newlines = [place for place, token in enumerate(tokens) if token is None]
    stay = [place for place in range(len(tokens)) if place not in newlines[5:]]
    with torch.no_grad():
        stock = model.get_image_features(**call).pooler_output[0]
        with vtc.compress(model, method=method, keep=185):
            golden.close(model.get_image_features(**call).pooler_output[0], stock[stay])
        with vtc.compress(model, method=method, ratio=1.0):
            assert torch.equal(model.get_image_features(**call).pooler_output[0], stock)


def test_too_many_patches_of_all_tiles_are_explained(built, monkeypatch):
    monkeypatch.setattr(tuning, "GREEDY_COLUMNS", 100)
    model, _ = built("llava_next")
    call = {"pixel_values": models.images(5)[None], "image_sizes": torch.tensor([[168, 168]])}
    says = r"'coverage' chooses among all 180 patches of .* takes at most N = 100 columns .* ranks .*'vtc-cls'"
    with vtc.compress(model, method="coverage", keep=KEEP, backend="triton"), pytest.raises(ValueError, match=says):
        model.get_image_features(**call)


def test_hiprune_reduces_every_tile_alone(built):
    model, eager = built("llava_next")
    call = {"pixel_values": models.images(3)[None], "image_sizes": torch.tensor([[50, 120]])}
    expected = [hiprune(Seen(eager, view), 10, 0.5)[1] for view in models.images(3)]
    with torch.no_grad(), vtc.compress(model, method="hiprune", keep=31, alpha=0.5):
        (features,) = model.get_image_features(**call).pooler_output
    golden.close(features, projected(eager, torch.cat(expected)))


FRAMED = [*JOINT, "received", "hiprune"]


@pytest.mark.parametrize("case", FRAMED)
def test_frames_are_reduced_one_by_one(built, case):
    """2 x 2 patches become one; what they receive is averaged."""
    model, eager = built("llava_next_video")
    videos, side = models.images(6, 2).unflatten(0, (2, 3)), GRID // 2
    corners = [2 * y * GRID + 2 * x for y in range(side) for x in range(side)]
    cells = [[(0, corner + step) for step in (0, 1, GRID, GRID + 1)] for corner in corners]
    with torch.no_grad(), vtc.compress(model, **{**options(case), "keep": 5}):
        features = model.model.get_video_features(videos).pooler_output
    for own, frames in zip(features, videos, strict=True):
        wanted = []
        for frame in frames:
            part = Part(eager, cells, [Seen(eager, frame)])
            if case == "hiprune":
                middle, deep = part.received(1), part.received(DEPTH - 2)
                wanted.append(golden_methods.hiprune(part.hidden, middle, deep, side, 5, 0.5)[1])
            else:
                wanted.append(of_part(case, part, 5)[1])
        golden.close(own, projected(eager, torch.cat(wanted)))


def of_part(case, part, keep):
    """`CASES` keep `KEEP`."""
    hidden = part.hidden
    return {
        "coverage": lambda: golden_methods.coverage(hidden, keep),
        "scope": lambda: golden_methods.scope(hidden, part.saliency(), keep),
        "scope received": lambda: golden_methods.scope(hidden, part.saliency(2, True), keep),
        "divprune": lambda: golden_methods.divprune(hidden, part.projected, keep),
        "vispruner": lambda: golden_methods.vispruner(hidden, part.saliency(), keep),
        "received": lambda: golden_methods.ranked(hidden, part.received(part.end - 1), keep),
    }[case]()


TOO_FEW = [  # of 5 views: what is asked for, what each gets, and the smallest keep
    ("visionzip", {"keep": 9}, 1, 10),
    ("visionzip", {"keep": 24, "contextual": 3}, 4, 25),
    ("visionzip", {"keep": 1}, 0, 10),
    ("hiprune", {"keep": 4}, 0, 5),
    ("hiprune", {"ratio": 0.01}, 0, 5),
    ("downsample", {"keep": 1}, 0, 5),
]


@pytest.mark.parametrize(("method", "given", "got", "least"), TOO_FEW)
def test_a_view_with_too_few_tokens_is_explained(built, method, given, got, least):
    model, _ = built("llava_next")
    call = {"pixel_values": models.images(5)[None], "image_sizes": torch.tensor([[168, 168]])}
    says = rf"each of the 5 views of an image gets keep // 5 = {got} tokens, .* use keep={least} or more"
    with vtc.compress(model, method=method, **given), pytest.raises(ValueError, match=says):
        model.get_image_features(**call)
    with torch.no_grad(), vtc.compress(model, method=method, **{**given, "ratio": None, "keep": least}):
        assert len(model.get_image_features(**call).pooler_output[0]) == least


def test_every_method_that_reduces_views_alone_explains_too_few_tokens():
    assert {name for name, method in METHODS.items() if method.per_view} == {name for name, *_ in TOO_FEW}


@pytest.mark.parametrize("method", ["vtc-cls", "scope", "hiprune", "downsample"])
def test_all_tokens_of_tiles_are_the_stock_model(built, method):
    """Newlines, too; an image of which all stays is the same beside one of which not all does."""
    model, _ = built("llava_next")
    sizes = [golden.tile_tokens(GRID, *TILED[size], size) for size in TILED]
    views = models.images(3 + 5)
    images = {
        "pixel_values": torch.nn.utils.rnn.pad_sequence([views[:3], views[3:]], batch_first=True),
        "image_sizes": torch.tensor(list(TILED)),
    }
    call = models.batch([[1, 7, *[IMAGE] * len(own), 8, 9] for own in sizes]) | images
    seen = []  # with other shapes, a GPU may add in another order
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected = model.generate(**call, **detailed())
    with vtc.compress(model, method=method, ratio=1.0) as run:
        out = model.generate(**call, **detailed())
    hook.remove()
    assert torch.equal(*seen)
    assert torch.equal(out.sequences, expected.sequences)
    assert all(map(torch.equal, out.logits, expected.logits))
    assert run.tokens_before == run.tokens_after
    keep = len(sizes[0])
    first, second = (
        {"pixel_values": own[None], "image_sizes": images["image_sizes"][i : i + 1]}
        for i, own in enumerate((views[:3], views[3:]))
    )
    with torch.no_grad():
        stock = model.get_image_features(**first).pooler_output
        with vtc.compress(model, method=method, keep=keep):
            found = model.get_image_features(**images).pooler_output
            assert torch.equal(model.get_image_features(**first).pooler_output[0], stock[0])
            alone = model.get_image_features(**second).pooler_output
    golden.close(found[0], stock[0])
    golden.close(found[1], alone[0])
    each = keep // 5
    assert len(found[1]) == {"hiprune": 5 * each, "downsample": 5 * math.isqrt(each) ** 2}.get(method, keep)


@pytest.mark.refused(
    'merging methods on tiles and frames, except `"visionzip"` on tiles',
    instead='`"vtc-cls"`, `"fastervlm"`, `"random"`',
)
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llava_next", method) for method in ("prumerge", "prumerge+", "pool")),
        *(("llava_next_video", method) for method in ("visionzip", "prumerge", "prumerge+", "pool")),
    ],
)
def test_merging_across_tiles_and_frames_is_explained(built, family, method):
    model, _ = built(family)
    zips = "'visionzip', " if family == "llava_next" else ""
    says = (
        rf"method '{re.escape(method)}' makes new tokens .* several views; "
        f"methods that work with it: 'vtc-cls', 'fastervlm', {zips}'coverage', 'scope', 'mmtok', 'divprune', "
        "'cdpruner', 'vispruner', 'hiprune', 'received', 'random', 'downsample', 'none'"
    )
    with pytest.raises(ValueError, match=says):
        vtc.configure(model, keep=KEEP, method=method)


@pytest.mark.parametrize(
    ("build", "settings", "says"),
    [
        (
            {"family": "vipllava"},
            {"method": "prumerge"},
            "different numbers of tokens, and VipLLaVA takes",
        ),
        (
            {"tower": "dinov2_with_registers"},
            {"method": "pool"},
            "'pool' needs a grid of patches, and DINOv2 with registers",
        ),
        ({}, {"method": "visionzip", "keep": 1}, "visionzip keeps .* got keep=1; use keep=2 or more"),
        ({}, {"method": "visionzip", "contextual": 8}, "8 contextual tokens, got keep=9; .* from 0 to keep - 2"),
        ({}, {"method": "prumerge+", "keep": 1}, "got keep=1; use 2 or more"),
        ({}, {"method": "prumerge", "adaptive_count": False, "keep": 1}, "got keep=1; use 2 or more"),
        ({}, {"method": "pool", "keep": TOKENS + 1}, f"only {TOKENS} visual tokens"),
        ({}, {"method": "tome"}, "method must be one of 'vtc-cls', .*'none', got 'tome'"),
    ],
)
def test_configure_refuses(built, build, settings, says):
    model, _ = built(**build)
    with pytest.raises(ValueError, match=says):
        vtc.configure(model, **{"keep": KEEP, **settings})
    assert not hasattr(model.config, "vtc")


@pytest.mark.supported("forward()", '`"prumerge+"` that keeps all patches of an image, and has one token more')
@pytest.mark.supported("generate()", '`"prumerge+"` that keeps all patches of an image, and has one token more')
def test_one_token_more_than_placeholders(model, eager, call):
    """PruMerge+ keeps every patch of images with many outliers, and then there is the extra token."""
    case = "prumerge+ adaptive"
    vtc.enable(model, **options(case))
    pixels = torch.cat([models.images(4)[:2], call["pixel_values"][:2]])
    seen, own = [Seen(eager, image) for image in pixels], {**call, "pixel_values": pixels}
    assert [len(CASES[case][1](s)[1]) for s in seen].count(TOKENS + 1) in (1, 2, 3)
    embeds = spliced(eager, seen, CASES[case][1])
    check_generated(model.generate(**own, **detailed()), own, eager, embeds)
    with torch.no_grad():
        logits = model(**own).logits
    assert logits.shape[1] == call["input_ids"].shape[1]
    left, rows = list(seen), [ids(*row, seed=i) for i, row in enumerate(ROWS)]
    for i, row in enumerate(rows):
        columns, at = [], 0
        while at < len(row):  # the last placeholder stands for two tokens
            count = len(CASES[case][1](left.pop(0))[1]) if row[at] == IMAGE else 1
            size = TOKENS if row[at] == IMAGE else 1
            columns += [at + min(number, size - 1) for number in range(count)]
            at += size
        golden.close(logits[i, -len(row) :], golden.spread(golden.logits(eager, embeds[i]), columns, len(row)).detach())


@torch.no_grad()
def test_attention_to_a_placeholder_of_two_tokens_is_their_sum(model, eager, call):
    case = "prumerge+ adaptive"
    vtc.enable(model, **options(case))
    model.set_attn_implementation({"text_config": "eager"})
    row, pixels = ids(2, "image", 3), models.images(4)[:1]
    (attention,) = model(**models.batch([row]), pixel_values=pixels, output_attentions=True).attentions[:1]
    model.set_attn_implementation({"text_config": "sdpa"})
    (embeds,) = spliced(eager, [Seen(eager, pixels[0])], CASES[case][1], [row])
    assert embeds.shape[1] == len(row) + 1
    positions = torch.arange(embeds.shape[1])[None]
    stock = eager.model.language_model(inputs_embeds=embeds, position_ids=positions, output_attentions=True)
    inside = stock.attentions[0]
    last = 3 + TOKENS - 1  # the last placeholder's column
    golden.close(attention[0, :, -1, :last], inside[0, :, -1, :last])
    golden.close(attention[0, :, -1, last], inside[0, :, -1, last : last + 2].sum(-1))
    golden.close(attention[0, :, last], torch.cat([inside[0, :, last + 1, :last], attention[0, :, last, last:]], 1))
    golden.close(attention.sum(-1), torch.ones(1, 4, len(row)))


@pytest.mark.parametrize("case", [case for case in CASES if METHODS[case.split()[0]].selects])
def test_select(model, call, seen, case):
    """Ascending patches; of what a method merges those that stay; -1 after the patches of an image with fewer."""
    selection = vtc.select(model, call if case in BY_QUESTION else call["pixel_values"], **options(case))
    assert selection.scores.shape == (4, TOKENS)
    for b, image in enumerate(seen):
        kept = sorted(CASES[case][1](image)[0])
        own = selection.indices[b].tolist()
        assert own == kept + [-1] * (len(own) - len(kept))
        assert selection.counts is None or selection.counts[b] == len(kept)
    picture = Image.new("RGB", (84, 84), "red")
    drawn = vtc.overlay(picture, selection, index=2, side=84)
    kept = torch.tensor([sorted(CASES[case][1](seen[2])[0])])
    alone = vtc.Selection(kept, selection.scores[2:3], selection.grid)
    assert drawn.tobytes() == vtc.overlay(picture, alone, side=84).tobytes()


@pytest.mark.parametrize("method", ["pool", "downsample", "none"])
def test_nothing_to_select(model, call, method):
    with pytest.raises(ValueError, match=rf"'{method}' selects no patches.*select patches: 'vtc-cls', 'fastervlm'"):
        vtc.select(model, call["pixel_values"], keep=KEEP, method=method)
    with pytest.raises(ValueError, match=f"method '{method}' selects no patches"):
        api.require_selection(method)


def test_a_method_that_says_it_selects_and_does_not(model, call, monkeypatch):
    class Vague(Method):
        name, scores, paper = "pool", "nothing", ""

        def reduce(self, outputs, keep):
            return Tokens(outputs.patches[:, :keep])

    monkeypatch.setitem(METHODS, "pool", Vague)
    with pytest.raises(ValueError, match="'pool' selects patches, but gave no indices"):
        vtc.select(model, call["pixel_values"], keep=KEEP, method="pool")


@pytest.mark.supported("Compiling", "image encoding in one graph")
@pytest.mark.parametrize(
    "case", [case for case in PIXELS_ONLY if case not in ADAPTIVE and case != "prumerge neighbors"]
)
def test_image_encoding_compiles_into_one_graph(call, case):
    model = models.build(DEPTH)  # a new one: transformers leaves hooks on a tower that has run as the stock one
    vtc.enable(model, **options(case))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = torch.stack(list(model.get_image_features(call["pixel_values"]).pooler_output))
        compiled = torch.compile(model.get_image_features, fullgraph=True, backend="eager")
        found = torch.stack(list(compiled(call["pixel_values"]).pooler_output))
    torch._dynamo.reset()
    golden.close(found, expected)


@pytest.mark.parametrize("case", ["vtc-cls", "fastervlm", "visionzip", "random", "pool", "prumerge fixed", "prumerge"])
def test_which_layers_run(model, call, case):
    """Each once, as in the stock model."""
    ran = []
    layers = model.model.vision_tower.encoder.layers
    hooks = [layer.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(layers)]
    vtc.enable(model, **options(case))
    with torch.no_grad():
        model.get_image_features(call["pixel_values"])
    for hook in hooks:
        hook.remove()
    assert ran == list(range(DEPTH))


@pytest.mark.parametrize("case", ADAPTIVE)
def test_counts_are_read_back_once(model, call, case, monkeypatch):
    """Between pixels and features; between pixels and logits once more, for the prompt's length, as with any method."""
    reads, stock = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or stock(self))
    vtc.enable(model, **options(case))
    with torch.no_grad():
        model.get_image_features(call["pixel_values"])
        assert reads == [(4,)]
        reads.clear()
        model(**call)
    assert reads == [(3, len(ROWS)), (4,)]


@pytest.mark.parametrize("case", [case for case in CASES if METHODS[case.split()[0]].adaptive is False])
def test_nothing_waits_for_the_device(case, call):
    """Tensors without values: whatever asks for one, as `.item()` does, is an error. Only the prompt is real."""
    model = models.build(DEPTH).to("meta")
    vtc.enable(model, **options(case))
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: (args[0].to("meta"),))
    own = models.batch([ids(2, "image", 3), ids(4, "image", 1)])
    with torch.no_grad():
        out = model(input_ids=own["input_ids"][1:, :-1], pixel_values=call["pixel_values"][:1].to("meta"))
    assert models.image_features(out).shape == (KEEP, 64)


def test_keys_without_scores(built, monkeypatch):
    """A method that compares the feature layer's keys and scores by nothing gets them, too."""

    class Keys(Method):
        name, scores, paper, needs = "pool", "nothing", "", Needs(keys="feature")

    monkeypatch.setitem(METHODS, "pool", Keys)
    model, _ = built()
    with torch.no_grad(), vtc.compress(model, method="pool", keep=KEEP):
        tower, _ = encode.run_tower(Settings.of(model), models.images(2), plan_of(Settings.of(model)))
    assert tower.keys.shape == (2, 4, 1 + TOKENS, 16)
    assert tower.cls_probs is None

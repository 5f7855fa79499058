"""Methods: the same tokens and features as their slow transcriptions, in batches and one at a time."""

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from support.golden import methods as golden
from support.kernels import BACKENDS, DEVICE, DTYPES
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast

from vtc import methods, ops, tiny
from vtc.config import SHARED, VTCConfig
from vtc.methods import METHODS, Question, VisionOutputs
from vtc.methods import question as question_module
from vtc.methods.cdpruner import _most_probable
from vtc.methods.prumerge import _fraction_count, _outliers, top_and_step
from vtc.methods.question import FUNCTION_WORDS, ignored_ids, sum_of_tokens, word_weights
from vtc.tiny.scenes import balanced_questions

GREEDY = ["coverage", "scope", "mmtok", "divprune", "cdpruner", "vispruner"]
LAYERS = 3  # scored, the last of them the feature layer; one more has keys and queries


class Images:
    """What a tower of `LAYERS` + 1 layers leaves: q and k `[L + 1, B, 1 + N, C]`, hidden `[B, 1 + N, C]`, pixels."""

    def __init__(self, query, key, hidden, pixel_values, grid, num_heads):
        self.query, self.key, self.hidden, self.pixel_values = query, key, hidden, pixel_values
        self.grid, self.num_heads = grid, num_heads
        weight = torch.randn(hidden.shape[2], 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.projected = (hidden[:, 1:].double() @ weight).float()  # stands for the projector

    def outputs(self, method, images=slice(None), mean=False, dtype=torch.float32):
        """What the method needs, as it gets it from a model, and nothing else."""
        needs, scored = method.required, method.scored_layers(LAYERS, LAYERS + 1)
        query, key = (
            x[:, images].to(DEVICE, dtype).unflatten(3, (self.num_heads, -1)).transpose(2, 3)
            for x in (self.query, self.key)
        )
        probs = [ops.cls_attention(query[n], key[n], key[n])[1][:, :, 1:] for n in scored]
        if mean:
            probs = [ops.row_scores(query[n][:, :, 0], key[n], skip=1).unsqueeze(1) for n in scored]
        compared = {"feature": LAYERS - 1, "last": LAYERS, None: None}[needs.keys]
        received = [ops.received(query[n], key[n], skip=1) for n in method.received_layers(LAYERS, LAYERS + 1)]
        return VisionOutputs(
            hidden=self.hidden[images].to(DEVICE, dtype),
            grid=self.grid,
            cls_probs=torch.stack(probs) if needs.cls_probs else None,
            keys=None if compared is None else key[compared],
            query=query[compared][:, :, 0] if needs.query else None,
            pixel_values=self.pixel_values[images].to(DEVICE) if needs.pixels else None,
            received=torch.stack(received) if needs.received else None,
            projected=self.projected[images].to(DEVICE, dtype) if needs.projected else None,
            question=self.question_of(images, dtype) if needs.question else None,
        )

    def question_of(self, images=slice(None), dtype=torch.float32):
        """Questions of 9, 2, 1 and 6 text tokens, of 9 ids; other tokens are in between and behind."""
        generator = torch.Generator().manual_seed(9)
        table = torch.randn(9, self.projected.shape[2], generator=generator)
        is_text = torch.tensor([[1] * 9 + [0], [0, 1, 0, 1] + [0] * 6, [1] + [0] * 9, [1, 0] + [1] * 5 + [0] * 3])
        ids = torch.arange(40).view(4, 10) * 7 % 9
        each = table[ids].to(dtype), ids, is_text.bool()
        return Question(*(x[: len(self.hidden)][images].to(DEVICE) for x in each))

    def words(self, image, ignore=()):
        """The embeddings of the words that count, float64 [m, E]."""
        embeddings, ids, is_text = (x[image].cpu() for x in self.question_of())
        text = [t for t in range(len(ids)) if is_text[t]]
        left = [t for t in text if ids[t] not in ignore] or text
        return embeddings[left].double()

    def attentions(self, image, layers=range(LAYERS)):
        """Full probabilities [H, 1 + N, 1 + N] of the layers, float64."""
        probabilities = []
        for layer in layers:
            q, k = (x[layer, image].double().chunk(self.num_heads, dim=1) for x in (self.query, self.key))
            logits = [a @ b.T / a.shape[1] ** 0.5 for a, b in zip(q, k, strict=True)]
            probabilities.append([one.softmax(dim=1) for one in logits])
        return probabilities


def random_images(num_images, grid, num_heads=2, size=8):
    generator = torch.Generator().manual_seed(grid[0])
    shape = num_images, 1 + grid[0] * grid[1], num_heads * size
    query, key = (torch.randn(LAYERS + 1, *shape, generator=generator) * 1.2 for _ in range(2))
    pixels = torch.randn(num_images, 3, 14 * grid[0], 14 * grid[1], generator=generator)
    return Images(query, key, torch.randn(shape, generator=generator), pixels, grid, num_heads)


@torch.no_grad()
def bundled_images():
    """Two scenes as the bundled model's tower sees them: its last `LAYERS` + 1 layers."""
    model, processor = tiny.load()
    tower = model.model.vision_tower
    images = [scene.image for scene, _ in balanced_questions("test", 2)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    seen = {"q_proj": [], "k_proj": []}
    for layer in tower.encoder.layers[-LAYERS - 1 :]:
        for name, outputs in seen.items():
            getattr(layer.self_attn, name).register_forward_hook(lambda *a, outputs=outputs: outputs.append(a[-1]))
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    side = tower.config.image_size // tower.config.patch_size
    query, key = (torch.stack(outputs) for outputs in seen.values())
    return Images(query, key, hidden, pixels, (side, side), tower.config.num_attention_heads)


@pytest.fixture(scope="module")
def images():
    made = {}
    makers = {"small": lambda: random_images(4, (6, 6)), "576": lambda: random_images(2, (24, 24))}
    makers |= {"oblong": lambda: random_images(2, (3, 7)), "bundled": bundled_images}
    return lambda name: made.setdefault(name, None) or made.update({name: makers[name]()}) or made[name]


def run(method, data, keep, images=slice(None), **options):
    with torch.no_grad():
        return method.reduce(data.outputs(method, images, **options), keep)


def assert_same(tokens, data, expected):
    """`expected`: of each image the indices as selected, or None, and the features."""
    for b, (kept, features) in enumerate(expected):
        count = tokens.features.shape[1] if tokens.counts is None else int(tokens.counts[b])
        assert count == len(features)
        if kept is not None:
            assert tokens.indices[b, : len(kept)].tolist() == kept
        actual = tokens.features[b, :count].double().cpu()
        error = (actual - features).abs().max() / data.hidden.abs().max()
        assert error < 1e-5, f"image {b}: features differ by {error:.2g}"
        assert not tokens.features[b, count:].any()


def last(data, b):
    return data.hidden[b].double(), data.query[LAYERS, b].double(), data.key[LAYERS, b].double()


def vtc_cls(data, b, keep, ensemble):
    combine = {"sum": sum, "mean": lambda x: sum(x) / len(x), "max": max, "min": min}[ensemble]
    return golden.vtc_cls(data.hidden[b].double(), data.attentions(b), keep, combine)


def fastervlm(data, b, keep):
    return golden.fastervlm(data.hidden[b].double(), data.attentions(b)[-1], keep)


def visionzip(data, b, dominant, contextual):
    hidden, key = data.hidden[b].double(), data.key[LAYERS - 1, b].double()
    return golden.visionzip(hidden, data.attentions(b)[-1], key, data.num_heads, dominant, contextual)


def mmtok(data, b, keep, ignore=(), **options):
    words = data.words(b, ignore)
    return golden.mmtok(data.hidden[b].double(), data.projected[b].double(), words, keep, **options)


def cdpruner(data, b, keep, ignore=()):
    return golden.cdpruner(data.hidden[b].double(), data.projected[b].double(), data.words(b, ignore), keep)


def saliency(data, b, layers, of):
    """The sum over the last `layers`."""
    each = [of(attention) for attention in data.attentions(b)[-layers:]]
    return [sum(values) for values in zip(*each, strict=True)]


def scope(data, b, keep, layers=1, of=golden.cls_attention):
    return golden.scope(data.hidden[b].double(), saliency(data, b, layers, of), keep)


def vispruner(data, b, keep, share=0.5):
    x = data.hidden[b, None, 1:]
    rounded = ops.similarity(x, x, backend="torch")[0].tolist() if x.shape[1] > 100 else None
    scores = golden.cls_attention(data.attentions(b)[-1])
    return golden.vispruner(data.hidden[b].double(), scores, keep, share, rounded)


def hiprune(data, b, keep, object_layer=2, alpha=0.1):
    attentions = data.attentions(b)
    middle, deep = (golden.received(attentions[layer]) for layer in (object_layer - 1, -1))
    return golden.hiprune(data.hidden[b].double(), middle, deep, data.grid[1], keep, alpha)


ON_TENSORS = [name for name in METHODS if name not in ("fastv", "dart", "downsample")]  # the latter changes the pixels

# Data, method, keep, and its transcription for image b.
CASES = [
    *(
        (name, METHODS["vtc-cls"](ensemble=ensemble), keep, lambda d, b, k=keep, e=ensemble: vtc_cls(d, b, k, e))
        for name, keep in (("small", 9), ("bundled", 64))
        for ensemble in ("sum", "mean", "max", "min")
    ),
    *(
        (name, METHODS["fastervlm"](), keep, lambda d, b, k=keep: fastervlm(d, b, k))
        for name, keep in (("small", 1), ("small", 36), ("bundled", 64))
    ),
    ("small", METHODS["visionzip"](contextual=3), 9, lambda d, b: visionzip(d, b, 6, 3)),
    ("small", METHODS["visionzip"](contextual=0), 5, lambda d, b: visionzip(d, b, 5, 0)),
    ("small", METHODS["visionzip"](), 2, lambda d, b: visionzip(d, b, 2, 0)),
    ("small", METHODS["visionzip"](), 36, lambda d, b: visionzip(d, b, 31, 5)),
    ("oblong", METHODS["visionzip"](contextual=18), 20, lambda d, b: visionzip(d, b, 2, 18)),
    ("576", METHODS["visionzip"](), 128, lambda d, b: visionzip(d, b, 108, 20)),
    ("bundled", METHODS["visionzip"](), 64, lambda d, b: visionzip(d, b, 54, 10)),
    ("bundled", METHODS["visionzip"](), 192, lambda d, b: visionzip(d, b, 162, 30)),
    *((name, METHODS["prumerge"](), 64, lambda d, b: golden.prumerge(*last(d, b))) for name in ("small", "bundled")),
    ("oblong", METHODS["prumerge"](), 1, lambda d, b: golden.prumerge(*last(d, b))),
    ("small", METHODS["prumerge"](adaptive_count=False), 8, lambda d, b: golden.prumerge(*last(d, b), 7)),
    *(
        (name, METHODS["prumerge+"](), keep, lambda d, b, c=c, s=s: golden.prumerge_plus(*last(d, b), c, s))
        for name, keep, c, s in (("576", 64, 13, 33), ("bundled", 64, 13, 33), ("576", 128, 40, 18))
    ),
    *(
        (name, METHODS["prumerge+"](adaptive_count=True), 1, lambda d, b: golden.prumerge_plus(*last(d, b)))
        for name in ("small", "oblong", "bundled")
    ),
    *(
        (name, METHODS["coverage"](), keep, lambda d, b, k=keep: golden.coverage(d.hidden[b].double(), k))
        for name, keep in (("small", 9), ("oblong", 21), ("bundled", 16))
    ),
    ("small", METHODS["coverage"](temperature=0.5), 9, lambda d, b: golden.coverage(d.hidden[b].double(), 9, 0.5)),
    *(
        (name, METHODS["scope"](), keep, lambda d, b, k=keep: scope(d, b, k))
        for name, keep in (("small", 9), ("oblong", 21), ("bundled", 16))
    ),
    ("small", METHODS["scope"](ensemble_layers=3), 9, lambda d, b: scope(d, b, 9, 3)),
    ("small", METHODS["scope"](saliency="received"), 9, lambda d, b: scope(d, b, 9, 1, golden.received)),
    (
        "oblong",
        METHODS["scope"](saliency="received", ensemble_layers=2),
        4,
        lambda d, b: scope(d, b, 4, 2, golden.received),
    ),
    *(
        (
            name,
            METHODS["divprune"](),
            keep,
            lambda d, b, k=keep: golden.divprune(d.hidden[b].double(), d.projected[b].double(), k),
        )
        for name, keep in (("small", 9), ("small", 1), ("oblong", 21), ("bundled", 32))
    ),
    *(
        (name, METHODS["vispruner"](important=share), keep, lambda d, b, k=keep, s=share: vispruner(d, b, k, s))
        for name, keep, share in (
            *(("small", 9, 0.5), ("small", 8, 0.75), ("small", 5, 0.0), ("small", 7, 1.0), ("small", 1, 0.5)),
            *(("oblong", 3, 0.34), ("oblong", 21, 0.5), ("576", 64, 0.75), ("bundled", 64, 0.5)),
        )
    ),
    *(
        (name, METHODS["hiprune"](object_layer=2), keep, lambda d, b, k=keep: hiprune(d, b, k))
        for name, keep in (("small", 9), ("small", 36), ("576", 128))
    ),
    ("small", METHODS["hiprune"](), 30, lambda d, b: hiprune(d, b, 30)),
    ("small", METHODS["hiprune"](alpha=0.5, object_layer=1), 20, lambda d, b: hiprune(d, b, 20, 1, 0.5)),
    ("oblong", METHODS["hiprune"](alpha=1, object_layer=3), 10, lambda d, b: hiprune(d, b, 10, 3, 1)),
    *(
        (
            name,
            METHODS["received"](),
            keep,
            lambda d, b, k=keep: golden.ranked(d.hidden[b].double(), golden.received(d.attentions(b)[-1]), k),
        )
        for name, keep in (("small", 9), ("576", 64))
    ),
    *(
        (name, METHODS["pool"](), keep, lambda d, b, k=keep: (None, golden.pool(d.hidden[b].double(), d.grid, k)))
        for name, keep in (("small", 9), ("small", 17), ("oblong", 4), ("bundled", 128))
    ),
    *(
        (name, METHODS["mmtok"](**options), keep, lambda d, b, k=keep, o=options: mmtok(d, b, k, **o))
        for name, keep, options in (
            ("small", 9, {}),
            ("small", 36, {}),
            ("small", 12, {"ignore": (7, 5, 0, 8)}),
            ("small", 9, {"temperature": 0.1, "text_temperature": 0.3, "alpha": 2.0}),
            ("small", 9, {"alpha": 20}),
            ("oblong", 1, {}),
            ("576", 32, {}),
        )
    ),
    *(
        (name, METHODS["cdpruner"](**options), keep, lambda d, b, k=keep, o=options: cdpruner(d, b, k, **o))
        for name, keep, options in (
            ("small", 9, {}),
            ("small", 10, {"ignore": (7, 5, 0, 8)}),
            ("oblong", 1, {}),
            ("oblong", 11, {}),
        )
    ),
    ("small", METHODS["none"](), 5, lambda d, b: (None, d.hidden[b, 1:].double())),
]
IDS = [f"{number}-{name}-{method.name}-{keep}" for number, (name, method, keep, _) in enumerate(CASES)]


@pytest.mark.parametrize(("name", "method", "keep", "transcription"), CASES, ids=IDS)
def test_same_as_the_transcription(name, method, keep, transcription, images):
    data = images(name)
    tokens = run(method, data, keep)
    assert tokens.features.shape == (
        len(data.hidden),
        method.num_outputs(len(data.hidden[0]) - 1, keep),
        data.hidden.shape[2],
    )
    assert_same(tokens, data, [transcription(data, b) for b in range(len(data.hidden))])


@pytest.mark.parametrize(("name", "method", "keep", "transcription"), CASES, ids=IDS)
def test_an_image_alone_and_in_a_batch_has_the_same_bits(name, method, keep, transcription, images):
    data = images(name)
    batch = run(method, data, keep)
    for b in range(len(data.hidden)):
        alone = run(method, data, keep, slice(b, b + 1))
        for one, many in zip(alone, batch, strict=True):
            assert (one is None) == (many is None)
            assert one is None or torch.equal(one[0], many[b])


def test_counts_differ_between_the_images_of_a_batch(images):
    """Or the tests above would say little about padding."""
    for name, method in (("small", METHODS["prumerge"]()), ("576", METHODS["prumerge+"]())):
        assert len(set(run(method, images(name), 64).counts.tolist())) > 1


def test_heads_averaged_before(images):
    """Layers that were scored without a kernel for all heads hand over their mean."""
    data = images("small")
    for method in (METHODS["vtc-cls"](), METHODS["fastervlm"](), METHODS["visionzip"]()):
        one, other = run(method, data, 9), run(method, data, 9, mean=True)
        assert torch.equal(one.indices, other.indices)
        torch.testing.assert_close(one.scores, other.scores)


@pytest.mark.parametrize("seed", [0, 7])
def test_random_is_splitmix64_of_the_pixels(seed, images):
    data = images("oblong")
    tokens = run(METHODS["random"](seed=seed), data, 5)
    for b in range(2):
        scores = golden.random_scores(data.pixel_values[b], 21, seed)
        assert tokens.scores[b].tolist() == scores
        assert tokens.indices[b].tolist() == sorted(golden.by_score(scores, 5))
        assert torch.equal(tokens.features[b].cpu(), data.hidden[b, 1:][tokens.indices[b].cpu()])


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 6, 7, 36, 49])
def test_outliers_are_counted_as_the_paper_counts(num_tokens):
    """Interpolated quartiles; a share in float64, times N, cut off: of 49 that is sometimes one less than there are."""
    scores = torch.randn(300, num_tokens, generator=torch.Generator().manual_seed(num_tokens)).mul(0.8).exp()
    counts = _outliers(scores.to(DEVICE))
    fractions = [golden.outlier_fraction(row) for row in scores.tolist()]
    assert [count / num_tokens for count in counts.tolist()] == fractions
    assert counts.max() <= num_tokens // 4  # what `num_outputs` rests on
    every = torch.arange(num_tokens + 1, device=DEVICE)
    assert _fraction_count(every, num_tokens).tolist() == [
        int(num_tokens * (n / num_tokens)) for n in range(len(every))
    ]


def test_no_outlier_leaves_the_extra_token(images):
    """Equal scores: nothing is kept but the sum; PruMerge+ still has the first patch of its sample."""
    data = images("oblong")
    outputs = data.outputs(METHODS["prumerge"]())
    outputs = outputs._replace(query=torch.zeros_like(outputs.query))
    tokens = METHODS["prumerge"]().reduce(outputs, 5)
    assert tokens.counts.tolist() == [1, 1]
    torch.testing.assert_close(tokens.features[:, 0], outputs.hidden[:, 1:].sum(dim=1) / 22)
    tokens = METHODS["prumerge+"](adaptive_count=True).reduce(outputs, 5)
    assert tokens.counts.tolist() == [2, 2]
    assert tokens.indices[:, 0].tolist() == [0, 0]


def test_a_bad_image_stays_within_its_promise(images):
    """NaN everywhere: wrong numbers, but the shapes, counts and indices that were promised, and nobody else's rows."""
    data = images("small")
    for method in (METHODS["prumerge"](), METHODS["prumerge+"](adaptive_count=True), METHODS["visionzip"]()):
        outputs = data.outputs(method)
        good = method.reduce(outputs, 9)
        keys = outputs.keys.clone()
        keys[1] = float("nan")
        probs = outputs.cls_probs
        if probs is not None:
            probs = probs.clone()
            probs[:, 1] = float("nan")
        bad = method.reduce(outputs._replace(keys=keys, cls_probs=probs), 9)
        assert bad.features.shape == good.features.shape
        assert ((bad.indices >= 0) & (bad.indices < 36)).all()
        for b in (0, 2, 3):
            assert torch.equal(bad.features[b], good.features[b])


@pytest.mark.parametrize(
    "name", ["coverage", "scope", "mmtok", "divprune", "cdpruner", "vispruner", "hiprune", "received"]
)
def test_a_bad_image_keeps_as_many_patches_and_harms_no_other(name, images):
    method, names = METHODS[name](), ("hidden", "cls_probs", "received", "projected")
    outputs = images("small").outputs(method)
    good, bad = method.reduce(outputs, 9), {each: getattr(outputs, each) for each in names}
    for each, x in bad.items():
        if x is not None:
            bad[each] = x.clone()
            bad[each][(slice(None), 1) if each in ("cls_probs", "received") else 1] = float("nan")
    tokens = method.reduce(outputs._replace(**bad), 9)
    assert len(set(tokens.indices[1].tolist())) == 9
    assert ((tokens.indices >= 0) & (tokens.indices < 36)).all()
    for b in (0, 2, 3):
        assert torch.equal(tokens.features[b], good.features[b])


@pytest.mark.parametrize("name", ["vtc-cls", "fastervlm", "scope", "vispruner"])
def test_attention_of_nan_is_the_least(name, images):
    """As that of a tile that has no finite attention, beside others of its image."""
    method = METHODS[name](important=1.0) if name == "vispruner" else METHODS[name]()
    outputs = images("small").outputs(method)
    probs = outputs.cls_probs.clone()
    probs[..., 10:20] = float("nan")
    tokens = method.reduce(outputs._replace(cls_probs=probs), 24)
    assert not ((tokens.indices >= 10) & (tokens.indices < 20)).any()


@pytest.mark.parametrize("keep", [2, 16, 32, 192, 288, 576])
def test_prumerge_plus_for_other_numbers(keep):
    """About as many as asked for: the best, a sample at most 5/6 of them, less what is in both by chance."""
    best, step = top_and_step(576, keep)
    sample = len(range(0, 575, step))
    assert sample <= 5 * keep / 6
    assert abs(best + sample - best / step - keep) <= 1
    assert METHODS["prumerge+"]().num_outputs(576, keep) == min(576, best + sample) + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ON_TENSORS)
def test_features_have_the_dtype_of_the_hidden_states(name, dtype, images):
    data = images("oblong")
    method = METHODS[name]()
    tokens = run(method, data, 4, dtype=dtype)
    assert tokens.features.dtype == dtype
    assert tokens.features.shape == (2, method.num_outputs(21, 4), 16)
    assert (tokens.counts is not None) == method.adaptive
    assert (tokens.indices is not None) == (tokens.scores is not None) == method.selects
    if tokens.scores is not None:
        assert tokens.scores.dtype == torch.float32


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ON_TENSORS)
def test_the_default_dtype_changes_nothing(name, images, request):
    method, data = METHODS[name](), images("small")
    outputs = data.outputs(method)
    tokens = method.reduce(outputs, 9)
    request.getfixturevalue("float64_by_default")
    for one, other in zip(tokens, method.reduce(outputs, 9), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


def test_the_default_dtype_changes_no_weight_of_a_word(images, float64_by_default):
    question = images("small").question_of()
    assert word_weights(question, (7, 5)).dtype == torch.float32


KERNELS = ["vtc-cls", "visionzip", "prumerge", "prumerge+", *GREEDY, "hiprune", "received"]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_choose_the_same(name, images):
    data = images("oblong")
    outputs = data.outputs(METHODS[name]())
    one, other = (METHODS[name](backend=backend).reduce(outputs, 3) for backend in ("torch", "triton"))
    counts = torch.full_like(one.indices[:, 0], one.indices.shape[1]) if one.counts is None else one.counts - 1
    for b, count in enumerate(counts.tolist()):
        assert torch.equal(one.indices[b, :count], other.indices[b, :count])
    torch.testing.assert_close(one.features, other.features, rtol=1e-5, atol=1e-5)


class Copies(TorchDispatchMode):
    """Collects the operations that copy between devices, or wait for a GPU although they run on the meta device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        if name in ("aten::isin", "aten::lift_fresh") or (  # the latter is of torch.tensor(numbers)
            name in ("aten::_to_copy", "aten::copy_") and len({x.device.type for x in tensors}) > 1
        ):
            self.found.append(f"{name} of {[str(x.device) for x in tensors]}")
        return result


# With these, a method takes every branch.
BRANCHES = {"mmtok": {"ignore": (7, 5, 0)}, "cdpruner": {"ignore": (7, 5, 0)}, "hiprune": {"alpha": 1.0}}


@pytest.mark.parametrize("name", ON_TENSORS)
def test_nothing_waits_for_the_device(name, images, monkeypatch):
    """Tensors on the meta device have shapes and no values: whatever asks for one, as `.item()` does, is an error."""
    method = METHODS[name](**BRANCHES.get(name, {}))
    outputs = images("small").outputs(method)
    real = method.reduce(outputs, 9)
    meta = VisionOutputs(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in outputs))
    if outputs.question is not None:
        meta = meta._replace(question=Question(*(x.to("meta") for x in outputs.question)))
    method.reduce(meta, 9)  # the first call may copy what all others use
    # It would copy numbers to the device, which no operation on the meta device shows.
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: pytest.fail("torch.tensor at every call"))
    with Copies() as copies:
        tokens = method.reduce(meta, 9)
    assert not copies.found
    for one, other in zip(real, tokens, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.shape, one.dtype) == (other.shape, other.dtype)


def test_ignored_ids_are_copied_to_the_device_once(images):
    """And no tensor of a tracer is kept."""
    question_module._kept.cache_clear()
    with FakeTensorMode() as mode:
        assert question_module._ascending((5, 3), torch.empty(2, dtype=torch.int64)).fake_mode is mode
    question = images("small").question_of()
    torch._dynamo.reset()
    compiled = torch.compile(word_weights, fullgraph=True, backend="eager")
    assert torch.equal(compiled(question, (7, 5)), word_weights(question._replace(ids=question.ids.clone()), (5, 7)))
    assert question_module._kept.cache_info().currsize == 1  # of the call that no tracer saw
    one, other = (question_module._ascending((5, 7), question.ids) for _ in range(2))
    assert one is other
    assert one.tolist() == [5, 7]
    assert question_module._kept((7, 5), question.ids.device).tolist() == [5, 7]


@pytest.mark.filterwarnings("error:.*custom operator:UserWarning")  # outputs that alias
@pytest.mark.parametrize("name", ON_TENSORS)
def test_compilers_trace_through(name, images):
    method = METHODS[name](**BRANCHES.get(name, {}))
    outputs = images("oblong").outputs(method)
    torch._dynamo.reset()  # methods share `reduce`, and a function is compiled a few times at most
    compiled = torch.compile(method.reduce, fullgraph=True, backend="aot_eager")
    for one, other in zip(method.reduce(outputs, 5), compiled(outputs, 5), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_gradients_reach_the_hidden_states(images):
    for name in (name for name in METHODS if name not in ("fastv", "dart")):
        outputs = images("oblong").outputs(METHODS[name]())
        hidden = outputs.hidden.clone().requires_grad_()
        METHODS[name]().reduce(outputs._replace(hidden=hidden), 5).features.sum().backward()
        assert hidden.grad[:, 1:].abs().sum() > 0


def test_fastv_in_a_left_padded_batch():
    """Prompts of different lengths, with two images, one and none, against each alone."""
    generator = torch.Generator().manual_seed(5)
    num_heads, size, longest = 4, 8, 40
    lengths, layouts = (40, 31, 17), ([(3, 12), (20, 29)], [(5, 14)], [])
    query = torch.randn(3, num_heads, longest, size, generator=generator)
    key = torch.randn(3, num_heads // 2, longest, size, generator=generator)  # grouped queries
    is_image = torch.zeros(3, longest, dtype=torch.bool)
    mask = torch.zeros(3, longest, dtype=torch.bool)
    for b, (length, spans) in enumerate(zip(lengths, layouts, strict=True)):
        mask[b, longest - length :] = True
        for start, end in spans:
            is_image[b, longest - length + start : longest - length + end] = True
    keep = torch.tensor([8, 4, 0])
    fastv = METHODS["fastv"]()
    scores = ops.row_scores(query[:, :, -1].to(DEVICE), key.to(DEVICE), mask=mask.to(DEVICE))
    stays = fastv.keep_prompt(scores, is_image.to(DEVICE), keep.to(DEVICE))
    for b, length in enumerate(lengths):
        start = longest - length
        keys = key[b, :, start:].double().repeat_interleave(2, dim=0)
        logits = query[b, :, start:].double() @ keys.mT * size**-0.5
        causal = torch.ones(length, length).tril() == 0
        attention = logits.masked_fill(causal, float("-inf")).softmax(dim=2)
        kept = golden.fastv(attention, is_image[b, start:].tolist(), int(keep[b]))
        assert stays[b].nonzero().flatten().tolist() == [*range(start), *(start + n for n in kept)]
    same = fastv.keep_prompt(scores[1:2], is_image[1:2].to(DEVICE), 4)
    assert torch.equal(same, stays[1:2])


def test_patches_that_stay_in_prompts_with_several_images():
    """Two images, none, and one, of 6 patches each."""
    prompts = ["..iiiiii.iiiiii", "...............", ".....iiiiii...."]
    is_image = torch.tensor([[token == "i" for token in prompt] for prompt in prompts], device=DEVICE)
    indices = torch.tensor([[0, 5], [1, 2], [3, 4]], device=DEVICE)
    stays = methods.keep_patches(is_image, indices, 6)
    first = [0, 1, 2, 7, 8, 10, 11]
    third = [0, 1, 2, 3, 4, 8, 9, 11, 12, 13, 14]
    assert [row.nonzero().flatten().tolist() for row in stays] == [first, list(range(15)), third]


@pytest.mark.parametrize(
    ("scores", "is_image", "keep", "expected"),
    [
        ([9.0, 1.0, 1.0, 1.0, 9.0], [0, 1, 1, 1, 0], 2, [0, 1, 2, 4]),  # ties: the earlier
        ([9.0, 0.0, 0.0, 3.0, 9.0], [0, 1, 1, 1, 0], 0, [0, 4]),
        ([9.0, 0.0, 0.0, 3.0, 9.0], [0, 1, 1, 1, 0], 3, [0, 1, 2, 3, 4]),
        ([9.0, float("nan"), -float("inf"), 3.0, 9.0], [0, 1, 1, 1, 0], 2, [0, 1, 3, 4]),
        ([float("nan")] * 5, [0, 1, 1, 1, 0], 1, [0, 1, 4]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], [0, 0, 0, 0, 0], 2, [0, 1, 2, 3, 4]),
    ],
)
def test_fastv_ties_and_nan(scores, is_image, keep, expected):
    scores, is_image = torch.tensor([scores], device=DEVICE), torch.tensor([is_image], device=DEVICE).bool()
    assert METHODS["fastv"]().keep_prompt(scores, is_image, keep)[0].nonzero().flatten().tolist() == expected


def test_every_method_is_registered_once_and_documented():
    found = {}
    for path in Path(methods.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"vtc.methods.{path.stem}")
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, methods.Method) and value is not methods.Method:
                found[value.name] = value
                assert value.__doc__
                assert value.scores
                assert value.paper or value.name in ("received", "random", "pool", "downsample", "none")
                assert value.paper in value.__doc__
                for field in dataclasses.fields(value):
                    assert field.name == "backend" or f"{field.name} :" in value.__doc__, f"{value.name}: {field.name}"
    assert found == METHODS
    assert all(name == method.name for name, method in METHODS.items())


def test_build():
    assert methods.build("vtc-cls", ensemble="max", backend="torch") == METHODS["vtc-cls"](
        ensemble="max", backend="torch"
    )
    assert methods.build("random", seed=3) == METHODS["random"](seed=3)
    with pytest.raises(ValueError, match=r"one of 'vtc-cls', 'fastervlm', .*, 'none', got 'tome'"):
        methods.build("tome")
    with pytest.raises(ValueError, match=r"unknown option 'seeds' of method 'random', whose options are seed; leave"):
        methods.build("random", seeds=3)
    with pytest.raises(ValueError, match=r"seed is an option of 'random', and .* 'none', whose options are none; use"):
        methods.build("none", seed=3)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vtc-cls", {"ensemble": "median"}, "ensemble must be one of 'sum', 'mean', 'max', 'min', got 'median'"),
        ("vtc-cls", {"ensemble_layers": 0}, "ensemble_layers.*at least 1, got 0"),
        ("vtc-cls", {"ensemble_layers": True}, "ensemble_layers.*integer.*got True"),
        ("vtc-cls", {"start_layer": -1}, "start_layer.*at least 0, got -1"),
        ("vtc-cls", {"start_layer": 2.0}, "start_layer.*integer.*got 2.0"),
        ("random", {"seed": -1}, "seed.*at least 0, got -1"),
        ("visionzip", {"contextual": -1}, "contextual.*at least 0, got -1"),
        ("visionzip", {"contextual": 0.5}, "contextual.*integer.*got 0.5"),
        ("prumerge", {"adaptive_count": 1}, "adaptive_count must be True or False, got 1"),
        ("prumerge", {"neighbors": 0}, "neighbors.*at least 1, got 0"),
        ("prumerge+", {"adaptive_count": None}, "adaptive_count must be True or False, got None"),
        ("prumerge+", {"neighbors": 0}, "neighbors.*at least 1, got 0"),
        ("mmtok", {"temperature": 0}, "temperature must be a number above 0, got 0"),
        ("mmtok", {"text_temperature": float("nan")}, "text_temperature must be a number above 0, got nan"),
        ("mmtok", {"alpha": -1}, "alpha must be a number of at least 0, got -1"),
        ("mmtok", {"ignore": 5}, r"ignore must be a tuple of token ids, .* got 5; vtc.methods.question.ignored_ids"),
        ("cdpruner", {"ignore": (1, True)}, r"ignore must be a tuple of token ids, .* got \(1, True\)"),
        ("cdpruner", {"ignore": [-1]}, r"ignore must be a tuple of token ids, .* got \[-1\]"),
        ("cdpruner", {"ignore": "the"}, "ignore must be a tuple of token ids, .* got 'the'"),
        ("coverage", {"temperature": 0}, "temperature must be a number above 0, got 0"),
        ("coverage", {"temperature": float("inf")}, "temperature must be a number above 0, got inf"),
        ("coverage", {"temperature": "0.2"}, "temperature must be a number above 0, got '0.2'"),
        ("scope", {"saliency": "text"}, "saliency must be one of 'cls', 'received', got 'text'"),
        ("scope", {"ensemble_layers": 0}, "ensemble_layers.*at least 1, got 0"),
        ("vispruner", {"important": 1.5}, "important must be a number from 0 to 1, got 1.5"),
        ("vispruner", {"important": True}, "important must be a number from 0 to 1, got True"),
        ("hiprune", {"alpha": -0.1}, "alpha must be a number from 0 to 1, got -0.1"),
        ("hiprune", {"object_layer": 0}, "object_layer.*at least 1, got 0"),
    ],
)
def test_a_method_checks_its_options(name, options, says):
    with pytest.raises(ValueError, match=says):
        METHODS[name](**options)
    with pytest.raises(ValueError, match=says):
        VTCConfig.of(method=name, **options)


def test_ignored_tokens_are_a_tuple_wherever_they_come_from():
    """A saved config holds a list."""
    for method in ("mmtok", "cdpruner"):
        one, other = (VTCConfig.of(method=method, ignore=ids) for ids in ((3, 5), [3, 5]))
        assert one == other
        assert other.options == {"ignore": (3, 5)}
        assert VTCConfig.of(**other.to_dict()).build_method().ignore == (3, 5)


def test_options_are_the_fields_without_the_backend():
    assert METHODS["vtc-cls"].options() == ("ensemble", "ensemble_layers", "start_layer")
    assert METHODS["prumerge+"].options() == ("adaptive_count", "neighbors")
    assert METHODS["none"].options() == ()
    for name, method in METHODS.items():
        assert not set(method.options()) & {*SHARED, "options"}, f"{name}: VTCConfig has a field of that name"


def test_scored_layers():
    """`end - 1` is the feature layer. Only VTC-CLS leaves out the last of the tower."""
    vtc_cls = METHODS["vtc-cls"]
    assert vtc_cls().scored_layers(23, 24) == range(20, 23)
    assert vtc_cls(ensemble_layers=23).scored_layers(23, 24) == range(23)
    assert vtc_cls(start_layer=22, ensemble_layers=5).scored_layers(23, 24) == range(22, 23)
    assert vtc_cls().scored_layers(24, 24) == range(20, 23)
    assert vtc_cls(start_layer=16).scored_layers(24, 24) == range(16, 23)
    for name in ("fastervlm", "visionzip"):
        assert METHODS[name]().scored_layers(23, 24) == range(22, 23)
        assert METHODS[name]().scored_layers(24, 24) == range(23, 24)
    for name in ("prumerge", "prumerge+", "coverage", "divprune", "hiprune", "fastv", "random", "pool", "none"):
        assert not METHODS[name]().scored_layers(23, 24)
        assert name == "hiprune" or not METHODS[name]().received_layers(23, 24)
    scope = METHODS["scope"]
    assert (scope().scored_layers(23, 24), scope().received_layers(23, 24)) == (range(22, 23), ())
    assert scope(ensemble_layers=3).scored_layers(24, 24) == range(21, 24)
    received = scope(saliency="received", ensemble_layers=2)
    assert (received.scored_layers(23, 24), received.received_layers(23, 24)) == (range(0), (21, 22))
    with pytest.raises(ValueError, match=r"ensemble_layers=6, but only 5 .* use 1 to 5"):
        scope(ensemble_layers=6).scored_layers(5, 6)

    class Keys(methods.Method):
        needs = methods.Needs(keys="feature")

    assert Keys().scored_layers(23, 24) == range(22, 23)
    with pytest.raises(ValueError, match=r"layers -1 to 4: .* ensemble_layers 1 to 5 or start_layer 0 to 4, got .*=6"):
        vtc_cls(ensemble_layers=6).scored_layers(5, 6)
    with pytest.raises(ValueError, match=r"layers 5 to 4: .*got ensemble_layers=3, start_layer=5"):
        vtc_cls(start_layer=5).scored_layers(5, 6)


def test_received_layers():
    hiprune = METHODS["hiprune"]
    assert METHODS["received"]().received_layers(23, 24) == (22,)
    assert hiprune().received_layers(23, 24) == (8, 22)  # layer 9, counted from 1
    assert [hiprune().received_layers(depth - 1, depth)[0] for depth in (2, 6, 12, 27, 32)] == [0, 1, 3, 9, 11]
    assert hiprune().received_layers(3, 24) == (2, 2)  # not after the feature layer
    assert hiprune(object_layer=5).received_layers(5, 6) == (4, 4)
    with pytest.raises(ValueError, match=r"object_layer=6 comes after the feature layer, .* layer 5 .* use 1 to 5"):
        hiprune(object_layer=6).received_layers(5, 6)


def test_scope_takes_the_saliency_that_the_tower_has(images):
    scope = METHODS["scope"]
    assert scope(ensemble_layers=2).for_tower(True) == scope(saliency="cls", ensemble_layers=2)
    assert scope(ensemble_layers=2).for_tower(False) == scope(saliency="received", ensemble_layers=2)
    assert scope(saliency="received").for_tower(True) == scope(saliency="received")
    with pytest.raises(ValueError, match=r'="cls" needs .* \[CLS\] .*; use saliency="received", or leave it out'):
        scope(saliency="cls").for_tower(False)
    for method in (scope(), scope(saliency="cls")):
        assert method.required == methods.Needs(cls_probs=True)
    assert scope(saliency="received").required == methods.Needs(received=True)
    data = images("small")
    outputs = data.outputs(scope(saliency="received"))
    with pytest.raises(ValueError, match=r"scope needs cls_probs of the vision tower, got None; .*cls_probs=True"):
        scope().reduce(outputs, 9)


@pytest.mark.parametrize("name", GREEDY)
def test_scores_have_the_order_of_the_choices(name, images):
    """The k largest scores are the first k choices. A greedy method chooses the same first ones, whatever K is."""
    data = images("small")
    many, few = (run(METHODS[name](), data, keep) for keep in (12, 5))
    for b in range(4):
        assert sorted(many.scores[b].tolist(), reverse=True)[:12] == pytest.approx([1 - i / 12 for i in range(12)])
        assert sorted(golden.by_score(many.scores[b].tolist(), 12)) == many.indices[b].tolist()
        assert many.scores[b].count_nonzero() == 12
        if name != "vispruner":
            assert sorted(golden.by_score(many.scores[b].tolist(), 5)) == few.indices[b].tolist()


def test_important_patches_score_above_diverse_ones(images):
    data = images("small")
    tokens = run(METHODS["vispruner"](), data, 10)
    for b in range(4):
        ranked = golden.by_score(golden.cls_attention(data.attentions(b)[-1]), 36)
        stay = [n for n in ranked if n in tokens.indices[b].tolist()]
        assert golden.by_score(tokens.scores[b].tolist(), 10) == stay
        assert stay[:5] == ranked[:5]


def test_neighbours_of_anchors(images):
    """Cut off at the first and the last patch, and not at the end of a row. If they are more than K, buffers go."""
    outputs = images("small").outputs(METHODS["hiprune"]())
    outputs = outputs._replace(hidden=outputs.hidden[:1])

    def kept(keep, alpha, anchors=(0, 6, 35)):
        received = torch.zeros(2, 1, 36)
        for place, anchor in enumerate(anchors):
            received[0, 0, anchor] = 0.5 - place / 10
        received[1, 0, 30:] = 0.5
        tokens = METHODS["hiprune"](alpha=alpha).reduce(outputs._replace(received=received.to(DEVICE)), keep)
        assert sorted(golden.by_score(tokens.scores[0].tolist(), keep)) == tokens.indices[0].tolist()
        chosen = (tokens.scores[0] >= 2).nonzero().flatten().tolist()
        assert chosen == sorted(anchors[: round(keep * alpha / 5)])  # also where one is another's neighbour
        return tokens.indices[0].tolist()

    assert kept(5, 1.0) == [0, 1, 6, 30, 31]  # one anchor: 0, cut off above and to the left
    assert kept(10, 1.0) == [0, 1, 5, 6, 7, 12, 30, 31, 32, 33]  # 5 is at the end of the row above
    assert kept(16, 0.8) == [*range(8), 12, *range(29, 36)]  # 35, cut off to the right and below
    assert kept(8, 1.0, (8, 22)) == [2, 7, 8, 9, 14, 16, 21, 22]
    assert kept(3, 0.1) == [30, 31, 32]  # no anchor


def test_coverage_knows_duplicates(images):
    """Of equal patches one stays, as long as others are not covered."""
    outputs = images("small").outputs(METHODS["coverage"]())
    patches = outputs.hidden[:1, :7].repeat_interleave(3, dim=1)
    twins = outputs._replace(hidden=patches, cls=False)
    for name in ("coverage", "divprune"):
        method = METHODS[name]()
        tokens = method.reduce(twins._replace(projected=patches), 7)
        assert (tokens.indices[0] // 3).tolist() == list(range(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_divprune_takes_the_lower_of_two_that_are_far_from_all_others(backend):
    """They are each other's nearest, so their distances are one number, however the sums are rounded."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 40, generator=generator) + 0.3 * torch.randn(64, 40, generator=generator)
        x[40] = torch.randn(40, generator=generator)
        x[11] = x[40] + 1.6 * torch.randn(40, generator=generator)
        x = x[None].half().to(DEVICE)
        tokens = METHODS["divprune"](backend=backend).reduce(VisionOutputs(x, (8, 8), cls=False, projected=x), 3)
        assert tokens.scores[0].argmax() == 11


@pytest.mark.parametrize("backend", BACKENDS)
def test_divprune_hands_over_contiguous_rows(backend, images, monkeypatch):
    """`maxmin` reads a row at a step."""
    seen, maxmin = [], ops.maxmin
    monkeypatch.setattr(ops, "maxmin", lambda x, *args, **options: seen.append(x) or maxmin(x, *args, **options))
    for name in ("oblong", "small"):
        outputs = images(name).outputs(METHODS["divprune"]())
        METHODS["divprune"](backend=backend).reduce(outputs, 5)
        METHODS["divprune"](backend=backend).reduce(outputs.of_views(slice(0, 1)), 5)
    assert len(seen) == 4
    assert all(x.is_contiguous() for x in seen)


def test_what_a_method_needs():
    assert {name for name, method in METHODS.items() if method.needs_cls()} == {
        *("vtc-cls", "fastervlm", "visionzip", "prumerge", "prumerge+", "vispruner")
    }
    assert [name for name, method in METHODS.items() if method.needs_prompt()] == ["mmtok", "cdpruner", "fastv", "dart"]
    language = {"vtc-cls", "coverage", "scope", "fastv", "dart"}
    assert {name for name, method in METHODS.items() if "language" in method.prunes} == language
    assert [name for name, method in METHODS.items() if method.prunes_only_language()] == ["fastv", "dart"]
    assert {name for name, method in METHODS.items() if method.keeps_patches()} == {
        *("vtc-cls", "fastervlm", "coverage", "scope", "mmtok", "divprune", "cdpruner", "vispruner", "hiprune"),
        *("received", "random"),
    }
    joint = {"coverage", "scope", "mmtok", "divprune", "cdpruner", "vispruner"}
    assert {name for name, method in METHODS.items() if method.joint} == joint
    assert {name for name, method in METHODS.items() if method.per_view} == {"visionzip", "hiprune", "downsample"}
    assert {name for name, method in METHODS.items() if method.adaptive} == {"prumerge", "prumerge+"}


NEEDY = ["vtc-cls", "fastervlm", "visionzip", "prumerge", "prumerge+", "scope", "divprune", "vispruner", "hiprune"]


@pytest.mark.parametrize("name", [*NEEDY, "received", "random"])
def test_missing_outputs_are_explained(name, images):
    outputs = images("small").outputs(METHODS["none"]())
    with pytest.raises(ValueError, match=rf"{name.replace('+', '.')} needs \w+ of the vision tower, got None"):
        METHODS[name]().reduce(outputs, 9)


@pytest.mark.parametrize(
    ("method", "keep", "message"),
    [
        (METHODS["visionzip"](), 1, r"got keep=1; use keep=2 or more"),
        (METHODS["visionzip"](contextual=8), 9, r"8 contextual tokens, got keep=9.*from 0 to keep - 2"),
        (METHODS["prumerge"](adaptive_count=False), 1, "the extra token, got keep=1; use 2 or more"),
        (METHODS["prumerge+"](), 1, "a sample, got keep=1; use 2 or more"),
        (METHODS["fastv"](), 9, "fastv does not select patches of the vision tower"),
    ],
)
def test_too_few_tokens_are_explained(method, keep, message, images):
    with pytest.raises(ValueError, match=message):
        method.reduce(images("small").outputs(method), keep)


def test_downsample_makes_no_side_larger():
    method = METHODS["downsample"]()
    assert [method.view_grid((6, 6), keep) for keep in (1, 17, 35, 36, 49)] == [(1, 1), (4, 4), (5, 5), (6, 6), (6, 6)]
    assert method.view_grid((3, 7), 21) == method.view_grid((3, 7), 30) == (3, 7)
    assert [method.num_outputs(21, keep) for keep in (17, 20, 21, 30)] == [16, 16, 21, 21]
    with pytest.raises(ValueError, match=r'square views smaller, got views of 3 x 7 .* keep=21 .* or method="pool"'):
        method.view_grid((3, 7), 20)


def test_words_of_a_question(images):
    """What is ignored does not count, unless nothing is left; without any text there is nothing to weigh."""
    question = images("small").question_of()
    assert question.ids[0].tolist() == [0, 7, 5, 3, 1, 8, 6, 4, 2, 0]
    weights = word_weights(question, (7, 5))
    assert weights.dtype == torch.float32
    assert weights[0].tolist() == [1 / torch.tensor(7.0)] + [0, 0] + [1 / torch.tensor(7.0)] * 6 + [0]
    own = [question.ids[1, t].item() for t in (1, 3)]
    everything = torch.tensor([0, 0.5, 0, 0.5] + [0] * 6)
    assert torch.equal(word_weights(question, ())[1].cpu(), everything)
    assert torch.equal(word_weights(question, tuple(own))[1].cpu(), everything)
    assert word_weights(question, (own[0],))[1].tolist() == [0, 0, 0, 1] + [0] * 6
    assert not word_weights(question._replace(is_text=torch.zeros_like(question.is_text)), ()).any()


@pytest.mark.parametrize("name", ["mmtok", "cdpruner"])
def test_a_prompt_without_text_still_selects(name, images):
    outputs = images("small").outputs(METHODS[name]())
    silent = outputs.question._replace(is_text=torch.zeros_like(outputs.question.is_text))
    tokens = METHODS[name]().reduce(outputs._replace(question=silent), 9)
    assert all(len(set(row)) == 9 for row in tokens.indices.tolist())
    assert tokens.scores.isfinite().all()
    if name == "mmtok":
        assert torch.equal(tokens.indices, METHODS["coverage"]().reduce(outputs, 9).indices)


@pytest.mark.parametrize("name", ["mmtok", "cdpruner"])
def test_an_image_does_not_depend_on_the_length_of_other_questions(name, images):
    data = images("small")
    outputs = data.outputs(METHODS[name]())
    many = METHODS[name]().reduce(outputs, 12)
    for b in range(4):
        alone = outputs.of_views(slice(b, b + 1))
        length = int(alone.question.is_text[0].nonzero().max()) + 1
        short = alone._replace(question=Question(*(x[:, :length] for x in alone.question)))
        one = METHODS[name]().reduce(short, 12)
        assert torch.equal(one.scores[0], many.scores[b])  # the same order


@pytest.mark.parametrize("name", ["mmtok", "cdpruner"])
@pytest.mark.parametrize("words", [1, 7])
def test_a_few_words_of_many_features_do_not_depend_on_padding(words, name):
    """A product of few rows may be summed in another order than one of many."""
    generator = torch.Generator().manual_seed(words)
    hidden = torch.randn(1, 64, 16, generator=generator)
    projected = torch.randn(1, 1, 1024, generator=generator) + 1e-2 * torch.randn(1, 64, 1024, generator=generator)
    embeddings = torch.randn(1, 70, 1024, generator=generator)
    is_text = (torch.arange(70) < words)[None]
    question = Question(*(x.to(DEVICE) for x in (embeddings, torch.arange(70)[None], is_text)))
    outputs = VisionOutputs(hidden.to(DEVICE), (8, 8), cls=False, projected=projected.to(DEVICE), question=question)
    short = outputs._replace(question=Question(*(x[:, :words] for x in question)))
    method = METHODS[name](backend="torch")
    one, many = (method.reduce(each, 16) for each in (short, outputs))
    assert torch.equal(one.scores, many.scores)
    for length in (words, 33, 64):
        cosines = ops.similarity(question.embeddings[:, :length], outputs.projected, backend="torch")
        expected = ops.similarity(question.embeddings, outputs.projected, backend="torch")[:, :length]
        assert torch.equal(cosines, expected)


def test_mmtok_weighs_the_question_as_a_whole(images):
    """All words together have 1, however many, and all patches alpha; the words come last."""
    outputs = images("small").outputs(METHODS["mmtok"]())
    cover = METHODS["mmtok"](alpha=0.25).cover(outputs)
    torch.testing.assert_close(cover[:, :36].sum((1, 2)).cpu(), torch.full((4,), 0.25))
    torch.testing.assert_close(cover[:, 36:].sum((1, 2)).cpu(), torch.ones(4))


@pytest.mark.parametrize("length", range(1, 10))
def test_zeros_at_the_end_of_a_sum_change_no_bit(length):
    terms = torch.randn(3, length, 50, generator=torch.Generator().manual_seed(length), device="cpu")
    padded = torch.nn.functional.pad(terms, (0, 0, 0, 7))
    assert torch.equal(sum_of_tokens(terms), sum_of_tokens(padded))
    torch.testing.assert_close(sum_of_tokens(terms), terms.sum(1))


def test_cdpruner_takes_no_patch_twice(images):
    """Also when the chosen ones span the others: then the lowest index is next. A tie goes to the lower index, too."""
    method, outputs = METHODS["cdpruner"](), images("oblong").outputs(METHODS["cdpruner"]())
    assert [row.tolist() for row in method.reduce(outputs, 21).indices] == [list(range(21))] * 2  # of 12 features
    same = outputs._replace(projected=outputs.projected[:, :1].expand(-1, 21, -1))
    assert method.reduce(same, 5).indices.tolist() == [[0, 1, 2, 3, 4]] * 2
    twins = outputs._replace(projected=torch.cat([outputs.projected[:, :7]] * 3, 1))
    assert (method.reduce(twins, 6).indices < 7).all()  # the least relevant one is hardly more than rounding
    bad = outputs._replace(projected=outputs.projected.where(torch.arange(2)[:, None, None] == 0, torch.nan))
    kept = method.reduce(bad, 9)
    assert torch.equal(kept.indices[0], method.reduce(outputs, 9).indices[0])
    assert len(set(kept.indices[1].tolist())) == 9


def most_probable(features, relevance, keep):
    """Greedy MAP of one image in float64, by the Schur complement of the chosen patches; then the lowest indices."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    rest = relevance.double()[:, None] * (unit @ unit.mT) * relevance.double()
    first, order = rest.diagonal().clone(), []
    while len(order) < keep and bool((rest.diagonal() > 1e-9 * first).any()):
        chosen = int(rest.diagonal().argmax())
        order.append(chosen)
        rest = rest - rest[:, chosen, None] * rest[chosen] / rest[chosen, chosen]
    return (order + [n for n in range(len(first)) if n not in order])[:keep]


@pytest.mark.parametrize(
    ("rank", "num_tokens", "keep", "mean"),
    [(3, 40, 12, 0), (8, 64, 64, 0), (64, 40, 12, 20), (64, 576, 100, 0), (1024, 576, 192, 1)],
)
def test_cdpruner_chooses_as_in_float64_and_knows_when_nothing_is_left(rank, num_tokens, keep, mean):
    """Also where all tokens are alike, as those of a projector."""
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(2, num_tokens, rank, generator=generator)
    features += mean * torch.randn(2, 1, rank, generator=generator)
    relevance = torch.rand(2, num_tokens, generator=generator)
    features, relevance = features.to(DEVICE), relevance.to(DEVICE)
    order = _most_probable(ops.similarity(features, features, backend="torch"), relevance, keep)
    for b in range(2):
        assert order[b].tolist() == most_probable(features[b], relevance[b], keep)


def test_cdpruner_scales_the_relevance_of_each_image_alone(images):
    outputs = images("small").outputs(METHODS["cdpruner"]())
    relevance = METHODS["cdpruner"]().relevance(outputs)
    assert (relevance.amin(1) > 0).all()
    assert (relevance.amin(1) < 1e-4).all()
    torch.testing.assert_close(relevance.amax(1).cpu(), torch.ones(4))


def test_ignored_ids_of_the_bundled_tokenizer():
    _, processor = tiny.load()
    tokenizer = processor.tokenizer
    ids = ignored_ids(tokenizer)
    assert ids == tuple(sorted(set(ids)))
    assert set(tokenizer.all_special_ids) <= set(ids)
    left = [token for token, number in tokenizer.get_vocab().items() if number not in ids]
    assert {"colour", "circle", "many", "left", "above", "red", "two", "user"} <= set(left)
    assert not {"the", "what", "is", "how", "?", ".", ":", "of", "<s>"} & set(left)
    assert set(ignored_ids(tokenizer, ["USER:", "colour"])) - set(ids) == {
        tokenizer.convert_tokens_to_ids(word) for word in ("user", "colour")
    }
    assert ignored_ids(tokenizer, "USER:") == ignored_ids(tokenizer, ["USER:"])


def test_ignored_ids_of_a_tokenizer_that_knows_spaces_and_lines():
    """A word has a token of its own after a space, at the beginning of a line, and for each case."""
    words = [
        "▁The",
        "▁the",
        "The",
        "the",
        "▁dog",
        "What",
        "▁What",
        "▁",
        "\n",
        "?",
        "▁a",
        "▁red",
        "ques",
        "tion",
        "▁THE",
    ]
    made = Tokenizer(models.Unigram([("<unk>", -10.0), *((word, -1.0) for word in words)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    ids = ignored_ids(tokenizer)
    found = set(tokenizer.convert_ids_to_tokens(ids))
    assert {"<unk>", "▁The", "▁the", "▁THE", "The", "the", "What", "▁What", "?", "▁a", "\n"} <= found
    assert not {"▁dog", "▁red", "ques", "tion"} & found  # parts of "question" are in other words
    assert "question" in FUNCTION_WORDS

"""The least time that a stage of a LLaVA can take on a machine: the roofline model, one stage after the other.

::

    floor = Σ_parts max(bytes / copy rate, floating-point operations / rate of a matrix product)

Both rates are measured in the same run. The work comes from the configuration alone: the weights, read once, the KV
cache, and the products of matrices. Activations, normalisations and the host's time are not in it. A copy also writes,
so a part that only reads, such as a decoding step, may be a little faster than its floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

FIRST_TOKEN = ("vision", "projector", "prefill")  # its parts
BOUNDS = ("bandwidth", "arithmetic")


class Work(NamedTuple):
    """What a part must do: bytes to read and write, and floating-point operations, two for a multiply-add."""

    bytes: int
    flops: int


class Floor(NamedTuple):
    """The least milliseconds, and which of `BOUNDS` most of them are due to."""

    ms: float
    bound: str


def floor(works: Sequence[Work], copy_gb_per_s: float, tflop_per_s: float) -> Floor:
    """The least time of parts that run one after the other."""
    spent = dict.fromkeys(BOUNDS, 0.0)
    for work in works:
        times = (work.bytes / copy_gb_per_s / 1e6, work.flops / tflop_per_s / 1e9)
        bound = max(zip(times, BOUNDS, strict=True))[1]
        spent[bound] += max(times)
    return Floor(sum(spent.values()), max(BOUNDS, key=lambda bound: spent[bound]))


def works(config: LlavaConfig, stage: str, *, batch: int, visual: int, text: int, size: int) -> list[Work]:
    """The parts of a stage.

    Parameters
    ----------
    config : LlavaConfig
        Of a model with a CLIP tower and a Llama. With fewer `visual` tokens than patches, the tower ends at the feature
        layer; transformers' own runs all layers.
    stage : str
        A name of `bench.e2e.STAGES`: "generate 32" makes 32 tokens.
    batch, visual, text : int
        Prompts, and the visual and the text tokens of each.
    size : int
        Bytes of an element.

    Raises
    ------
    ValueError
        For a stage that is not known.
    """
    vision, language = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    length = visual + text
    if stage.startswith("first token"):
        return [
            of for part in FIRST_TOKEN for of in works(config, part, batch=batch, visual=visual, text=text, size=size)
        ]
    if stage.startswith("generate"):
        first = works(config, "first token", batch=batch, visual=visual, text=text, size=size)
        return first + [_decode(language, batch, length + made, size) for made in range(int(stage.split()[-1]) - 1)]
    if stage == "vision":
        depth = vision.num_hidden_layers
        layers = depth if visual == patches else depth + 1 + config.vision_feature_layer
        return [_tower(vision, batch, patches, layers, size)]
    if stage == "selection":  # of three layers the keys, once; the kept tokens, read and written
        moved = batch * vision.hidden_size * (3 * (1 + patches) + 2 * visual)
        return [Work(size * moved, 6 * batch * (1 + patches) * vision.hidden_size)]
    if stage == "projector":
        wide, out = vision.hidden_size, language.hidden_size
        weights = wide * out + out * out
        return [Work(size * (weights + 2 * out), 2 * batch * visual * weights)]
    if stage == "prefill":
        return [_prefill(language, batch, length, size)]
    if stage == "decode":
        return [_decode(language, batch, length, size)]
    raise ValueError(f"no stage is called {stage!r}; the stages are those of bench.e2e.STAGES")


def _tower(config: CLIPVisionConfig, batch: int, patches: int, layers: int, size: int) -> Work:
    width, inner, tokens = config.hidden_size, config.intermediate_size, 1 + patches
    conv = 3 * config.patch_size**2 * width
    layer = 4 * width**2 + 2 * width * inner
    vectors = 9 * width + inner  # biases and normalisations of a layer
    weights = conv + (tokens + 3) * width + layers * (layer + vectors)  # [CLS], positions, the first normalisation
    flops = 2 * (patches * conv + tokens * layers * layer) + 4 * layers * tokens**2 * width
    return Work(size * weights, batch * flops)


def _llama(config: LlamaConfig) -> tuple[int, int, int]:
    """Weights of the layers' matrices, other weights, and elements of the KV cache for one token."""
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    layer = 2 * width**2 + 3 * width * config.intermediate_size
    matrices = config.num_hidden_layers * layer + cached * width
    return matrices, (2 * config.num_hidden_layers + 1) * width, cached


def _prefill(config: LlamaConfig, batch: int, length: int, size: int) -> Work:
    """A causal pass that fills the cache, and the logits of the last token."""
    matrices, vectors, cached = _llama(config)
    head = config.hidden_size * config.vocab_size
    attention = 2 * config.num_hidden_layers * length * (length + 1) * config.hidden_size
    moved = matrices + vectors + head + batch * length * cached
    return Work(size * moved, batch * (2 * (length * matrices + head) + attention))


def _decode(config: LlamaConfig, batch: int, length: int, size: int) -> Work:
    """One token on top of `length` tokens of the cache."""
    matrices, vectors, cached = _llama(config)
    head = config.hidden_size * config.vocab_size
    attention = 4 * config.num_hidden_layers * (length + 1) * config.hidden_size
    moved = matrices + vectors + head + batch * (length + 1) * cached
    return Work(size * moved, batch * (2 * (matrices + head) + attention))

"""Arguments that the stock models take, VTC takes too, and the same way; what it refuses, it refuses by name."""

import numpy as np
import pytest
import torch
from support import models
from support.models import GRID, IMAGE, TOKENS, TOWERS, build, ids, images

import vtc

SIDE = 14 * GRID
BIG = 14 * 8  # 8 x 8 patches


def tiled(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and image_sizes of two images of LLaVA-NeXT: 1 x 2 tiles, and 3 x 1."""
    views = images(7, seed)
    return torch.stack([torch.cat([views[:3], views[:1] * 0]), views[3:]]), torch.tensor([[60, 130], [250, 80]])


@pytest.mark.supported("Arguments", "`image_sizes` as a tensor, an array, a list or tuples")
@pytest.mark.parametrize(
    "convert",
    [
        lambda sizes: sizes.tolist(),
        lambda sizes: [tuple(size) for size in sizes.tolist()],
        lambda sizes: tuple(sizes.tolist()),
        lambda sizes: sizes.numpy(),
        lambda sizes: list(sizes),
        lambda sizes: list(sizes.numpy()),
        lambda sizes: sizes.int(),
    ],
)
@pytest.mark.parametrize("keep", [9, None])
def test_image_sizes_come_as_tensor_array_or_list(convert, keep):
    model = build(family="llava_next")
    pixels, sizes = tiled()
    stock = model.get_image_features(pixels, convert(sizes)).pooler_output
    vtc.enable(model, **({"ratio": 1.0} if keep is None else {"keep": keep}))
    expected = stock if keep is None else model.get_image_features(pixels, sizes).pooler_output
    prompt = {"input_ids": torch.tensor([[1, *[IMAGE] * sum(map(len, stock)), 5]]), "pixel_values": pixels}
    for got, want in zip(model.get_image_features(pixels, convert(sizes)).pooler_output, expected, strict=True):
        assert torch.equal(got, want)
    with torch.no_grad():
        logits = model(**prompt, image_sizes=convert(sizes)).logits
        assert torch.equal(logits, model(**prompt, image_sizes=sizes).logits)


@pytest.mark.parametrize(
    "sizes",
    [(60, 130), [[60, 130, 3], [250, 80, 3]], [[60, 130], [250]], [], 60, "60x130", [[60, 130], [0, 80]], [None, None]],
)
def test_image_sizes_of_another_shape_are_refused(sizes):
    model = build(family="llava_next")
    vtc.enable(model, keep=9)
    with pytest.raises(
        ValueError, match=r"image_sizes must be the \(height, width\) of each image, \[images, 2\].*got"
    ):
        model.get_image_features(tiled()[0], sizes)


def features(model, pixels, **more):
    return torch.stack(list(model.get_image_features(pixels, interpolate_pos_encoding=True, **more).pooler_output))


def sized(count: int, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(images(count), (height, width), mode="bilinear")


@pytest.mark.supported("Arguments", "`interpolate_pos_encoding` and images of another size")
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(("height", "width"), [(BIG, BIG), (56, 56), (56, 98), (90, 90)])
def test_images_of_another_size_are_interpolated_as_in_the_stock_model(tower, height, width):
    strategy = "full" if tower == "siglip_vision_model" else "default"
    model, pixels = build(tower=tower, vision_feature_select_strategy=strategy), sized(2, height, width)
    stock = features(model, pixels)
    count = stock.shape[1]
    assert count - (2 if "registers" in tower else 0) == (height // 14) * (width // 14)
    method = {"method": "random"} if strategy == "full" else {}
    vtc.enable(model, ratio=1.0, **method)
    assert torch.equal(features(model, pixels), stock)
    vtc.configure(model, keep=5)
    kept = features(model, pixels)
    assert kept.shape[1] == 5
    for few, all_ in zip(kept, stock, strict=True):  # five different rows of the stock features
        near = torch.cdist(few, all_, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert near.values.max() < 1e-3
        assert len(set(near.indices.tolist())) == 5
        assert near.indices.tolist() == sorted(near.indices.tolist())


@torch.no_grad()
def test_the_patches_of_a_larger_image_are_those_that_its_cls_token_attends_to():
    model, pixels = build(), sized(2, 56, BIG)
    eager = build()
    eager.set_attn_implementation("eager")
    seen = eager.model.vision_tower(pixels, interpolate_pos_encoding=True, output_attentions=True).attentions
    scores = sum(seen[layer][:, :, 0, 1:].mean(1) for layer in (2, 3, 4))
    expected = scores.topk(7).indices.sort(1).values
    stock = features(model, pixels)
    vtc.enable(model, keep=7)
    wanted = stock.gather(1, expected[..., None].expand(-1, -1, stock.shape[2]))
    assert torch.allclose(features(model, pixels), wanted, atol=1e-4)


@torch.no_grad()
def test_forward_interpolates_as_get_image_features():
    """The stock forward() does so, too, but not in transformers 5.23, which refuses the image."""
    model, pixels = build(), sized(2, BIG, BIG)
    row = [1, *[IMAGE] * 64, 5, 6]
    call = {"input_ids": torch.tensor([row, row]), "pixel_values": pixels, "interpolate_pos_encoding": True}

    def last_logits():
        embeds = model.get_input_embeddings()(torch.tensor([[1, 5, 6]] * 2))
        prompt = torch.cat([embeds[:, :1], features(model, pixels), embeds[:, 1:]], 1)
        return model(inputs_embeds=prompt).logits[:, -1]

    stock = last_logits()
    vtc.enable(model, ratio=1.0)
    assert torch.allclose(model(**call).logits[:, -1], stock, atol=1e-4)
    vtc.configure(model, keep=5)
    short = last_logits()
    assert not torch.allclose(short, stock, atol=1e-2)
    assert torch.allclose(model(**call).logits[:, -1], short, atol=1e-4)


def test_generate_refuses_what_the_stock_model_refuses():
    model = build()
    call = {**models.batch([ids(3, "image", 5)]), "pixel_values": images(1), "max_new_tokens": 2}
    for mode in ("stock", "vtc"):
        if mode == "vtc":
            vtc.enable(model, keep=9)
        for extra in ("interpolate_pos_encoding", "nonsense"):
            with pytest.raises(ValueError, match=rf"not used by the model: \['{extra}'\]"):
                model.generate(**call, **{extra: True})


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model", "vit"])
def test_images_of_another_size_are_refused_where_the_stock_model_refuses_them(tower):
    strategy = "full" if tower == "siglip_vision_model" else "default"
    model = build(tower=tower, vision_feature_select_strategy=strategy)
    with pytest.raises((ValueError, RuntimeError)):
        model.get_image_features(sized(1, BIG, BIG))
    vtc.enable(model, keep=5, method="random")
    says = "images of 112 x 112 pixels do not fit the vision tower, which takes 84; .*interpolate_pos_encoding=True"
    for call in (model.get_image_features, lambda pixels: vtc.select(model, pixels)):
        with pytest.raises(ValueError, match=says):
            call(sized(1, BIG, BIG))
    with pytest.raises(ValueError, match="hold no visual token"):
        model.get_image_features(torch.zeros(1, 3, 10, 10), interpolate_pos_encoding=True)


@pytest.mark.refused("tiles and frames of another size than the tower's", instead="use the model's processor")
def test_tiles_and_frames_of_another_size():
    model = build(family="llava_next_video")
    pixels, sizes = tiled()
    larger = torch.nn.functional.interpolate(pixels.flatten(0, 1), (BIG, BIG)).unflatten(0, pixels.shape[:2])
    videos = sized(2, BIG, BIG)[None]
    for call in (model.get_image_features, model.model.get_image_features):
        with pytest.raises(RuntimeError):
            call(larger, sizes, interpolate_pos_encoding=True)
    stock = model.get_video_features(videos, interpolate_pos_encoding=True).pooler_output
    vtc.enable(model, ratio=1.0)
    with pytest.raises(
        ValueError, match="tiles of 112 x 112 pixels do not fit LLaVA-NeXT-Video, which puts tiles of 84"
    ):
        model.get_image_features(larger, sizes, interpolate_pos_encoding=True)
    assert torch.equal(model.get_video_features(videos, interpolate_pos_encoding=True).pooler_output, stock)
    vtc.configure(model, keep=5)
    assert model.get_video_features(videos, interpolate_pos_encoding=True).pooler_output.shape[1] == 10
    with pytest.raises(ValueError, match=r"frames must be square, .* 4 rows and 8 columns"):
        model.get_video_features(sized(2, 56, BIG)[None], interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("family", "make", "says"),
    [
        ("llava", lambda p: list(p), r"pixel_values must be \[images, 3, height, width\], got a list"),
        ("llava", lambda p: p.numpy(), "got a ndarray; .*return_tensors='pt'"),
        ("llava", lambda p: p.movedim(1, -1), r"got shape \(2, 84, 84, 3\)"),
        ("llava", lambda p: p[:, :1], r"got shape \(2, 1, 84, 84\)"),
        ("vipllava", lambda p: p[0], r"got shape \(3, 84, 84\)"),
        ("llava", lambda p: p[:0], "holds no image; leave it out"),
        (
            "llava_next",
            lambda p: p[0],
            r"\[images, tiles, 3, height, width\] or \[tiles, 3, height, width\], got shape",
        ),
    ],
)
def test_pixels_of_another_kind_are_refused_by_shape(family, make, says):
    model = build(family=family)
    vtc.enable(model, keep=9)
    more = {"image_sizes": [[60, 130]]} if family == "llava_next" else {}
    with pytest.raises(ValueError, match=says):
        model.get_image_features(make(images(2)), **more)
    with pytest.raises(ValueError, match=says):
        model.generate(torch.tensor([ids("image", "image", 3)]), pixel_values=make(images(2)), **more)


@pytest.mark.refused("a batch without images that has `pixel_values`", instead="leave them out")
def test_an_empty_batch_is_refused():
    model = build()
    vtc.enable(model, keep=9)
    none = torch.zeros((0, 5), dtype=torch.int64)
    for call in (model.forward, model.generate):
        with pytest.raises(ValueError, match=r"input_ids of shape \[0, 5\] holds no prompt; pass one"):
            call(input_ids=none, attention_mask=none, pixel_values=images(1)[:0])


@pytest.mark.supported("Arguments", "pixels of another dtype")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_pixels_of_another_dtype_are_cast_as_by_the_stock_model(dtype):
    model, pixels = build(), (images(2) * 9).to(dtype)
    stock = torch.stack(list(model.get_image_features(pixels).pooler_output))
    vtc.enable(model, keep=TOKENS)
    assert torch.equal(torch.stack(list(model.get_image_features(pixels).pooler_output)), stock)


@pytest.mark.parametrize("layer", [-3, [-3], (-3,), np.int64(-3), torch.tensor(-3), [np.int64(-3)]])
def test_the_feature_layer_of_a_call_is_an_integer_of_any_kind(layer):
    model, pixels = build(), images(2)
    stock = torch.stack(list(model.get_image_features(pixels, -3).pooler_output))
    vtc.enable(model, keep=TOKENS)
    assert torch.equal(torch.stack(list(model.get_image_features(pixels, layer).pooler_output)), stock)


@pytest.mark.parametrize("layer", ["-2", -2.0, [], [None], [-2, -3], 0, 99])
def test_a_feature_layer_that_does_not_exist_is_refused(layer):
    model = build()
    vtc.enable(model, keep=9)
    with pytest.raises(ValueError, match="vision_feature_layer"):
        model.get_image_features(images(1), layer)


@pytest.mark.parametrize("limit", [20, 1 + 3 + TOKENS + 5])
def test_max_length_within_the_prompt_is_refused_with_the_callers_numbers(limit):
    model = build()
    call = {**models.batch([ids(3, "image", 5)]), "pixel_values": images(1), "max_length": limit}
    with pytest.raises(ValueError, match=f"is 45, but `max_length` is set to {limit}"):
        model.generate(**call)
    vtc.enable(model, keep=9)
    with pytest.raises(ValueError, match=f"max_length={limit}, but the prompt has 45 tokens"):
        model.generate(**call)
    assert model.generate(**call, max_new_tokens=2).shape[1] == 47
    assert model.generate(**call | {"max_length": 46}).shape[1] == 46
    with pytest.raises(ValueError, match="`max_new_tokens` must be greater than 0"):
        model.generate(**call, max_new_tokens=0)


def test_a_batch_of_no_prompts_is_refused(model):
    call = {"input_ids": torch.zeros(0, 9, dtype=torch.long), "pixel_values": models.images(1)}
    for run in (model.generate, model):
        for pixels in (models.images(1), models.images(0)):
            with pytest.raises(
                ValueError, match=r"input_ids of shape \[0, 9\] holds no prompt; pass one for the images"
            ):
                run(**call | {"pixel_values": pixels})

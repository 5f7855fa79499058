"""The prompts and the pixels: LLaVA-1.5's, token by token and pixel by pixel, and the checkpoint's own."""

import string
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import LlamaTokenizer, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vtc.eval.model import ModelSpec
from vtc.eval.protocol import SYSTEM, HFProtocol, LlavaProtocol, Prompt
from vtc.tiny.scenes import Scene

TEXT = "Is the red circle there?\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def processor(spec):
    return spec.processor()


@pytest.fixture(scope="module")
def config(spec):
    return spec.config()


@pytest.fixture(scope="module")
def llama(spec):
    """The processor with a tokenizer that treats spaces and unknown bytes as Llama's does."""
    processor = spec.processor()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += string.ascii_letters + string.digits + string.punctuation
    tokenizer = LlamaTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<unk>"})
    return LlavaProcessor(
        processor.image_processor,
        tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
    )


def picture(width, height, mode="RGB"):
    noise = torch.Generator().manual_seed(width)
    pixels = torch.randint(0, 256, (height, width, 3), generator=noise, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def test_llava_prompt_is_cut_at_the_image_and_each_piece_is_tokenised_alone(llama, config):
    protocol = LlavaProtocol(llama, config)
    ids = protocol.ids(Prompt(TEXT, [picture(8, 8)]))
    pieces = llama.tokenizer.convert_ids_to_tokens(ids)
    assert pieces[0] == "<s>"
    assert pieces.count("<s>") == 1
    first = pieces.index("<image>")
    assert "".join(pieces[1:first]).replace("▁", " ") == f" {SYSTEM} USER: "
    assert pieces[first - 2 : first] == [":", "▁"]
    assert pieces[first : first + 576] == ["<image>"] * 576
    after = pieces[first + 576 :]
    assert after[:2] == ["▁", "<0x0A>"]  # the slow tokenizer's space before the line break
    assert "".join(after).replace("▁", " ").replace("<0x0A>", "\n") == f" \n{TEXT} ASSISTANT:"


def test_llava_prompt_without_image_has_no_line_break_and_the_floor_no_visual_token(llama, config):
    text = llama.tokenizer.convert_ids_to_tokens(LlavaProtocol(llama, config).ids(Prompt(TEXT)))
    joined = "".join(text).replace("▁", " ").replace("<0x0A>", "\n")
    assert joined == f"<s> {SYSTEM} USER: {TEXT} ASSISTANT:"
    seen = LlavaProtocol(llama, config).ids(Prompt(TEXT, [picture(8, 8)]))
    blind = LlavaProtocol(llama, config, floor=True)
    image = llama.tokenizer.convert_tokens_to_ids("<image>")
    assert blind.ids(Prompt(TEXT, [picture(8, 8)])) == [token for token in seen if token != image]
    assert set(blind.prepare([Prompt(TEXT, [picture(8, 8)])])) == {"input_ids", "attention_mask"}


def test_long_prompts_are_cut_at_2048_tokens(llama, config):
    ids = LlavaProtocol(llama, config).ids(Prompt("x" * 3000, [picture(8, 8)]))
    assert len(ids) == 2048


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (50, 50), (500, 333), (337, 336)])
def test_llava_pads_to_a_square_as_transformers_processor_with_padding(processor, config, size):
    protocol = LlavaProtocol(processor, config)
    assert protocol.background == (122, 116, 104)
    ours = protocol.prepare([Prompt(TEXT, [picture(*size)])])["pixel_values"]
    side = {"height": 336, "width": 336}
    stock = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 336}, crop_size=side)
    theirs = stock(picture(*size), return_tensors="pt")["pixel_values"]
    assert ours.equal(theirs)
    square = protocol.padded(picture(40, 61))
    assert square.size == (61, 61)
    assert square.getpixel((9, 0)) == square.getpixel((51, 60)) == (122, 116, 104)
    assert square.crop((10, 0, 50, 61)).tobytes() == picture(40, 61).tobytes()


@pytest.mark.parametrize("mode", ["P", "L", "CMYK", "1", "RGBA"])
def test_an_image_is_converted_before_it_is_padded(processor, config, mode):
    """LLaVA pads some benchmarks' images in the mode of their file, where a palette's colours are lost."""
    image = picture(40, 60, mode)
    square = LlavaProtocol(processor, config).padded(image)
    assert square.crop((10, 0, 50, 60)).tobytes() == image.convert("RGB").tobytes()


def test_a_batch_is_padded_on_the_left_and_each_row_is_as_alone(llama, config):
    protocol = LlavaProtocol(llama, config)
    prompts = [Prompt("short", [picture(8, 9)]), Prompt(TEXT, [picture(9, 8)])]
    batch = protocol.prepare(prompts)
    for row, prompt in enumerate(prompts):
        alone = protocol.prepare([prompt])
        assert batch["input_ids"][row][batch["attention_mask"][row].bool()].equal(alone["input_ids"][0])
        assert batch["pixel_values"][row].equal(alone["pixel_values"][0])
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist())


def test_hf_protocol_is_the_checkpoints_template_and_processor(processor, config):
    image = Scene("test", 3).image.resize((400, 336))
    inputs = HFProtocol(processor, config).prepare([Prompt("what ?", [image])])
    want = processor(images=image, text="USER: <image>\nwhat ? ASSISTANT:", return_tensors="pt")
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert inputs[name].equal(want[name]), name
    blind = HFProtocol(processor, config, floor=True).prepare([Prompt("what ?", [image])])
    tokenizer = processor.tokenizer
    assert tokenizer.decode(blind["input_ids"][0]).split() == ["<s>", "user", ":", "what", "?", "assistant", ":"]
    assert "pixel_values" not in blind


def test_a_text_with_a_placeholder_is_refused(processor, config):
    for protocol in (LlavaProtocol, HFProtocol):
        with pytest.raises(ValueError, match="holds <image>, which stands for an image"):
            protocol(processor, config).prepare([Prompt("an <image> ?", [picture(8, 8)])])


def test_the_llava_protocol_is_for_llava_alone(processor):
    with pytest.raises(ValueError, match="'llava_next'; use --protocol hf"):
        LlavaProtocol(processor, SimpleNamespace(model_type="llava_next"))


def test_the_fingerprint_tells_protocols_and_image_processors_apart(llama, config):
    llava, hf = (protocol(llama, config).fingerprint() for protocol in (LlavaProtocol, HFProtocol))
    assert llava["protocol"] == "llava"
    assert hf["protocol"] == "hf"
    tokens = [llama.tokenizer.convert_ids_to_tokens(ids) for ids in llava["ids_around_image"]]
    assert tokens == [[":", "▁"], ["▁", "<0x0A>"]]
    llama.image_processor.do_center_crop = False
    assert LlavaProtocol(llama, config).fingerprint()["image_processor"] != llava["image_processor"]
    llama.image_processor.do_center_crop = True


def test_a_model_that_is_not_there_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no directory; pass a model directory or a hub id"):
        ModelSpec("./nowhere").config()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="of type 'bert', which is not supported; VTC supports llava "):
        ModelSpec(str(tmp_path)).config()

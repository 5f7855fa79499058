"""Log-probabilities of texts that follow a prompt, and prompts and messages as token ids.

Oracles: one pass of the stock model, and of the golden paths, over one unpadded prompt and its text.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from support.golden import llava as golden
from support.golden import prune as golden_prune

from vtc.eval.answerer import Answerer
from vtc.eval.model import ModelSpec
from vtc.eval.protocol import PROTOCOLS, SYSTEM, Prompt, Turn
from vtc.eval.setting import Setting
from vtc.tiny.scenes import balanced_questions

KEEP, PATCHES = 64, 576
SCENES = balanced_questions("test", 4)
IMAGES = [scene.image for scene, _ in SCENES]
TARGETS = (f" {SCENES[0][1].answer}", " no there is a red circle", " two", f" {SCENES[3][1].answer} yes")
SETTINGS = {
    "none": Setting(),
    "vtc-cls": Setting("vtc-cls", {"keep": KEEP}),
    "fastv": Setting("fastv", {"keep": KEEP, "kv": "compact"}),
}
names = pytest.mark.parametrize("name", ["llava", "hf"])


@pytest.fixture(scope="module")
def answerer():
    spec = ModelSpec()
    return Answerer(spec.load(), spec.processor())


@pytest.fixture(scope="module")
def eager(answerer):
    return golden.eager(answerer.model)


def protocol(name, answerer):
    return PROTOCOLS[name](answerer.processor, answerer.model.config)


def logits_alone(model, inputs, new, method):
    """Logits `[L', V]` of one prompt and the ids `new` after it, with the images' tokens that the method keeps."""
    row, pixels = inputs["input_ids"][0].tolist(), list(inputs["pixel_values"])
    if method == "none":
        ids = torch.tensor([row + new])
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]).logits[0]
    if method == "vtc-cls":
        depth = model.config.vision_config.num_hidden_layers + 1 + model.config.vision_feature_layer
        embeds, _ = golden.splice(model, row + new, pixels, KEEP, range(depth - 3, depth), PATCHES)
        return golden.logits(model, embeds)
    pruned = golden_prune.prompt(model, row, pixels, KEEP, range(1), PATCHES, "fastv", 2, compact=True)
    pruned.logits(pruned.embeds)  # the prompt alone decides
    return pruned.logits(pruned.after(new))


@pytest.mark.parametrize("method", SETTINGS)
@torch.no_grad()
def test_likelihoods_are_those_of_one_pass_over_the_prompt_and_the_text(method, answerer, eager):
    made = protocol("hf", answerer)
    prompts = [Prompt(question.text, [scene.image]) for scene, question in SCENES]
    targets = [made.continuation(prompt, target) for prompt, target in zip(prompts, TARGETS, strict=True)]
    tokenizer = answerer.processor.tokenizer
    assert targets == [tokenizer(target, add_special_tokens=False)["input_ids"] for target in TARGETS]
    found = answerer.log_likelihoods(made.prepare(prompts), SETTINGS[method], targets)
    for prompt, new, (value, greedy) in zip(prompts, targets, found, strict=True):
        logits = logits_alone(eager, made.prepare([prompt]), new, method)[-len(new) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).sum()
        golden.close(torch.tensor(value), expected)
        assert greedy == (logits.argmax(-1).tolist() == new)
    assert found[0][1]
    assert not found[1][1]


@torch.no_grad()
def test_likelihoods_of_texts_without_images(answerer, eager):
    made = protocol("hf", answerer)
    prompt = Prompt(SCENES[0][1].text)
    inputs, new = made.prepare([prompt]), made.continuation(prompt, TARGETS[1])
    ((value, _),) = answerer.log_likelihoods(inputs, SETTINGS["vtc-cls"], [new])
    ids = torch.tensor([inputs["input_ids"][0].tolist() + new])
    log_p = eager(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(new) - 1 : -1].log_softmax(-1)
    golden.close(torch.tensor(value), log_p.gather(1, torch.tensor(new)[:, None]).sum())


class Letters:
    """A tokenizer whose tokens are a space before any text, as Llama's, and the characters; "ab" is one."""

    image_token, chat_template = "<image>", None

    def tokenizer(self, text, add_special_tokens):
        return {"input_ids": list(f"{'^' * add_special_tokens} {text}".replace("ab", "&"))}


def test_a_continuation_is_what_a_text_adds_to_the_prompt():
    made = PROTOCOLS["hf"](Letters(), None)
    assert made.continuation(Prompt("x"), " yab") == [" ", "y", "&"]
    made.end = lambda prompt: "xa"
    assert made.continuation(Prompt("x"), "ba") == [" ", "b", "a"]
    with pytest.raises(ValueError, match="holds <image>, which stands for an image"):
        made.continuation(Prompt("x"), "<image>")


@names
def test_images_stand_where_the_text_has_them(name, answerer):
    made = protocol(name, answerer)
    inputs = made.prepare([Prompt("is <image> left of <image> ?", IMAGES[:2], placed=True)])
    ids = [token for token, _ in itertools.groupby(inputs["input_ids"][0].tolist())]
    before = f"{SYSTEM} USER:" if name == "llava" else "USER:"
    words = answerer.processor.tokenizer(f"{before} is <image> left of <image> ? ASSISTANT:")["input_ids"]
    assert ids == [token for token, _ in itertools.groupby(words)]
    assert inputs["pixel_values"].shape[0] == 2
    assert inputs["input_ids"].eq(answerer.model.config.image_token_id).sum() == 2 * PATCHES
    with pytest.raises(ValueError, match="holds <image> 2 times, and there are 1 images"):
        made.prepare([Prompt("is <image> left of <image> ?", IMAGES[:1], placed=True)])


def test_messages_go_through_the_chat_template(answerer):
    made = protocol("hf", answerer)
    turns = [
        Turn("system", ["be brief"]),
        Turn("user", ["what ?", IMAGES[0]]),
        Turn("assistant", ["yes"]),
        Turn("user", [IMAGES[1], "two"]),
    ]
    text = "SYSTEM: be brief USER: what ? <image>\nASSISTANT: yes USER: <image>\ntwo ASSISTANT:"
    assert made.chat(turns) == text
    expected = answerer.processor(text=[text], images=IMAGES[:2], return_tensors="pt")
    found = made.prepare_chats([turns])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    with pytest.raises(ValueError, match="holds <image>, which stands for an image"):
        made.chat([Turn("user", ["<image> ?"])])
    with pytest.raises(ValueError, match=r"add its chat_template\.jinja"):
        PROTOCOLS["hf"](SimpleNamespace(chat_template=None), None).chat(turns)


def test_images_are_resized_by_pillow(answerer):
    assert type(answerer.processor.image_processor).__name__.endswith("Pil")

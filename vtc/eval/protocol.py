"""How a question becomes a model's input: LLaVA-1.5's protocol to the letter, or the checkpoint's own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jinja2
import torch
from PIL import Image
from torch import Tensor

_log = logging.getLogger("vtc")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Prompt(NamedTuple):
    """What is asked in one turn: the images, then the text. Or, if `placed`, the text with each image where it stands.

    Attributes
    ----------
    text : str
    images : sequence of Image
    placed : bool
        The text holds one placeholder an image, in the order of the images.
    """

    text: str
    images: Sequence[Image.Image] = ()
    placed: bool = False


class Turn(NamedTuple):
    """One message of a chat: texts and images in the order in which they are said."""

    role: str
    content: Sequence[str | Image.Image]


class Protocol:
    """Prepares batches of prompts. It holds a processor, and can be sent to another process.

    Parameters
    ----------
    processor
        Of the model.
    config
        Of the model.
    floor : bool
        Leave the images and their visual tokens out. The text is that of the prompt with images.
    """

    name: ClassVar[str]

    def __init__(self, processor: Any, config: Any, floor: bool = False) -> None:
        self.processor, self.floor = processor, floor

    def prepare(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The model's inputs for a batch, padded on the left, on the CPU, pixels in fp32.

        Returns
        -------
        dict
            `input_ids` and `attention_mask` [B, L] int64; with images `pixel_values`, and what else the model's
            processor returns for them.
        """
        raise NotImplementedError

    def continuation(self, prompt: Prompt, text: str) -> list[int]:
        """The token ids of a text that follows the prompt, a space at its beginning included.

        They are what the text adds to the ids of the prompt. If its beginning and the prompt's end become one token,
        the text is tokenised alone.
        """
        self.require_text(text)
        end = self.end(prompt)
        before, both = self._tokens(end), self._tokens(end + text)
        return both[len(before) :] if both[: len(before)] == before else self._tokens(text)

    def end(self, prompt: Prompt) -> str:
        """The text of the prompt after its last image, from which the model goes on."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """What of it can change an answer."""
        images = self.processor.image_processor
        return {"protocol": self.name, "image_processor": f"{type(images).__name__} {images.to_json_string()}"}

    def require_text(self, text: str) -> None:
        """Raise ValueError if the text holds the placeholder of an image."""
        if self.processor.image_token in text:
            placeholder = self.processor.image_token
            raise ValueError(f"the text {text!r} holds {placeholder}, which stands for an image; leave it out")

    def texts(self, prompt: Prompt) -> list[str]:
        """What stands before, between and after the images. Raises ValueError if their number does not fit the text."""
        if not prompt.placed:
            self.require_text(prompt.text)
            return [*("" for _ in prompt.images), prompt.text]
        texts = prompt.text.split(self.processor.image_token)
        if len(texts) != len(prompt.images) + 1:
            raise ValueError(
                f"the text {prompt.text!r} holds {self.processor.image_token} {len(texts) - 1} times, and there are "
                f"{len(prompt.images)} images; give one image for each"
            )
        return texts

    def _tokens(self, text: str, first: bool = False) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=first)["input_ids"]
        return ids


class LlavaProtocol(Protocol):
    """LLaVA-1.5's: its system sentence, each image first, and images padded to a square.

    ::

        SYSTEM USER: <image>
        TEXT ASSISTANT:

    The prompt is cut at the images and each piece is tokenised alone, as in LLaVA. The visual tokens stand between the
    pieces. An image is converted to RGB and padded to a square with the mean colour of CLIP, (122, 116, 104), before
    the model's image processor resizes it. EXIF rotation is not applied. Sequences are cut at 2048 tokens.
    """

    name: ClassVar[str] = "llava"
    max_length: ClassVar[int] = 2048

    def __init__(self, processor: Any, config: Any, floor: bool = False) -> None:
        super().__init__(processor, config, floor)
        if config.model_type != "llava":
            raise ValueError(
                f"the protocol 'llava' is LLaVA-1.5's, and this model is of type {config.model_type!r}; use "
                "--protocol hf, its own template and processor"
            )
        tokenizer = processor.tokenizer
        self.image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
        sample = processor(images=Image.new("RGB", (8, 8)), text=processor.image_token)["input_ids"]
        self.num_visual = 0 if floor else torch.tensor(sample).flatten().tolist().count(self.image_id)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.background = tuple(int(255 * mean) for mean in processor.image_processor.image_mean)

    def prepare(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        rows = [self.ids(prompt) for prompt in prompts]
        length = max(map(len, rows))
        inputs = {
            "input_ids": torch.tensor([[self.pad_id] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }
        images = [self.padded(image) for prompt in prompts for image in prompt.images]
        if images and not self.floor:
            inputs["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return inputs

    def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of one prompt, its visual tokens included."""
        first, *others = self.pieces(prompt)
        ids = self._tokens(first, first=True)
        for piece in others:
            ids += [self.image_id] * self.num_visual + self._tokens(piece)
        return ids[: self.max_length]

    def pieces(self, prompt: Prompt) -> list[str]:
        """The prompt, cut at its images."""
        first, *others = self.texts(prompt)
        pieces = [f"{SYSTEM} USER: {first}", *(each if prompt.placed else f"\n{each}" for each in others)]
        return [*pieces[:-1], f"{pieces[-1]} ASSISTANT:"]

    def end(self, prompt: Prompt) -> str:
        return self.pieces(prompt)[-1]

    def padded(self, image: Image.Image) -> Image.Image:
        """The image on a square of the background colour."""
        image = image.convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), self.background)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def fingerprint(self) -> dict[str, Any]:
        # The ids around the image show how the tokenizer treats the pieces: … 29901 29871 | 29871 13 … with Llama's.
        first, second = self._tokens("USER: "), self._tokens("\nx")
        return {**super().fingerprint(), "system": SYSTEM, "ids_around_image": [first[-2:], second[:2]]}


class HFProtocol(Protocol):
    """The checkpoint's own: its chat template, if it has one, and its processor. No system sentence, no padding."""

    name: ClassVar[str] = "hf"

    def prepare(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return self._inputs(
            [self.text(prompt) for prompt in prompts], [image for prompt in prompts for image in prompt.images]
        )

    def prepare_chats(self, chats: Sequence[Sequence[Turn]]) -> dict[str, Tensor]:
        """As `prepare`, for messages of any number and role. Raises ValueError if there is no chat template."""
        images = [part for chat in chats for turn in chat for part in turn.content if not isinstance(part, str)]
        return self._inputs([self.chat(turns) for turns in chats], images)

    def _inputs(self, texts: list[str], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        images = [image.convert("RGB") for image in images]
        if self.floor:
            texts, images = [text.replace(self.processor.image_token, "") for text in texts], []
        self.processor.tokenizer.padding_side = "left"
        first = self.processor.tokenizer.bos_token
        special = first is None or not texts[0].startswith(first)  # a template may write it itself
        inputs = self.processor(
            images=images or None, text=texts, padding=True, return_tensors="pt", add_special_tokens=special
        )
        return dict(inputs)

    def text(self, prompt: Prompt) -> str:
        """The prompt as text, with one placeholder an image."""
        texts = self.texts(prompt)
        if not getattr(self.processor, "chat_template", None):
            placeholder = self.processor.image_token + ("" if prompt.placed else "\n")
            _say_no_template()
            return f"USER: {placeholder.join(texts)} ASSISTANT:"
        parts: list[str | Image.Image] = [texts[0]]
        for image, text in zip(prompt.images, texts[1:], strict=True):
            parts += [image, text]
        return self.chat([Turn("user", [part for part in parts if part != ""])])

    def chat(self, turns: Sequence[Turn]) -> str:
        """Messages as text, with one placeholder an image. Raises ValueError if there is no chat template."""
        if not getattr(self.processor, "chat_template", None):
            raise ValueError("messages need a chat template, and this model has none; add its chat_template.jinja")
        messages = []
        for turn in turns:
            content = []
            for part in turn.content:
                if isinstance(part, str):
                    self.require_text(part)
                content.append({"type": "text", "text": part} if isinstance(part, str) else {"type": "image"})
            messages.append({"role": turn.role, "content": content})
        try:
            text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the model's chat template cannot be used ({type(error).__name__}: {error}); use the "
                "chat_template.jinja of its authors"
            ) from error
        placeholders = sum(isinstance(part, Image.Image) for turn in turns for part in turn.content)
        if (found := text.count(self.processor.image_token)) != placeholders:
            raise ValueError(
                f"the model's chat template makes {found} {self.processor.image_token} for {placeholders} image(s); "
                "use the chat_template.jinja of its authors"
            )
        return text

    def end(self, prompt: Prompt) -> str:
        return self.text(prompt).rpartition(self.processor.image_token)[2]

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "chat_template": getattr(self.processor, "chat_template", None)}


@functools.cache
def _say_no_template() -> None:
    _log.warning("the model has no chat template: prompts are LLaVA-1.5's, USER: ... ASSISTANT:")


PROTOCOLS: dict[str, type[Protocol]] = {each.name: each for each in (LlavaProtocol, HFProtocol)}

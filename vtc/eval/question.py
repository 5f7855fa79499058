"""One question of a benchmark, its image, and a model's answer."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vtc.images import ImageError

if TYPE_CHECKING:
    from PIL import Image


class ImageSource(Protocol):
    """Where an image comes from. It is decoded when it is needed, maybe in another process."""

    def open(self) -> Image.Image:
        """The decoded image in the mode of its file.

        Raises
        ------
        ImageError
            If it is missing or damaged.
        """


@dataclass(frozen=True)
class ImageFile:
    """An image in a file."""

    path: Path

    def open(self) -> Image.Image:
        if not self.path.is_file():
            raise ImageError(f"the image {self.path} does not exist; unpack the images that `vtc eval` asks for")
        return _decoded(self.path, str(self.path))


@dataclass(frozen=True)
class EncodedImage:
    """An image in a table, as base64 text."""

    data: str
    name: str  # where it stands, for errors

    def open(self) -> Image.Image:
        try:
            content = base64.b64decode(self.data, validate=True)
        except ValueError as error:  # binascii.Error, or characters that are not ASCII
            raise ImageError(f"{self.name} is no image in base64 ({error}); download the file again") from error
        return _decoded(io.BytesIO(content), self.name)


def _decoded(file: Path | io.BytesIO, name: str) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image
    except Exception as error:  # on a damaged file Pillow's decoders raise anything from OSError to IndexError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"the image {name} cannot be decoded ({reason}); copy or download it again") from error


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes
    ----------
    line : int
        Its number in the question file, from 0. Answers are stored under it: ids are not unique in some benchmarks.
    id : str or int
        The benchmark's own id, in the type that its files have.
    text : str
        What the user says, with the task's last line and without the image.
    image : ImageSource, optional
    unit : int, optional
        Questions with the same unit are scored together, as the passes of MMBench. By default each is its own.
    """

    line: int
    id: str | int
    text: str
    image: ImageSource | None
    unit: int | None = None


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question, and what it cost.

    Attributes
    ----------
    line : int
        The question's.
    text : str
        Without special tokens and without white space around it.
    visual_tokens : float, optional
        Kept of its image, the mean over the batch. None without an image.
    prompt_tokens : int
        Of the caller's prompt, all visual tokens included.
    new_tokens : int
        Up to and with the end-of-sequence token.
    batch : int
        Questions that were answered at once.
    generate_seconds : float
        From the prepared inputs on the device to the last token on the host, of the batch, divided by `batch`.
    prepare_seconds : float
        Reading and preparing the image and the prompt, of the batch, divided by `batch`; it may overlap generation.
    skipped : str, optional
        Why it was not asked: its image cannot be read. `text` is then empty.
    token_layers : float, optional
        Visual tokens of its image, averaged over the layers of the language model; see `vtc.config.token_layers`. None
        without an image, and in journals from before it was noted.
    """

    line: int
    text: str
    visual_tokens: float | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    batch: int = 1
    generate_seconds: float = 0.0
    prepare_seconds: float = 0.0
    skipped: str | None = None
    token_layers: float | None = None

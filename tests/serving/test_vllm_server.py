"""The OpenAI server with VTC, and a client on the loopback address."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from engines import references
from PIL import Image
from transformers import AutoProcessor

from vtc import tiny
from vtc.tiny.scenes import Scene

QUESTION = "how many objects are there ?"
TEXT = 11  # tokens of a prompt besides those of its image


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny.CHECKPOINT)]
    command += ["--served-model-name", "llava", "--hf-overrides.vtc.keep", "64", "--trust-request-mm-kwargs"]
    command += ["--limit-mm-per-prompt.image", "4", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    command += ["--block-size", "32", "--host", "127.0.0.1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as file:
        running = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(240):
            if running.poll() is not None:
                raise RuntimeError(f"the server ended:\n{log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        client.log = log
        yield client
    finally:
        running.terminate()
        running.wait(60)


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def asked(*images: bytes, question: str = QUESTION) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": url(data)}} for data in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def ask(client: openai.OpenAI, messages: list[dict], settings: object = None, **given: object):
    body: dict = {"add_special_tokens": True}  # as in the reference; vLLM leaves <s> out of chats
    if settings is not None:
        body["mm_processor_kwargs"] = {"vtc": settings}
    how = {"temperature": 0, "max_tokens": 4, "extra_body": body, **given}
    return client.chat.completions.create(model="llava", messages=messages, **how)


def test_one_log_line_says_what_is_kept(server: openai.OpenAI) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "VTC: method" in line]
    assert len(lines) == 1
    assert "'vtc-cls' keeps 64 of 576 visual tokens" in lines[0]


@pytest.mark.parametrize("keep", [64, 32])
def test_answers_are_those_of_transformers(server: openai.OpenAI, keep: int, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny.CHECKPOINT)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    scenes, prompts = [Scene("test", number) for number in range(12)], []
    for number, scene in enumerate(scenes):
        scene.image.save(tmp_path / f"{number}.png")
        prompts.append({"text": text, "images": [str(tmp_path / f"{number}.png")]})
    (answers,) = references(tmp_path, [{"model": tiny.CHECKPOINT, "settings": {"keep": keep}, "prompts": prompts}])
    for scene, expected in zip(scenes, answers, strict=True):
        out = ask(server, asked(png(scene.image)), None if keep == 64 else {"keep": keep})
        answer = processor.decode(expected["ids"], skip_special_tokens=True)
        assert out.choices[0].message.content.strip() == answer.strip()
        assert out.usage.prompt_tokens == TEXT + keep


def test_several_images_and_streaming(server: openai.OpenAI) -> None:
    first, second = (png(Scene("test", number).image) for number in (1, 2))
    one, two = asked(first), asked(first, second)
    assert ask(server, two).usage.prompt_tokens == TEXT + 2 * 64
    parts = list(ask(server, one, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == ask(server, one).choices[0].message.content
    assert parts[-1].usage.prompt_tokens == TEXT + 64


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": 65}, "asks for 65 tokens of an image, and this engine reserves memory for 64"),
        ({"ratio": 0.5}, "asks for 288 tokens of an image, and this engine reserves memory for 64"),
        ({"keep": 600}, "an image of this model has only 576 visual tokens"),
        ({"keep": 0}, "keep must be"),
        ({"keep": "many"}, "keep must be"),
        ({"method": "random"}, "a request can set keep or ratio, got 'method'"),
        ({"kep": 3}, "a request can set keep or ratio, got 'kep'"),
        (64, "must be names and values"),
    ],
)
def test_bad_settings_are_answered_and_the_server_goes_on(server: openai.OpenAI, settings: object, says: str) -> None:
    messages = asked(png(Scene("test", 1).image))
    with pytest.raises(openai.BadRequestError, match=says):
        ask(server, messages, settings)
    assert ask(server, messages).usage.prompt_tokens == TEXT + 64


@pytest.mark.parametrize("data", [b"no image", png(Image.new("RGB", (40, 40)))[:60]], ids=["text", "truncated"])
def test_an_image_that_cannot_be_read(server: openai.OpenAI, data: bytes) -> None:
    with pytest.raises(openai.BadRequestError, match="Failed to load image: "):  # vLLM's: VTC does not see it
        ask(server, asked(data))
    assert ask(server, asked(png(Scene("test", 1).image))).usage.prompt_tokens == TEXT + 64

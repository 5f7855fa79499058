"""The page in a real browser: what it shows is what the API gives, and nothing leaves the machine."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.cli import BYTES, LAYERS, WIDTH

import vtc
from vtc.tiny.scenes import Scene
from vtc.ui.examples import EXAMPLES

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'vtc-cls[ui]'")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
if BROWSER is None:
    pytest.skip("there is no chromium or google-chrome on PATH", allow_module_level=True)

WAIT = 60_000  # ms, at most; an answer takes about a second
COUNTING = "how many objects are there ?"


class Server:
    """`vtc ui` in a process whose temporary files and working directory are watched."""

    def __init__(self, folder: Path) -> None:
        self.temporary, self.directory = folder / "tmp", folder / "cwd"
        for each in (self.temporary, self.directory, folder / "home"):  # home: for the caches of matplotlib
            each.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"TMPDIR": str(self.temporary), "HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        environment["HTTP_PROXY"] = environment["http_proxy"] = "http://127.0.0.1:9"  # it must not ask a proxy
        command = [sys.executable, "-m", "vtc.cli", "ui", "--no-open", "--device", "cpu", "--port", str(port)]
        # Not the terminal's group, whose Ctrl-C is for the tests.
        self.stderr = folder / "stderr"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stderr=stderr, start_new_session=True
            )
        self.address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 120
        while "\n" not in self.stderr.read_text() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def stop(self, name: int) -> str:
        """Send a signal, and return what the process says from then on."""
        before = len(self.stderr.read_text())
        self.process.send_signal(name)
        self.process.wait(timeout=60)
        return self.stderr.read_text()[before:]


def running_server(folder):
    server = Server(folder)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    yield from running_server(tmp_path_factory.mktemp("server"))


@pytest.fixture
def own_server(tmp_path):
    """For a test that ends it."""
    yield from running_server(tmp_path)


@pytest.fixture(scope="module")  # its event loop runs in this thread, where no other test could have one
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """One browser context on the page."""

    def __init__(self, browser, address: str) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.asked, self.errors = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.locator("#ask").wait_for()

    def untimed(self) -> None:
        self.page.get_by_role("button", name="More").click()
        self.page.get_by_label("Measure time to first token").uncheck()

    def upload(self, file) -> None:
        remove = self.page.get_by_label("Remove Image")
        if remove.count():
            remove.click()
        self.page.locator("#image input[type=file]").set_input_files(file)

    def choose(self, name: str, method: str) -> None:
        self.page.locator(f"#{name} input").click()
        self.page.get_by_role("option", name=method, exact=True).click()
        playwright.expect(self.page.get_by_role("option")).to_have_count(0)  # the list is closed

    def slide(self, name: str, keep: int) -> None:
        self.page.locator(f"#{name} input[type=range]").fill(str(keep))

    def press(self, question: str | None = None) -> None:
        if question is not None:
            self.page.locator("#question textarea").fill(question)
        self.page.locator("#ask").click()

    def await_card(self, number: int, *texts: str) -> str:
        card = self.page.locator(f"#card-{number}")
        for text in texts:
            playwright.expect(card).to_contain_text(text, timeout=WAIT)
        return card.inner_text()

    def answer(self, number: int) -> str:
        return self.page.locator(f"#card-{number} .vtc-answer > span").first.inner_text()

    def picture(self, name: str) -> np.ndarray:
        """The pixels that the browser shows, fetched again."""
        image = self.page.locator(f"#{name} img")
        image.wait_for()
        body = self.context.request.get(image.get_attribute("src")).body()
        return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


@pytest.fixture
def visitor(server, browser):
    visitor = Visitor(browser, server.address)
    yield visitor
    visitor.context.close()
    assert visitor.errors == []
    assert [url for url in visitor.asked if not url.startswith((server.address, "data:", "blob:"))] == []


def png(image) -> dict:
    data = io.BytesIO()
    image.save(data, "PNG")
    return {"name": "mine.png", "mimeType": "image/png", "buffer": data.getvalue()}


def of_api(comparison, image, question, **options):
    """The answer, the overlay and the heat map of the public functions."""
    model, processor = comparison.answerer.model, comparison.answerer.processor
    inputs = processor(images=image, text=vtc.tiny.prompt(question), return_tensors="pt")
    with vtc.compress(model, **options):
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    selection = vtc.select(model, inputs, **options)
    return text, selection, vtc.overlay(image, selection), vtc.heatmap(image, selection)


def test_an_uploaded_image_is_answered_and_drawn_as_the_api_does(visitor, comparison):
    scene = Scene("test", 3)
    question = "what colour is the square ?"
    visitor.upload(png(scene.image))
    visitor.slide("keep", 48)
    visitor.press(question)
    full = visitor.await_card(0, "576 of 576", "KV cache", "MiB")
    short = visitor.await_card(1, "48 of 576", "%)")
    text, selection, overlay, heatmap = of_api(comparison, scene.image, question, method="vtc-cls", keep=48)
    assert visitor.answer(0) == of_api(comparison, scene.image, question, keep=576)[0]
    assert visitor.answer(1) == text
    assert selection.indices.shape == (1, 48)
    assert np.array_equal(visitor.picture("kept-1"), overlay)
    assert np.array_equal(visitor.picture("scores-1"), heatmap)
    assert np.array_equal(visitor.picture("kept-0"), scene.image.resize((672, 672), Image.Resampling.BICUBIC))
    prompt = len(comparison.answerer.processor.tokenizer(vtc.tiny.prompt(question))["input_ids"]) - 1
    for card, tokens in ((full, 576), (short, 48)):
        size = (prompt + tokens) * LAYERS * 2 * WIDTH * BYTES
        assert f"{size / 2**20:.2f}\xa0MiB" in card
        assert re.search(r"\d+\xa0ms \(\d+ to \d+\)", card)
    assert "cpu, float32, 1 thread, from pixels to token" in visitor.page.locator("#footnote").inner_text()
    assert "right" not in full + short  # whose scene it is is not known
    assert not visitor.page.locator("#truth").is_visible()


def test_two_methods_are_compared_on_an_example_whose_truth_is_told(visitor, comparison):
    example = EXAMPLES[2]
    visitor.untimed()
    visitor.choose("second", "fastv")
    visitor.slide("second-keep", 24)
    visitor.page.locator("#examples button, #examples .gallery-item").nth(2).click()
    visitor.await_card(1, "128 of 576")
    visitor.await_card(2, "24 of 576", "All tokens pass the first 2 layers.")
    assert visitor.page.locator("#question textarea").input_value() == example.question
    playwright.expect(visitor.page.locator("#truth")).to_contain_text(f"{example.truth} Right answer: circle.")
    for number, options in ((1, {"method": "vtc-cls", "keep": 128}), (2, {"method": "fastv", "keep": 24})):
        text, _, overlay, heatmap = of_api(comparison, example.scene.image, example.question, **options)
        assert visitor.answer(number) == text
        assert ("right" if text == "circle" else "wrong") in visitor.await_card(number)
        assert np.array_equal(visitor.picture(f"kept-{number}"), overlay)
        assert np.array_equal(visitor.picture(f"scores-{number}"), heatmap)

    # A method that counts for itself, and one that draws nothing.
    visitor.choose("method", "prumerge")
    playwright.expect(visitor.page.locator("#keep input[type=range]")).to_be_disabled()
    playwright.expect(visitor.page.locator("#keep")).to_contain_text("prumerge chooses how many")
    visitor.choose("second", "pool")
    visitor.slide("second-keep", 36)
    visitor.press()
    visitor.await_card(1, "prumerge", "of the tokens are patches")
    visitor.await_card(2, "36 of 576", "No patches to draw")
    playwright.expect(visitor.page.locator("#scores-2")).to_be_hidden()
    visitor.choose("second", "none")
    visitor.press("is this a flower ?")
    playwright.expect(visitor.page.locator("#column-2")).to_be_hidden(timeout=WAIT)
    playwright.expect(visitor.page.locator("#status")).to_contain_text("The model does not know: this flower")


def damaged_png() -> bytes:
    return png(Scene("test", 3).image)["buffer"][:5000]


def test_a_bad_file_is_one_line_and_the_page_goes_on(visitor, comparison, tmp_path):
    visitor.untimed()
    bad = {
        "words.png": (b"this is no image", "words.png is not an image"),
        "drawing.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "drawing.png is PostScript (EPS)"),
        "cut.png": (damaged_png(), "cut.png is damaged or truncated"),
        "empty.png": (b"", "empty.png is empty (0 bytes)"),
        "<b>bold<b>.png": (b"this is no image", "is not an image"),
    }
    body = visitor.page.locator("body")
    for name, (content, message) in bad.items():
        visitor.upload({"name": name, "mimeType": "image/png", "buffer": content})
        playwright.expect(visitor.page.locator("#bad")).to_contain_text(message, timeout=WAIT)
        assert "/vtc-ui-" not in body.inner_text()
    visitor.press()
    playwright.expect(visitor.page.locator("#status")).to_contain_text(message, timeout=WAIT)
    assert visitor.page.locator("#column-0").is_hidden()
    assert visitor.page.locator("#bad b, #status b").count() == 0
    assert not {"Traceback", "/vtc-ui-"} & set(re.findall(r"Traceback|/vtc-ui-", body.inner_text()))

    large = tmp_path / "large.png"
    large.write_bytes(bytes(20 * 2**20 + 1))
    visitor.upload(large)
    playwright.expect(visitor.page.get_by_text("exceed the maximum allowed size of 20")).to_be_visible()
    visitor.press(COUNTING)
    playwright.expect(visitor.page.locator("#status")).to_contain_text("there is no image; upload", timeout=WAIT)
    visitor.upload(png(Scene("test", 3).image))
    visitor.press(" ")
    playwright.expect(visitor.page.locator("#status")).to_contain_text("the question is empty", timeout=WAIT)
    visitor.press(COUNTING)
    visitor.await_card(1, "128 of 576")
    assert visitor.answer(0) == "3"


def test_two_visitors_at_once_see_their_own(server, browser, comparison):
    settings = [
        (Scene("test", 9), "what colour is the heart ?", "vtc-cls", 40),
        (Scene("test", 24), "what colour is the triangle ?", "random", 90),
    ]
    visitors = [Visitor(browser, server.address) for _ in settings]
    for visitor, (scene, _, method, keep) in zip(visitors, settings, strict=True):
        visitor.untimed()
        visitor.upload(png(scene.image))
        if method != "vtc-cls":
            visitor.choose("method", method)
        visitor.slide("keep", keep)
    for visitor, (_, question, _, _) in zip(visitors, settings, strict=True):
        visitor.press(question)
    for visitor, (scene, question, method, keep) in zip(visitors, settings, strict=True):
        text, _, overlay, _ = of_api(comparison, scene.image, question, method=method, keep=keep)
        visitor.await_card(1, method, f"{keep} of 576")
        assert visitor.answer(1) == text
        assert np.array_equal(visitor.picture("kept-1"), overlay)
    for visitor in visitors:
        visitor.context.close()


def status_of(address: str, body: dict | None = None, **headers: str) -> int:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_other_files_and_other_routes_are_refused(server, visitor):
    secret = server.directory / "secret.png"
    Scene("test", 0).image.save(secret)
    for path in ("/etc/passwd", str(secret), f"{server.temporary}/../cwd/secret.png"):
        assert status_of(f"{server.address}gradio_api/file={path}") == 403
    shown = visitor.page.locator("#image img").get_attribute("src")
    assert status_of(shown) == 200
    assert status_of(shown, Host="example.com") == 403
    for route in ("info", "openapi.json", "run/answer", "file=http://127.0.0.1/x", "proxy=http://127.0.0.1/"):
        assert status_of(f"{server.address}gradio_api/{route}") == 404

    # The page's own request, with another file in it: the file is not copied to where it can be read.
    config = json.loads(visitor.context.request.get(f"{server.address}config").body())
    look = next(each for each in config["dependencies"] if each["api_name"].startswith("look"))
    metas = ({"_type": "gradio.FileData"}, {}, {"_type": "x"}, None)  # without this mark gradio checks no path
    paths = (str(secret), "secret.png", "/no/such/file.png", f"{server.temporary}/../cwd/secret.png")
    said = set()
    for number, (meta, path) in enumerate(itertools.product(metas, paths)):
        file = {"path": path, "meta": meta, "orig_name": "secret.png"}
        join = {"data": [file, COUNTING], "fn_index": look["id"], "session_hash": f"abcdef{number:02}"}
        assert status_of(f"{server.address}gradio_api/queue/join", join) == 200
        address = f"{server.address}gradio_api/queue/data?session_hash={join['session_hash']}"
        data = visitor.context.request.get(address).text()
        assert "The scene" not in data
        if meta != metas[0]:
            said |= set(re.findall(r"this file was not uploaded here|does not exist|is no", data))
    assert said == {"this file was not uploaded here"}
    assert list(server.temporary.rglob("secret*")) == []
    assert status_of(f"{server.address}gradio_api/queue/join", join, Origin="http://localhost:1234") == 403
    assert status_of(f"{server.address}gradio_api/queue/join", join, Origin=server.address.rstrip("/")) == 200
    file["path"] = "https://example.com/x.png"
    assert status_of(f"{server.address}gradio_api/queue/join", join) == 403
    secret.unlink()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_ctrl_c_ends_it_quietly_and_leaves_nothing(own_server, browser):
    """In the middle of an answer."""
    server, visitor = own_server, Visitor(browser, own_server.address)
    assert server.stderr.read_text().startswith(f"{server.address} shows the page; Ctrl-C ends it\n")
    assert {file.relative_to(server.temporary).parts[0][:7] for file in files(server.temporary)} == {"vtc-ui-"}
    visitor.choose("second", "random")
    visitor.press(COUNTING)
    visitor.await_card(0, "measuring")
    began = time.monotonic()
    assert server.stop(signal.SIGINT) == ""
    assert time.monotonic() - began < 30
    assert server.process.returncode == 0
    assert files(server.temporary) == files(server.directory) == []
    assert not list(server.temporary.glob("vtc-ui-*"))
    visitor.context.close()

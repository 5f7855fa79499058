"""Serve the page: on this machine only unless asked otherwise, from a folder that is removed at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtc.ui.compare import Comparison

MAX_UPLOAD = 20 * 2**20  # bytes
OVERHEAD = 2**20  # of a request around a file
NEEDED = re.compile(  # what the page asks for; gradio has many more routes
    r"/(config/?|theme\.css|favicon\.ico|manifest\.json|(static|assets|svelte)/.*|gradio_api/(startup-events|upload"
    r"|upload_progress|queue/join|queue/data|heartbeat/\w+|cancel|reset|file=(?!\w{2,}:).*))?"
)
UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
POLICY = (
    b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'; "
    b"form-action 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Gate:
    """ASGI middleware: refuses what the page does not need, and what another page asks for.

    It tells browsers to load nothing from elsewhere.

    Parameters
    ----------
    local : bool
        Refuse requests by a name that is not this machine's: a page of another site could reach the server by one.
    """

    def __init__(self, app: Any, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if not refusal and scope["path"] == JOIN:
            body = await _body(receive)
            refusal = (403, "files are uploaded, not fetched") if _has_url(body) else None
            receive = _replayed(body, receive)
        if refusal:
            status, text = refusal
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": text.encode()})
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        await self.app(scope, receive, sent)

    def refusal(self, scope: Any) -> tuple[int, str] | None:
        """Status and text of the answer to a request that is refused, or None."""
        headers = dict(scope["headers"])
        if self.local and not is_local(re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1"))):
            return 403, "this page is served to this machine only"
        if (origin := headers.get(b"origin")) is not None and not self._is_own(origin, headers):
            return 403, "this page answers to itself only"
        if not NEEDED.fullmatch(scope["path"]):
            return 404, "there is nothing here"
        if scope["method"] == "POST":
            length = headers.get(b"content-length", b"").decode("latin-1")
            if not length.isdecimal():
                return 411, "say how long the request is"
            if int(length) > (MAX_UPLOAD + OVERHEAD if scope["path"] == UPLOAD else OVERHEAD):
                return 413, f"the request is too long; a file may have {MAX_UPLOAD // 2**20} MiB"
        return None

    @staticmethod
    def _is_own(origin: bytes, headers: dict[bytes, bytes]) -> bool:
        """Whether a request comes from this page: browsers tell the origin of what another site's page asks for."""
        host = origin.partition(b"://")[2]
        return host != b"" and host in (headers.get(b"host"), headers.get(b"x-forwarded-host"))


async def _body(receive: Any) -> bytes:
    """The whole body of a request."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _replayed(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body again, and then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return messages.pop() if messages else await receive()

    return again


def _has_url(body: bytes) -> bool:
    """Whether the path of a file in the JSON of a request is a URL, which gradio would fetch."""
    found: list[str] = []

    def look(values: dict[str, Any]) -> None:
        found.extend(path for path in [values.get("path")] if isinstance(path, str) and "://" in path)

    with contextlib.suppress(ValueError):  # gradio refuses what is no JSON
        json.loads(body, object_hook=look)
    return bool(found)


def is_local(host: str) -> bool:
    """Whether a name or an address means this machine."""
    host = host.strip("[]").lower()
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def require_gradio() -> None:
    """Raise ValueError if gradio is not installed. It is not imported yet: see `_environment`."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio, which is not installed; pip install 'vtc-cls[ui]'")


def require_port(host: str, port: int) -> None:
    """Raise ValueError if the server cannot listen there."""
    name = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on port {port} of {host} ({reason}); try another --port or --host") from error


@contextlib.contextmanager
def running(comparison: Comparison, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Serve the page in another thread while the block is open; gives its address. Once in a process.

    Raises
    ------
    ValueError
        If the server cannot listen there.
    """
    with tempfile.TemporaryDirectory(prefix="vtc-ui-") as folder, _environment(folder, host):
        from vtc.ui import page as pages  # imports gradio

        page = pages.build(comparison, Path(folder))
        try:
            _, address, _ = page.launch(
                server_name=f"[{host}]" if ":" in host.strip("[]") else host,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                max_file_size=MAX_UPLOAD,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                run_history=False,
                footer_links=[],
                theme=pages.theme(),
                css_paths=[pages.STYLE],
                app_kwargs={"middleware": [_middleware(is_local(host))], "docs_url": None, "openapi_url": None},
            )
        except OSError as error:
            raise ValueError(f"cannot listen on port {port} of {host}; try another --port or --host") from error
        try:
            yield address
        finally:
            comparison.stop()
            page.server.force_exit = True  # do not wait for browsers: what is written later would outlive the folder
            logging.getLogger("uvicorn.error").disabled = True  # it and gradio print tracebacks of what is cut off
            with contextlib.redirect_stderr(io.StringIO()):
                page.close(verbose=False)
                page.server.thread.join()


def _middleware(local: bool) -> Any:
    from starlette.middleware import Middleware

    return Middleware(Gate, local=local)


@contextlib.contextmanager
def _environment(folder: str, host: str) -> Iterator[None]:
    """What gradio reads from the environment, partly when it is imported: where it writes, that it does not report, and
    that it reaches itself without a proxy.
    """
    proxied = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host, "127.0.0.1"]))
    wanted = {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "NO_PROXY": proxied,
        "no_proxy": proxied,
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def serve(comparison: Comparison, host: str, port: int, open_browser: bool) -> None:
    """Serve the page until Ctrl-C or a signal to end. Prints the address on stderr.

    Raises
    ------
    ValueError
        As `running`.
    """
    with _until_a_signal(), running(comparison, host, port) as address:
        print(f"{address} shows the page; Ctrl-C ends it", file=sys.stderr, flush=True)
        if open_browser:
            webbrowser.open(address)
        threading.Event().wait()


@contextlib.contextmanager
def _until_a_signal() -> Iterator[None]:
    """The first Ctrl-C or signal to end leaves the block; further ones are ignored, or the folder would stay.

    What this process was told to ignore, as by nohup, is ignored.
    """
    came: list[int] = []

    def end(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {each: signal.getsignal(each) for each in signals}
    try:
        for each, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(each, end)
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

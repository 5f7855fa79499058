"""The gate of the page's server, and how the command refuses to start."""

import asyncio
import json
import socket
import sys

import pytest
from support.cli import refused

from vtc.ui import server


def passed(path, *, method="GET", body=b"", local=True, **headers):
    """The status that the gate answers with; 200 if it lets the request through."""
    sent = []
    given = {"host": "127.0.0.1:7860"} | ({"content-length": str(len(body))} if method == "POST" else {})
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    given = {name: value for name, value in given.items() if value is not None}
    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in given.items()]
    parts = [{"body": body[:10], "more_body": True}, {"body": body[10:], "more_body": False}]
    received = []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            received.append(message["body"])
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", **parts.pop(0)}

    async def send(message):
        sent.append(message)

    asyncio.run(server.Gate(app, local)(scope, receive, send))
    assert b"".join(received) in (b"", body)
    if sent[0]["status"] == 200:
        assert b"".join(received) == body
        assert b"default-src 'self' " in dict(sent[0]["headers"])[b"content-security-policy"]
    return sent[0]["status"]


def test_the_gate_lets_through_what_the_page_needs():
    for path in ("/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/file=/tmp/x/a.png"):
        assert passed(path) == 200
    for path in ("/gradio_api/info", "/gradio_api/run/look", "/gradio_api/call/look", "/login", "/monitoring", "/x"):
        assert passed(path) == 404
    assert passed("/gradio_api/file=http://example.com/a.png") == 404
    assert passed("/gradio_api/proxy=http://example.com/") == 404


def test_the_gate_knows_this_machine_by_its_own_names():
    for host in ("localhost", "localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert passed("/", host=host) == 200
    for host in ("example.com", "localhost.example.com:7860", "10.0.0.1", "", None):
        assert passed("/", host=host) == 403
        assert passed("/", host=host, local=False) == 200


def test_the_gate_refuses_what_another_page_asks_for():
    upload = "/gradio_api/upload"
    for origin in ("http://127.0.0.1:7860", None):
        assert passed(upload, method="POST", origin=origin) == 200
    for origin in ("http://evil.example", "http://localhost:1234", "http://127.0.0.1", "null", ""):
        assert passed(upload, method="POST", origin=origin) == 403
        assert passed("/gradio_api/queue/data", origin=origin, local=False) == 403
    public = {"host": "localhost", "x_forwarded_host": "vtc.example", "origin": "https://vtc.example"}
    assert passed(upload, method="POST", **public) == 200


def test_the_gate_bounds_what_is_sent():
    upload = "/gradio_api/upload"
    assert passed(upload, method="POST", content_length=str(20 * 2**20)) == 200
    assert passed(upload, method="POST", content_length=str(22 * 2**20)) == 413
    assert passed(upload, method="POST", content_length=None) == 411
    assert passed(upload, method="POST", content_length="-1") == 411
    assert passed("/gradio_api/queue/join", method="POST", content_length=str(2 * 2**20)) == 413


@pytest.mark.parametrize(("path", "status"), [("https://example.com/a.png", 403), ("/tmp/x/a.png", 200)])
def test_the_gate_refuses_files_that_gradio_would_fetch(path, status):
    file = {"path": path, "url": "http://127.0.0.1:7860/gradio_api/file=x", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file, "http://this.is/a question ?"]}).encode()
    assert passed("/gradio_api/queue/join", method="POST", body=body) == status
    escaped = body.replace(b"https:", b"\\u0068ttps:")
    assert passed("/gradio_api/queue/join", method="POST", body=escaped) == status


def test_a_port_in_use_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"cannot listen on port {port} of 127.0.0.1 (Address already in use)" in refused("ui", "--port", port)


def test_a_host_that_does_not_exist_is_one_line(monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "cannot listen on port 7860 of no.such.host.invalid" in refused("ui", "--host", "no.such.host.invalid")


def test_missing_gradio_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(server, "require_port", lambda host, port: None)
    assert refused("ui") == "vtc: the page needs gradio, which is not installed; pip install 'vtc-cls[ui]'\n"

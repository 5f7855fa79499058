"""The commands of vtc/vllm/README.md for a machine without a GPU, and its snippets."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "vtc/vllm/README.md"


def test_the_server_and_the_client_of_the_page(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (command,) = [line for line in text.splitlines() if "vllm.entrypoints.openai.api_server" in line]
    code, output = text.split("```python\n")[1].split("```")[0], text.split("```text\n")[1].split("```")[0]
    words, environment = shlex.split(command), {k: v for k, v in os.environ.items() if "MULTIPROCESSING" not in k}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    with socket.socket() as other:  # the page's port has to be free
        other.bind(("127.0.0.1", 8000))
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        running = subprocess.Popen([sys.executable, *words[1:]], cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        for _ in range(240):
            if running.poll() is not None:
                raise RuntimeError(f"the server ended:\n{log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == output
    finally:
        running.terminate()
        running.wait(60)

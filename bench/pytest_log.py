"""A pytest plugin: writes every result to disk at once, and ends tests that hang and workers with a broken GPU.

`pytest -p bench.pytest_log --log-json FILE --test-limit SECONDS [--gpu-tests]`. A line of FILE is a test with its
outcome, its seconds, and the reason if it failed; one like ``{"collected": 812}`` comes first. With pytest-xdist, a
worker that hangs or breaks is ended, and another one continues with the next test.
"""

from __future__ import annotations

import faulthandler
import os
import re
from pathlib import Path
from typing import Any

import pytest

from bench import jobs, record

# What runs on the GPU: tests of operations and methods, and single tests elsewhere by their names.
ON_GPU = re.compile(
    r"tests/(ops|methods)/test_\w+\.py::"
    r"|::.*(cuda|gpu|stream|every_provider_passes|triton_backend)",
    re.IGNORECASE,
)
LONGEST = 4000  # characters of a reason
_STDERR = os.dup(2)  # before pytest captures it


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--log-json", type=Path, help="append each result to this file, one JSON line each")
    group.addoption("--test-limit", type=float, help="seconds after which a test hangs")
    group.addoption("--gpu-tests", action="store_true", help="leave out what does not run on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if config.getoption("log_json") and not is_worker:
        config.pluginmanager.register(_Log(config.getoption("log_json")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("gpu_tests"):
        kept = [item for item in items if ON_GPU.search(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    if limit := item.config.getoption("test_limit"):
        faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> Any:
    result = yield  # by now a worker has sent its report
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and not jobs.works():
        os._exit(jobs.BROKEN)
    return result


class _Log:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.collected: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._collect(ids)

    def _collect(self, ids: list[str]) -> None:
        if set(ids) - self.collected:
            self.collected |= set(ids)
            record.append(self.path, [{"collected": len(self.collected)}])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", 0.0, report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._write(report.nodeid, report.outcome, report.duration, report.longreprtext if report.failed else "")

    def _write(self, test: str, outcome: str, seconds: float, reason: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3)}
        record.append(self.path, [line | ({"reason": reason[-LONGEST:]} if reason else {})])

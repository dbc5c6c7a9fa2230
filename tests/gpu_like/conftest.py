"""The way around the kernels on tensors that say they lie on a GPU, with the kernels interpreted on numpy.

TRITON_INTERPRET=1 is read when a kernel is defined, so this tier has a process of its own. Where all of it is run, it
fails unless every way for CUDA was taken (`branches.py`).
"""

from __future__ import annotations

import os

import pytest

from tests.gpu_like import branches

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
else:
    branches.watch()

_missing: list[branches.Mark] = []


@pytest.fixture
def gpu():
    """A GPU for the length of a test."""
    from tests.gpu_like.pretend import gpu
    from tests.interpreter.sorting import fast_sort

    with fast_sort(), gpu() as found:
        yield found


def _is_whole(config: pytest.Config) -> bool:
    """Whether the whole tier is run, but for what is left to `make test-kernels`, here or in processes that report."""
    option = config.option
    chosen = option.keyword or option.deselect or option.markexpr == "kernels"
    return [os.path.normpath(a) for a in config.args] == ["tests/gpu_like"] and not chosen


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    branches.taken.update(map(tuple, getattr(node, "workeroutput", {}).get("taken", ())))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["taken"] = [list(mark) for mark in branches.taken]
    elif os.environ.get("TRITON_INTERPRET") == "1" and _is_whole(session.config) and session.exitstatus == 0:
        _missing.extend(branches.missing())
        if _missing:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _missing:
        terminalreporter.section("ways for CUDA that no test took")
        for path, line, what in _missing:
            terminalreporter.line(f"{path}:{line}: {what}")

"""What a call that looks like an earlier one hands to the driver: what Triton handed to it for that one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from dropinf_kernels.gpu import replay
from tests.compile.fake_gpu import fake_driver

OPS = ("linear", "sketch", "conv", "embedding", "norm", "flat", "quantize")
# Where they stand in what is handed over: the kernel, three numbers of the grid, the stream, its code, ...
STREAM, METADATA = 4, 7  # the last is for profilers, an object a call


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[tuple[Any, ...]]]:
    """What is handed to the driver, kernel by kernel."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(replay, "can_replay", lambda _: True)
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda self: None)
    monkeypatch.setattr(CompiledKernel, "run", property(lambda self: lambda *args: seen.append((self, *args))))
    active = driver._active
    driver.set_active(fake_driver("sm_90"))
    yield seen
    driver._active = active


def handed(calls: list[tuple[Any, ...]], given: set[int]) -> list[list[Any]]:
    """Return what was handed over; tensors as their addresses, or as what they look like where the call made them."""
    return [[_shown(x, given) for at, x in enumerate(call) if at != METADATA] for call in calls]


def _shown(x: Any, given: set[int]) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.data_ptr() if x.data_ptr() in given else ("made", x.shape, x.dtype)


def addresses(calls: list[tuple[Any, ...]]) -> set[int]:
    return {x.data_ptr() for call in calls for x in call if isinstance(x, Tensor)}


@pytest.mark.parametrize("op", OPS)
def test_the_driver_is_handed_the_same(op, launched):
    for case in importlib.import_module(f"tests.cases.{op}").small(torch.bfloat16):
        found = []
        for _ in range(2):
            launched.clear()
            case.call()
            found.append(list(launched))
        first, again = found
        given = addresses(first) & addresses(again)
        assert first, case.name
        assert handed(again, given) == handed(first, given), case.name


def test_a_call_runs_on_the_stream_that_is_current(launched):
    case = next(iter(importlib.import_module("tests.cases.linear").small(torch.bfloat16)))
    streams = set()
    for stream in (7, 8, 9):
        driver.active.get_current_stream = lambda _, stream=stream: stream
        launched.clear()
        case.call()
        streams.add(frozenset(call[STREAM] for call in launched))
    assert streams == {frozenset({7}), frozenset({8}), frozenset({9})}

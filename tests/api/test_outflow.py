"""Rows on their way from a GPU: a model of its streams, whose copies end when the test says so."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dropinf.outflow import WAITING, Outflow

SOON = 5.0  # seconds, for what another thread does at once


class Rows:
    """Rows that lie on a GPU; what is copied from them is there once their copy has ended."""

    def __init__(self, number, log):
        self.number, self.log, self.ended = number, log, threading.Event()
        self.shape, self.dtype, self.device = torch.Size([2, 3]), torch.float32, torch.device("cuda", 0)

    def record_stream(self, stream):
        self.log.append(("kept for", stream.name))


class Host:
    """Pinned memory, which holds nothing before the copy into it has ended."""

    def __init__(self, log):
        self.log = log

    def copy_(self, rows, *, non_blocking):
        assert non_blocking
        self.rows = rows
        self.log.append(("copy on", CURRENT[-1].name))

    @property
    def value(self):
        assert self.rows.ended.is_set(), "rows are read before they are copied"
        return self.rows.number


CURRENT = []  # streams


class Stream:
    def __init__(self, name, log):
        self.name, self.log, self.host = name, log, None

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def record_event(self):
        host = HOSTS[-1]
        return SimpleNamespace(synchronize=lambda: host.rows.ended.wait())


HOSTS = []


@pytest.fixture
def log(monkeypatch):
    """What is done on the streams, in order."""
    done = []
    CURRENT[:] = [Stream("compute", done)]

    @contextlib.contextmanager
    def on(stream):
        CURRENT.append(stream)
        yield
        CURRENT.pop()

    def pinned(*_shape, dtype, device, pin_memory):
        assert (dtype, device, pin_memory) == (torch.float32, "cpu", True)
        HOSTS.append(Host(done))
        return HOSTS[-1]

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"side of {device}", done))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: CURRENT[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch, "empty", pinned)
    return done


def in_thread(work):
    """Return a thread that does something, and may have to wait."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_rows_are_copied_behind_what_computed_them(log):
    rows, taken = Rows(0, log), []
    rows.ended.set()
    with Outflow() as out:
        out.put(rows, lambda host: taken.append(host.value))
    side = "side of cuda:0"
    assert log == [(side, "waits for", "compute"), ("copy on", side), ("kept for", side)]
    assert taken == [0]


def test_rows_are_handed_on_in_order_whatever_copy_ends_first(log):
    every, taken = [Rows(i, log) for i in range(WAITING)], []
    with Outflow() as out:
        for rows in every:
            out.put(rows, lambda host: taken.append(host.value))
        for rows in reversed(every):
            early = list(taken)
            rows.ended.set()
    assert early == []
    assert taken == list(range(WAITING))


def test_no_more_than_a_few_batches_wait(log):
    every, taken = [Rows(i, log) for i in range(WAITING + 1)], []
    with Outflow() as out:
        for rows in every[:-1]:
            out.put(rows, lambda host: taken.append(host.value))
        putting = in_thread(lambda: out.put(every[-1], lambda host: taken.append(host.value)))
        putting.join(0.1)
        waits, copies = putting.is_alive(), log.count(("copy on", "side of cuda:0"))
        every[0].ended.set()
        putting.join(SOON)
        goes_on, first = not putting.is_alive(), list(taken)
        for rows in every:  # before anything is asserted: the end waits for them
            rows.ended.set()
    assert (waits, copies) == (True, WAITING)
    assert (goes_on, first) == (True, [0])
    assert taken == [0, 1, 2]


def full(_host):
    raise OSError("no space left on the disk")


def test_an_error_of_the_writer_is_raised_by_the_next_batch_and_nothing_follows(log):
    every, taken = [Rows(i, log) for i in range(WAITING + 1)], []
    with Outflow() as out:
        out.put(every[0], full)
        out.put(every[1], lambda host: taken.append(host.value))
        for rows in every:
            rows.ended.set()
        with pytest.raises(OSError, match="no space left"):
            out.put(every[2], lambda host: taken.append(host.value))
    assert taken == []


def test_an_error_of_the_writer_is_raised_at_the_end(log):
    rows = Rows(0, log)
    rows.ended.set()
    with pytest.raises(OSError, match="no space left"), Outflow() as out:
        out.put(rows, full)


def test_rows_before_another_error_are_handed_on(log):
    every, taken = [Rows(i, log) for i in range(WAITING)], []

    def broken():
        with Outflow() as out:
            for rows in every:
                out.put(rows, lambda host: taken.append(host.value))
                rows.ended.set()
            raise ValueError("the next batch")

    with pytest.raises(ValueError, match="the next batch"):
        broken()
    assert taken == [0, 1]


def test_rows_on_the_host_are_handed_on_at_once():
    with Outflow() as out, mock.patch.object(torch.cuda, "Stream", side_effect=AssertionError):
        taken = []
        out.put(torch.ones(2, 3), taken.append)
        assert len(taken) == 1

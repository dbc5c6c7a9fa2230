"""Two users of one model at once: threads, and a model that is compressed while it is compressed."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import dropinf
from tests.capture.right_or_refused import (
    changes,
    doubles,  # noqa: F401
    plain,
    points,
    snapshot,
    squares,
    worst,
)


def two():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.r, self.b = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 1)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) * self.r)

    return Both(), squares, points(*[4] * 30)


def rows(compressor, batches, out, key):
    """Compress, and keep the rows or the error."""
    try:
        out[key] = compressor.compress(batches)
    except (ValueError, RuntimeError) as error:
        out[key] = error


def assert_each_right_or_refused(out, compressors, build=two, seen=None):
    torch.manual_seed(11)
    want = plain(build, seen or list(range(30)))
    assert set(out) == set(compressors)
    for key, got in out.items():
        if isinstance(got, Exception):
            print(f"refused: {type(got).__name__}: {got}")
            assert "Compressor" in str(got) or "thread" in str(got), f"unclear: {type(got).__name__}: {got}"
        else:
            wrong = worst(compressors[key], got, want)
            assert not wrong, f"WRONG without an error: {key}: {wrong}"


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("shared", [False, True])
def test_two_threads_on_one_model(attempt, shared):
    model, loss_fn, batches = built_two()
    before = snapshot(model)
    first = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    compressors = {0: first, 1: first if shared else dropinf.Compressor(model, dropinf.Dropout(2), loss_fn)}
    out: dict = {}
    threads = [threading.Thread(target=rows, args=(c, batches, out, k)) for k, c in compressors.items()]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not changes(before, snapshot(model))
    assert_each_right_or_refused(out, compressors)
    assert_each_right_or_refused({0: first.compress(batches)}, {0: first})


def built_two():
    torch.manual_seed(11)
    return two()


def test_a_thread_that_trains_beside():
    model, loss_fn, batches = built_two()
    before = snapshot(model)
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    stop, seen, errors = threading.Event(), [], []
    expected = [torch.autograd.grad(loss_fn(model, b).sum(), list(model.parameters())) for b in batches[:3]]

    def run():
        while not stop.is_set():
            for b, e in zip(batches, expected, strict=False):
                try:
                    g = torch.autograd.grad(loss_fn(model, b).sum(), list(model.parameters()))
                    seen.append(all(torch.allclose(x, y) for x, y in zip(g, e, strict=True)))
                except (ValueError, RuntimeError) as error:  # noqa: PERF203
                    errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    out: dict = {}
    rows(compressor, batches, out, 0)
    stop.set()
    thread.join()
    assert not changes(before, snapshot(model))
    assert all(seen), "the other thread's gradients were wrong"
    for error in errors[:1]:
        # Where it went forward as the weights were frozen or exchanged, autograd itself says what is the matter.
        words = ("Compressor", "does not require grad", "not have been used in the graph")
        known = any(word in str(error) for word in words)
        assert known, f"unclear in the other thread: {error}"
    assert_each_right_or_refused(out, {0: compressor})


@pytest.mark.parametrize("shared", [False, True])
def test_batches_that_compress_with_the_same_model(shared):
    model, loss_fn, batches = built_two()
    before = snapshot(model)
    outer = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    inner = outer if shared else dropinf.Compressor(model, dropinf.Dropout(2), loss_fn)
    out: dict = {}

    def between():
        for k, b in enumerate(batches):
            if k == 3:
                rows(inner, batches, out, "inner")
            yield b

    rows(outer, between(), out, "outer")
    assert not changes(before, snapshot(model))
    assert_each_right_or_refused(out, {"inner": inner, "outer": outer})


def test_a_loss_that_compresses_with_the_same_model():
    model, loss_fn, batches = built_two()
    before = snapshot(model)
    inner = dropinf.Compressor(model, dropinf.Dropout(2), loss_fn)
    out: dict = {}

    def loss(m, b):
        rows(inner, batches, out, "inner")
        return loss_fn(m, b)

    outer = dropinf.Compressor(model, dropinf.Identity(), loss)
    rows(outer, batches, out, "outer")
    assert not changes(before, snapshot(model))
    assert_each_right_or_refused(out, {"inner": inner, "outer": outer})


def test_compressors_by_turns():
    model, loss_fn, batches = built_two()
    compressors = [dropinf.Compressor(model, s, loss_fn) for s in (dropinf.Identity(), dropinf.Dropout(2))]
    for k in range(4):
        c = compressors[k % 2]
        assert_each_right_or_refused({0: c.compress(batches[k : k + 2])}, {0: c}, seen=[k, k + 1])


def test_a_loss_that_fails_leaves_the_model_free():
    model, loss_fn, batches = built_two()
    before = snapshot(model)

    def loss(m, b):
        if b is batches[2]:
            raise KeyError("no such thing")
        return loss_fn(m, b)

    compressor = dropinf.Compressor(model, dropinf.Identity(), loss)
    with pytest.raises(KeyError):
        compressor.compress(batches)
    assert not changes(before, snapshot(model))
    assert_each_right_or_refused({0: compressor.compress(batches[:2])}, {0: compressor}, seen=[0, 1])

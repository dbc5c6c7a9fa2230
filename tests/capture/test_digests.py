"""Sums that tell tensors apart where they lie."""

from __future__ import annotations

import itertools

import pytest
import torch

from dropinf.capture import digests as module
from dropinf.capture.digests import sums


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Several chunks, and more than there are numbers for."""
    monkeypatch.setattr(module, "WORDS", 4)
    module._numbers.cache_clear()
    yield
    module._numbers.cache_clear()


def flipped(x, *places):
    """The same numbers with the upper bit of 32-bit words flipped."""
    words = x.clone().view(torch.int32)
    words[list(places)] ^= -(1 << 31)
    return words.view(x.dtype)


def test_other_values_have_other_sums():
    x = torch.randn(24)
    changed = [x, x.flip(0), x.roll(4), x.roll(1), *(flipped(x, i) for i in range(24))]
    changed += [flipped(x, i, j) for i, j in itertools.combinations(range(24), 2)]
    for i, j in itertools.combinations(range(6), 2):
        swapped = x.clone()
        order = list(range(6))
        order[i], order[j] = j, i
        swapped = x.view(6, 4)[order].flatten()
        changed.append(swapped)
    found = {tuple(sums(y).tolist()) for y in changed}
    assert len(found) == len(changed)


def test_chunks_that_have_no_number_of_their_own_are_told_apart():
    x = torch.zeros(4 * 4096 * 2 + 4)
    seen = set()
    for at in (0, 4 * 4096, 4 * 4096 * 2, 4, 4 * 4097):
        y = x.clone()
        y[at] = 1
        seen.add(tuple(sums(y).tolist()))
    assert len(seen) == 5


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("n", [0, 1, 3, 5, 8, 17])
def test_any_dtype_and_length(dtype, n):
    x = torch.randn(n + 3).mul(10).to(dtype)
    y = x[3:].clone()
    assert torch.equal(sums(x[3:]), sums(y))
    for i in range(n):
        z = y.clone()
        z[i] = ~z[i] if dtype == torch.bool else z[i] + 1
        assert not torch.equal(sums(z), sums(y))


def test_how_a_tensor_lies_does_not_matter():
    x = torch.randn(4, 6)
    assert torch.equal(sums(x), sums(x.t().contiguous().t()))
    assert not torch.equal(sums(x), sums(x.t()))
    assert torch.equal(sums(torch.tensor(2.0)), sums(torch.tensor([2.0])))

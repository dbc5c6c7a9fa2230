"""Rows that are taken for those of samples: only where each scales as its sample does."""

from __future__ import annotations

import pytest
import torch

from dropinf.capture.colours import NONE, SEVERAL, Colours

N, T, D = 5, 4, 7
KEY = ("layer", 0)
OWNER = torch.arange(N).repeat_interleave(T)


def confirmed(rows, weighted=None, *, some=False, dtype=torch.float32, owner=OWNER):
    """Return whether rows [N * T, D] are confirmed, and what reads them; ``weighted``: rows by the losses' weights."""
    colours = Colours(N, {dtype})
    rows = rows.to(dtype)
    weights = colours.weights(torch.ones(N, dtype=dtype), 0)
    given = weights[OWNER][:, None] * rows if weighted is None else weighted(weights).to(dtype)
    colours.sign(KEY, rows)
    found = colours.confirm(KEY, given, owner, some=some)
    if not found:
        colours.read(KEY, given, 0)
    return found, None if found else colours.samples(KEY)


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(N * T, D)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_their_samples_are(rows, dtype):
    rows[3] = 0  # padding, say
    assert confirmed(rows, dtype=dtype, some=True)[0]


def test_float16_is_read(rows):
    found, sample = confirmed(rows, dtype=torch.float16)
    assert not found
    assert torch.equal(sample, OWNER)


def test_one_row_of_another_sample(rows):
    owner = OWNER.clone()
    owner[-1] = 0
    found, sample = confirmed(rows, owner=owner)
    assert not found
    assert torch.equal(sample, OWNER)


def test_one_row_of_two_samples(rows):
    other = torch.randn(D)

    def weighted(w):
        given = w[OWNER][:, None] * rows
        given[2] += w[4] * other
        return given

    plain = rows.clone()
    plain[2] += other
    found, sample = confirmed(plain, weighted)
    assert not found
    assert sample[2] == SEVERAL


def test_a_row_that_was_zero_and_is_not(rows):
    """Two samples that cancel each other."""
    rows[2] = 0

    def weighted(w):
        given = w[OWNER][:, None] * rows
        given[2] = (w[0] - w[4]) * torch.ones(D)
        return given

    found, sample = confirmed(rows, weighted)
    assert not found
    assert sample[2] == SEVERAL


@pytest.mark.parametrize("value", [1e-39, float("inf"), float("nan")])
def test_a_row_that_is_faint_or_not_finite(rows, value):
    rows[2] = value
    found, sample = confirmed(rows)
    assert not found
    assert sample[2] == NONE


def test_all_rows_zero_show_nothing():
    assert confirmed(torch.zeros(N * T, D))[0]
    assert not confirmed(torch.zeros(N * T, D), some=True)[0]


def test_rows_of_another_number():
    assert not confirmed(torch.ones(N * T, D), owner=OWNER[:-1])[0]


def test_a_digit_that_is_read_after_one_that_was_confirmed():
    """More samples than a dtype has powers: the second digit is another sample's, where the first is not."""
    n = 40
    colours = Colours(n, {torch.float32})
    assert colours.passes == 2
    owner, rows = torch.arange(n), torch.randn(n, D)
    moved = owner.clone()
    moved[0] = next(i for i in range(n) if i and colours.codes[i] % 32 == colours.codes[0] % 32)  # digit 0 alike
    moved[moved[0]] = 0
    colours.sign(KEY, rows)
    ones = torch.ones(n)
    assert colours.confirm(KEY, colours.weights(ones, 0)[moved][:, None] * rows, owner)
    colours.take(KEY, owner)
    second = colours.weights(ones, 1)[moved][:, None] * rows
    assert not colours.confirm(KEY, second, owner)
    colours.read(KEY, second, 1)
    assert torch.equal(colours.samples(KEY), moved)

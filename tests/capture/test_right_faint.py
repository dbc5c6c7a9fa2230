"""Samples whose gradient is far below another's, in batches whose samples may meet: colours alone would not see them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropinf

BATCHES = 3  # the last is not one that is audited for its place


def model_of(dtype):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def loss(model, batch):
    """Each sample's loss reads the row before its own where its gate is open; a number of the batch decides no path."""
    x, numbers, gate, size = batch
    if int(numbers.sum()) < 0:
        raise ValueError("numbers")
    h = model[1](model[0](x))
    return model[2](h + gate.relu() * h.roll(1, 0)).square().sum(1) * size


def batches_of(dtype, size, gate):
    """Return batches whose samples stay apart; in the last, sample 1 has a loss of ``size`` and a gate of its own."""
    closed, ones = -torch.ones(4, 1, dtype=dtype), torch.ones(4, dtype=dtype)
    of = torch.Generator().manual_seed(6)
    xs = torch.randn(BATCHES, 4, 6, generator=of).to(dtype)
    found = [(x, torch.arange(4), closed, ones) for x in xs]
    opened, sizes = closed.clone(), ones.clone()
    opened[1], sizes[1] = gate, size
    found[-1] = (xs[-1], torch.arange(4), opened, sizes)
    return found


SIZES = [1e-3, 1e-5, 1e-7, 1e-9, 1e-11, 1e-14, 1e-20, 1e-30]
DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_sample_that_meets_a_far_larger_one_is_refused(dtype, size):
    with pytest.raises(dropinf.AttributionError, match=r"samples 0 and 1|do not sum to what plain autograd gives"):
        dropinf.Compressor(model_of(dtype), dropinf.Identity(), loss).compress(batches_of(dtype, size, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, 0.0])
def test_a_sample_far_below_others_that_stays_apart_is_right(dtype, size):
    model, batches = model_of(dtype), batches_of(dtype, size, -1.0)
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss)
    rows = compressor.compress(batches)["0"][-3].double()
    want = torch.autograd.grad(loss(model, batches[-1])[1], model[0].weight)[0].double().flatten()
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    assert (rows.flatten() - want).norm() <= slack * want.norm()
    asked = [a.why for a in compressor.audits if "far below" in a.why]
    assert len(asked) == (0.0 < size < (1e-9 if dtype == torch.float64 else 1e-3))


def test_samples_of_like_size_are_not_audited_for_it():
    dtype = torch.float32
    compressor = dropinf.Compressor(model_of(dtype), dropinf.Identity(), loss)
    compressor.compress(batches_of(dtype, 1e-2, -1.0))
    assert [a.batch for a in compressor.audits] == [1]


def test_a_clipped_gradient_is_not_said_to_be_mixed():
    model = model_of(torch.float64)
    model[1].register_full_backward_hook(lambda _m, into, _o: (into[0].clamp(-0.1, 0.1),))
    with pytest.raises(dropinf.AttributionError, match="clips or normalises"):
        dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x).square().sum(1)).compress(
            [torch.randn(4, 6).double()]
        )

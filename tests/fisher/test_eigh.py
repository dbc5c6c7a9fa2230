"""A LAPACK that gives NaN for a finite float32 matrix, and raises nothing, as some do, is asked again in float64."""

from __future__ import annotations

import pytest
import torch

import dropinf

eigh = torch.linalg.eigh


def _nan(x):
    values, basis = eigh(x)
    return (values, basis) if x.dtype == torch.float64 else (values * torch.nan, basis * torch.nan)


def _raises(x):
    if x.dtype == torch.float64:
        return eigh(x)
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("fails", [_nan, _raises])
def test_eigenvectors_that_fp32_does_not_give_are_those_of_fp64(monkeypatch, fails):
    rows = torch.randn(20, 6 * 5)
    train = dropinf.Gradients(rows, {"layer": (6, 5)}, {"layer": "x"})
    expected = dropinf.score(train, train, dropinf.build_fisher(train, "kronecker", 0.1))
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = dropinf.score(train, train, dropinf.build_fisher(train, "kronecker", 0.1))
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

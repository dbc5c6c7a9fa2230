"""The cases of other files once more, behind a first batch whose losses have no gradient: it proves nothing."""

from __future__ import annotations

import functools

import pytest

import dropinf
from tests.capture import test_right_functions, test_right_modules, test_right_ops, test_right_weights
from tests.capture.right_or_refused import check, doubles  # noqa: F401

FILES = (test_right_functions, test_right_modules, test_right_ops, test_right_weights)


def resting(build):
    """A case whose losses are multiplied by zero in its first batch, which comes once more at the end."""

    @functools.wraps(build)
    def rest():
        model, loss_fn, batches = build()
        weighted = [(batches[0], 0.0), *[(batch, 1.0) for batch in (*batches[1:], batches[0])]]
        return model, lambda m, b: loss_fn(m, b[0]) * b[1], weighted

    return rest


@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(resting(case.values[0]), case.values[1], id=case.id, marks=case.marks)
        for file in FILES
        for case in file.CASES
    ],
)
def test_right_or_refused(build, options):
    check(build, dropinf.Identity, **options)

"""Accesses of score_topk."""

from tests.cases import topk
from tests.sanitizer.accesses import check_bounds, every_dtype


@every_dtype
def test_every_access_lies_within_its_argument(dtype):
    check_bounds(topk, dtype)

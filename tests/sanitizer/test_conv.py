"""Accesses of compress_conv and sketch_patches."""

from tests.cases import conv
from tests.sanitizer.accesses import check_bounds, every_dtype


@every_dtype
def test_every_access_lies_within_its_argument(dtype):
    check_bounds(conv, dtype)

"""Accesses of the ops on rows of few bits."""

from tests.cases import bits
from tests.sanitizer.accesses import check_bounds, check_symbols, every_dtype


@every_dtype
def test_every_access_lies_within_its_argument(dtype):
    check_bounds(bits, dtype)


def test_no_program_or_lane_can_leave_its_argument():
    check_symbols(bits, "dequantize-1", "dequantize-4")

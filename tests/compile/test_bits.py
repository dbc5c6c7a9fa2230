"""Machine code of the ops on rows of few bits."""

from tests.cases import bits
from tests.compile.machine_code import check, every_build


@every_build
def test_compiles_without_a_spill_and_with_the_right_instructions(dtype, arch):
    check(bits, dtype, arch)

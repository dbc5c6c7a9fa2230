"""Machine code of sketch."""

from tests.cases import sketch
from tests.compile.machine_code import check, every_build


@every_build
def test_compiles_without_a_spill_and_with_the_right_instructions(dtype, arch):
    check(sketch, dtype, arch)

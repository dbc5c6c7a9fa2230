"""What a kernel case is: one call of a launcher, for the compile tier and the sanitizer alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One call of a launcher on CPU tensors."""

    name: str
    call: Callable[[], object]
    matrix: str = ""  # the kernel that must use the matrix units
    vector: str = ""  # the kernel whose bulk loads and stores must be 128 bits wide, in 16-bit dtypes
    asynchronous: bool = True  # and whose loads must go to shared memory behind its back; not where there is no loop

"""A sort that Triton's interpreter can afford."""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import ReduceOps

_element_by_element = ReduceOps.generic_reduce


def _reduce(self: ReduceOps, input: tuple) -> list:
    if self.combine_fn != tl.standard._xor_combine:
        return _element_by_element(self, input)
    (x,) = input
    return [self.to_tensor(np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims), x.dtype)]


def fast_sort() -> contextlib.AbstractContextManager[object]:
    """Reduce by exclusive or, which a sort does at each step, in numpy instead of element by element."""
    return mock.patch.object(ReduceOps, "generic_reduce", _reduce)

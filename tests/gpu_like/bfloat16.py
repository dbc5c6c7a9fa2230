"""bfloat16 on the interpreter, made right: it multiplies bfloat16's bits as integers, and cuts where it must round.

This replaces parts of Triton's interpreter: what runs is the kernels' own source, but a rounding or a product in bfloat16
is numpy's in float32, as written here, and not what a GPU does. The machine code for bfloat16 is tested elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """Return float32 values of bfloat16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """Return the bits of the bfloat16 nearest to each float32, half to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)


_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
    source, target = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 not in (source, target) or source == target:
        return _cast(self, src, dst_type)
    if source == tl.bfloat16:
        return _cast(self, TensorHandle(widened(src.data), tl.float32), dst_type)
    return TensorHandle(narrowed(_cast(self, src, tl.float32).data), tl.bfloat16)


def _fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
    return _cast_impl(self, src, dst_type)


def _create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    a, b = (TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    """Have the interpreter compute bfloat16 rightly inside."""
    replaced = {"cast_impl": _cast_impl, "create_fp_to_fp": _fp_to_fp, "create_dot": _create_dot}
    with mock.patch.multiple(InterpreterBuilder, **replaced):
        yield

"""Registration of the ops as `torch.ops.dropinf.*`: schemas and fake implementations.

`bodies.py` says what runs: Triton kernels on a GPU, `reference*.py` elsewhere. No op is differentiable.
`functional.py` holds the Python functions that most callers want.
"""

# ruff: noqa: ARG001  a fake takes its op's whole signature

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import bodies, reference_conv
from .launch import runs_triton
from .reference import accumulator

_SKETCH = "Tensor x, Tensor index, Tensor? weight=None, int group=1"
_TABLES = "Tensor? in_index=None, Tensor? in_weight=None, Tensor? out_index=None, Tensor? out_weight=None"
_WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"


def _register(schema: str, body: Callable[..., Any], fake: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
    name = f"dropinf::{body.__name__}"
    op = torch.library.custom_op(name, body, mutates_args=mutates, schema=schema)
    op.register_fake(fake)


def _kept(index: Tensor | None, d: int) -> int:
    return d if index is None else index.shape[1]


def _samples(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _quantizing(fake: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def fake_int8(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out = fake(*args, **kwargs)
        return out.new_empty(out.shape, dtype=torch.int8), out.new_empty(out.shape[0], dtype=torch.float32)

    return fake_int8


def _fake_sketch(x: Tensor, index: Tensor, weight: Tensor | None = None, group: int = 1) -> Tensor:
    return x.new_empty(*x.shape[:-1], index.shape[1])


def _fake_compress_linear(
    a: Tensor,
    g: Tensor,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (_samples(g, cu_seqlens), _kept(out_index, g.shape[-1]), _kept(in_index, a.shape[-1]))
    return g.new_empty(shape, dtype=dtype or accumulator(a, g))


def _fake_compress_conv(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    group: int = 1,
) -> Tensor:
    taps = x.shape[1] // groups * math.prod(kernel_size)
    shape = (x.shape[0], _kept(out_index, g.shape[1]), _kept(in_index, taps))
    return x.new_empty(shape, dtype=accumulator(x, g))


def _fake_sketch_patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    index: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    positions = math.prod(reference_conv.conv_output_size(x.shape[2:], kernel_size, stride, padding, dilation))
    if runs_triton([x, index] if weight is None else [x, index, weight]):
        return x.new_empty(x.shape[0], positions, index.shape[1])
    return x.new_empty(x.shape[0], index.shape[1], positions).mT


def _fake_compress_embedding(
    ids: Tensor,
    g: Tensor,
    num_embeddings: int,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    padding_idx: int = -1,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    shape = (_samples(g, cu_seqlens), _kept(out_index, g.shape[-1]), _kept(in_index, num_embeddings))
    return g.new_empty(shape, dtype=accumulator(g))


def _fake_compress_norm(
    a: Tensor | None,
    g: Tensor,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    return g.new_empty(_samples(g, cu_seqlens), _kept(index, g.shape[-1]), dtype=accumulator(a, g))


def _fake_compress_flat(a: Tensor, g: Tensor, rows: Tensor, cols: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    return g.new_empty(_samples(g, cu_seqlens), rows.shape[0], dtype=accumulator(a, g))


def _fake_gram_update(F: Tensor, C: Tensor, c_scale: Tensor | None = None) -> None:
    return None


def _fake_score_topk(
    q: Tensor, c: Tensor, k: int, c_scale: Tensor | None = None, offset: int = 0
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], torch.sym_min(k, c.shape[0]))
    return q.new_empty(shape, dtype=accumulator(q, c)), q.new_empty(shape, dtype=torch.int64)


def _fake_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _fake_dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


_register(f"({_SKETCH}) -> Tensor", bodies.sketch, _fake_sketch)
_register(
    f"(Tensor x, {_WINDOW}, Tensor index, Tensor? weight=None) -> Tensor",
    bodies.sketch_patches,
    _fake_sketch_patches,
)
_register(
    f"(Tensor a, Tensor g, {_TABLES}, int group=1, Tensor? cu_seqlens=None, ScalarType? dtype=None) -> Tensor",
    bodies.compress_linear,
    _fake_compress_linear,
)
_register(
    f"(Tensor a, Tensor g, {_TABLES}, int group=1, Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
    bodies.compress_linear_int8,
    _quantizing(_fake_compress_linear),
)
for _schema, _body, _body_int8, _fake in (
    (
        f"(Tensor x, Tensor g, {_WINDOW}, int groups, {_TABLES}, int group=1)",
        bodies.compress_conv,
        bodies.compress_conv_int8,
        _fake_compress_conv,
    ),
    (
        f"(Tensor ids, Tensor g, SymInt num_embeddings, {_TABLES}, int padding_idx=-1, int group=1, "
        "Tensor? cu_seqlens=None)",
        bodies.compress_embedding,
        bodies.compress_embedding_int8,
        _fake_compress_embedding,
    ),
    (
        "(Tensor? a, Tensor g, Tensor? index=None, Tensor? weight=None, int group=1, Tensor? cu_seqlens=None)",
        bodies.compress_norm,
        bodies.compress_norm_int8,
        _fake_compress_norm,
    ),
    (
        "(Tensor a, Tensor g, Tensor rows, Tensor cols, Tensor? cu_seqlens=None)",
        bodies.compress_flat,
        bodies.compress_flat_int8,
        _fake_compress_flat,
    ),
):
    _register(f"{_schema} -> Tensor", _body, _fake)
    _register(f"{_schema} -> (Tensor, Tensor)", _body_int8, _quantizing(_fake))
_register("(Tensor(a!) F, Tensor C, Tensor? c_scale=None) -> ()", bodies.gram_update, _fake_gram_update, mutates=("F",))
_register(
    "(Tensor q, Tensor c, SymInt k, Tensor? c_scale=None, SymInt offset=0) -> (Tensor, Tensor)",
    bodies.score_topk,
    _fake_score_topk,
)
_register("(Tensor x) -> (Tensor, Tensor)", bodies.quantize_rows, _fake_quantize_rows)
_register(
    "(Tensor q, Tensor scale, ScalarType dtype=float32) -> Tensor",
    bodies.dequantize_rows,
    _fake_dequantize_rows,
)

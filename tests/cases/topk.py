"""Calls of score_topk; its sort takes long to compile, and its machine code is not yet held to the rules."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import topk
from tests.cases.common import Case


def _calls(dtype: torch.dtype, queries: int, rows: int, width: int, ks: tuple[int, ...]) -> Iterator[Case]:
    make = torch.randn if rows < 1000 else torch.empty
    q, c = make(queries, width).to(dtype), make(rows, width).to(dtype)
    int8, scale = (
        torch.empty(rows, width, dtype=torch.int8).fill_(3)
        if rows < 1000
        else torch.empty(rows, width, dtype=torch.int8),
        make(rows),
    )
    for k in ks:
        yield Case(f"top-{k}", lambda k=k: topk.score_topk(q, c, k), "score_topk_kernel")
        yield Case(f"top-{k}-int8", lambda k=k: topk.score_topk(q, int8, k, scale), "score_topk_kernel")
    yield Case("few-queries", lambda: topk.score_topk(q[:3], c, ks[0]), "score_topk_kernel")


def small(dtype: torch.dtype) -> Iterator[Case]:
    yield from _calls(dtype, 5, 70, 24, (3, 20))

"""The other ops against the best that PyTorch does of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import dropinf_kernels as ops

from .clock import Machine, in_turns
from .factors import DTYPES, dropout
from .steps import Step

Contenders = dict[str, Callable[[], object]]


def gram(machine: Machine, k: int, dtype: torch.dtype) -> Contenders:
    """Against a product of the rows in their own dtype and in float32, each of a whole square."""
    rows, k = machine.size(8192, 32), machine.size(k, 16)
    C = torch.randn(rows, k, dtype=dtype, device=machine.device)
    gram_sum, other = (torch.zeros(k, k, device=machine.device) for _ in range(2))
    wide, own = C.float(), torch.zeros(k, k, dtype=dtype, device=machine.device)
    return {
        "ours": lambda: ops.gram_update(gram_sum, C),
        "addmm, float32": lambda: other.addmm_(wide.T, wide),
        "mm in its dtype, sum in it too": lambda: torch.addmm(own, C.T, C, out=own),
    }


def topk(machine: Machine, top: int, dtype: torch.dtype) -> Contenders:
    queries, rows, k = machine.size(64, 3), machine.size(1 << 16, 50), machine.size(2048, 16)
    top = min(top, rows)
    q, c = (torch.randn(n, k, dtype=dtype, device=machine.device) for n in (queries, rows))
    return {"ours": lambda: ops.score_topk(q, c, top), "matmul and topk": lambda: torch.topk(q @ c.T, top)}


def conv(machine: Machine, channels: int, dtype: torch.dtype) -> Contenders:
    n, c, side, k = machine.size(64, 2), machine.size(channels, 4), machine.size(28, 4), machine.size(16, 4)
    x, g = (torch.randn(n, c, side, side, dtype=dtype, device=machine.device) for _ in range(2))
    window = ([3, 3], [1, 1], [1, 1], [1, 1])
    right, left = dropout(machine, 9 * c, k), dropout(machine, c, k, seed=1)
    taps, outputs = right[0][0], left[0][0]

    def unfolded() -> object:
        patches = F.unfold(x, 3, padding=1).index_select(1, taps)
        return torch.bmm(g.flatten(2).index_select(1, outputs), patches.transpose(1, 2))

    return {"ours": lambda: ops.compress_conv(x, g, *window, 1, *right, *left), "unfold, gather, bmm": unfolded}


def embedding(machine: Machine, group: int, dtype: torch.dtype) -> Contenders:
    vocabulary, d, k = machine.size(50_257, 64), machine.size(768, 32), machine.size(64, 8)
    n, t = machine.size(8, 2), machine.size(1024, 8)
    ids = torch.randint(vocabulary, (n, t), device=machine.device)
    g = torch.randn(n, t, d, dtype=dtype, device=machine.device)
    right, left = dropout(machine, vocabulary, k), dropout(machine, d, k, min(group, k), seed=1)
    rows, outputs = right[0][0], left[0][0]

    def one_hot() -> object:
        hits = (ids[..., None] == rows).to(dtype)
        return torch.bmm(g.index_select(2, outputs).transpose(1, 2), hits)

    ours = partial(ops.compress_embedding, ids, g, vocabulary, *right, *left, group=min(group, k))
    return {"ours": ours, "compare, gather, bmm": one_hot}


def norm(machine: Machine, group: int, dtype: torch.dtype) -> Contenders:
    n, t, d, k = machine.size(8, 2), machine.size(1024, 8), machine.size(4096, 64), machine.size(64, 16)
    a, g = (torch.randn(n, t, d, dtype=dtype, device=machine.device) for _ in range(2))
    table = dropout(machine, d, k, min(group, k))
    columns = table[0][0]
    return {
        "ours": lambda: ops.compress_norm(a, g, *table, min(group, k)),
        "gather, multiply, sum": lambda: (a.index_select(2, columns) * g.index_select(2, columns)).float().sum(1),
    }


CASES: dict[str, tuple[Callable[..., Contenders], tuple[int, ...]]] = {
    "gram_update, 8192 rows, k": (gram, (256, 1024, 4096)),
    "score_topk, 64 queries, 65536 rows of 2048, top": (topk, (10, 100)),
    "compress_conv, 64 of 28 x 28, k 16, channels": (conv, (64, 256)),
    "compress_embedding, 50257 x 768, 8 x 1024, k 64, runs of": (embedding, (1, 16)),
    "compress_norm, 4096, 8 x 1024, k 64, runs of": (norm, (1, 16)),
}


def measure(machine: Machine, make: Callable[..., Contenders], size: int, dtype: torch.dtype) -> dict[str, Any]:
    laps = in_turns(machine, make(machine, size, dtype))
    return {"ms": {name: 1e3 * median(found) for name, found in laps.items()}}


def steps(machine: Machine) -> list[Step]:
    del machine
    found = []
    for name, (make, sizes) in CASES.items():
        for size in sizes:
            for kind, dtype in DTYPES.items():
                run = partial(measure, make=make, size=size, dtype=dtype)
                found.append(Step(f"{name} {size}, {kind}", "other ops", run, warm=partial(_once, make, size, dtype)))
    return found


def _once(make: Callable[..., Contenders], size: int, dtype: torch.dtype, machine: Machine) -> None:
    make(machine, size, dtype)["ours"]()

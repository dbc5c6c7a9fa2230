"""compress_linear by masks against dense factors through cuBLAS, against a gather and a product, and against the layer.

PCA's factors cost what Gaussian ones do, its calibration left out. cuBLAS multiplies float32 without TF32; the kernels
take three products of TF32, as accurate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import dropinf_kernels as ops
from bench.traffic.cases import FULL

from .clock import Machine, in_turns
from .steps import Step

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
METHODS = {"scattered": (1, 1), "runs of 8": (8, 1), "runs of 16": (16, 1), "fold of 4": (1, 4)}  # group, fan_in
Table = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Shape:
    """A layer [d_out, d_in], and a batch [n, t] of it."""

    d_in: int
    d_out: int
    n: int
    t: int

    def __str__(self) -> str:
        return f"{self.d_in} x {self.d_out}, {self.n} x {self.t}"

    def on(self, machine: Machine) -> Shape:
        return Shape(64, 96, 2, 8) if machine.dry else self


# Of README's table of the CPU, of the predicted one, of layers of language models, and of batches small and large.
PREDICTED = Shape(1024, 1024, FULL, 256)
SHAPES = [
    PREDICTED,
    Shape(768, 3072, 8, 512),
    Shape(4096, 4096, 8, 512),
    Shape(4096, 4096, 8, 1024),
    Shape(4096, 4096, 64, 1024),
    Shape(4096, 4096, 8, 4096),
    Shape(4096, 11008, 8, 1024),
    Shape(14336, 4096, 8, 1024),
]
KS = (64, 256)


def dropout(machine: Machine, d: int, k: int, group: int = 1, fan_in: int = 1, seed: int = 0) -> Table:
    """Return a sketch of `d` coordinates: sorted runs, and random signs where several are folded into one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(d // group, generator=generator)[: k // group].sort().values for _ in range(fan_in)]
    index = (torch.stack(chosen).unsqueeze(-1) * group + torch.arange(group)).flatten(1).int()
    signs = torch.randint(0, 2, index.shape, generator=generator) * 2.0 - 1.0 if fan_in > 1 else None
    return index.to(machine.device), None if signs is None else signs.to(machine.device)


@dataclass(frozen=True)
class Problem:
    machine: Machine
    shape: Shape
    k: int
    dtype: torch.dtype

    @classmethod
    def of(cls, machine: Machine, shape: Shape, k: int, dtype: torch.dtype) -> Problem:
        return cls(machine, shape.on(machine), machine.size(k, 16), dtype)

    def inputs(self) -> tuple[Tensor, Tensor]:
        s = self.shape
        a, g = (torch.randn(s.n, s.t, d, dtype=self.dtype, device=self.machine.device) for d in (s.d_in, s.d_out))
        return a, g

    def tables(self, method: str) -> tuple[Table, Table]:
        group, fan_in = METHODS[method]
        right, left = (
            dropout(self.machine, d, self.k, group, fan_in, seed)
            for seed, d in enumerate((self.shape.d_in, self.shape.d_out))
        )
        return right, left

    def masked(self, a: Tensor, g: Tensor, method: str) -> Callable[[], Tensor]:
        right, left = self.tables(method)
        return lambda: ops.compress_linear(a, g, *right, *left, METHODS[method][0])


def projected(a: Tensor, g: Tensor, k: int) -> Callable[[], Tensor]:
    """Compress by dense factors [k, d_in] and [k, d_out]."""
    right, left = (torch.randn(k, x.shape[-1], dtype=x.dtype, device=x.device) / k**0.5 for x in (a, g))
    return lambda: torch.matmul((g @ left.T).transpose(1, 2), a @ right.T)


def two_steps(a: Tensor, g: Tensor, right: Table, left: Table) -> Callable[[], Tensor]:
    """Gather each side, then multiply them: what one would write without kernels."""
    return lambda: torch.bmm(g.index_select(2, left[0][0]).transpose(1, 2), a.index_select(2, right[0][0]))


def layer(a: Tensor, g: Tensor) -> Callable[[], None]:
    """Run the layer forward, and backward to its input and its weight."""
    linear = torch.nn.Linear(a.shape[-1], g.shape[-1], bias=False, device=a.device, dtype=a.dtype)
    x = a.clone().requires_grad_()

    def run() -> None:
        linear.weight.grad = x.grad = None
        linear(x).backward(g)

    return run


def measure(machine: Machine, shape: Shape, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return milliseconds, medians of rounds in which all take turns, and how far masks are from float64."""
    problem = Problem.of(machine, shape, k, dtype)
    a, g = problem.inputs()
    contenders: dict[str, Callable[[], object]] = {}
    errors = {}
    for method in METHODS:
        call = contenders[method] = problem.masked(a, g, method)
        few = slice(0, min(4, len(a)))  # float64 is slow on most cards, and its inputs large
        want = problem.masked(a[few].double(), g[few].double(), method)()
        errors[method] = float((call()[few].double() - want).abs().max() / want.abs().max())
        # A fold rounds to the inputs' dtype once more.
        most = 2e-5 + 2 * (METHODS[method][1] > 1) * torch.finfo(dtype).eps
        if not errors[method] <= most:
            raise RuntimeError(f"{method}: {errors[method]:.3g} from float64, and {most:.3g} is rounding")
    contenders |= {
        "Gaussian factors": projected(a, g, problem.k),
        "gather, then bmm": two_steps(a, g, *problem.tables("scattered")),
        "the layer, forward and backward": layer(a, g),
    }
    laps = in_turns(machine, contenders)
    return {
        "shape": str(shape), "k": k, "dtype": str(dtype).removeprefix("torch."),
        "ms": {name: 1e3 * median(found) for name, found in laps.items()},
        "errors": errors,
    }  # fmt: skip


def compiles(machine: Machine, shape: Shape, k: int, dtype: torch.dtype) -> None:
    problem = Problem.of(machine, shape, k, dtype)
    a, g = problem.inputs()
    for method in METHODS:
        problem.masked(a, g, method)()


def steps(machine: Machine) -> list[Step]:
    del machine
    found = []
    for name, dtype in DTYPES.items():
        for shape in SHAPES if name == "bf16" else SHAPES[:3]:
            for k in KS:
                given = {"shape": shape, "k": k, "dtype": dtype}
                found.append(
                    Step(
                        f"compress_linear, {shape}, k {k}, {name}", "compress_linear", partial(measure, **given),
                        warm=partial(compiles, **given),
                    )
                )  # fmt: skip
    return found

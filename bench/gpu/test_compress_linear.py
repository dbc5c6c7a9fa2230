"""compress_linear by dropout against dense factors through cuBLAS, and against the layer that it compresses.

Each row of the JSON file carries its own baseline, timed in the same rounds. PCA's factors cost what Gaussian ones do,
its calibration left out. cuBLAS multiplies float32 without TF32; the kernels take three products of TF32, as accurate.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dropinf_kernels as ops
from bench.gpu.clock import CLOCK, compare

pytestmark = pytest.mark.benchmark(timer=CLOCK)
N, T = 8, 512
SHAPES = [(768, 3072), (4096, 4096)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
METHODS = {"scattered": (1, 1), "runs of 8": (8, 1), "runs of 16": (16, 1), "fold of 4": (1, 4)}  # group, fan_in


def table(d: int, k: int, group: int, fan_in: int) -> tuple[Tensor, Tensor | None]:
    """Return a sketch of `d` coordinates: sorted runs, and random signs where several are folded into one."""
    starts = torch.stack([torch.randperm(d // group)[: k // group].sort().values for _ in range(fan_in)])
    index = (starts.unsqueeze(-1) * group + torch.arange(group)).flatten(1).int().cuda()
    return index, (torch.randint(0, 2, index.shape) * 2.0 - 1.0).cuda() if fan_in > 1 else None


def projected(a: Tensor, g: Tensor, right: Tensor, left: Tensor) -> Callable[[], object]:
    """Compress by dense factors [k, d_in] and [k, d_out]."""
    return lambda: torch.matmul((g @ left.T).transpose(1, 2), a @ right.T)


def gaussian(a: Tensor, g: Tensor, k: int) -> Callable[[], object]:
    right, left = (torch.randn(k, x.shape[-1], dtype=x.dtype, device="cuda") / k**0.5 for x in (a, g))
    return projected(a, g, right, left)


def pca(a: Tensor, g: Tensor, k: int) -> Callable[[], object]:
    bases = (torch.linalg.qr(torch.randn(x.shape[-1], k, device="cuda"))[0] for x in (a, g))
    right, left = (basis.T.contiguous().to(a.dtype) for basis in bases)
    return projected(a, g, right, left)


def layer(a: Tensor, g: Tensor, _k: int) -> Callable[[], object]:
    """Run the layer forward, and backward to its input and its weight."""
    linear = torch.nn.Linear(a.shape[-1], g.shape[-1], bias=False, device="cuda", dtype=a.dtype)
    x = a.clone().requires_grad_()

    def run() -> None:
        linear.weight.grad = x.grad = None
        linear(x).backward(g)

    return run


BASELINES = {"Gaussian factors": gaussian, "PCA factors": pca, "the layer, forward and backward": layer}


@pytest.mark.parametrize("against", BASELINES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [64, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_linear(benchmark, dtype, shape, k, method, against):
    benchmark.group = f"{shape[0]}x{shape[1]}, k {k}, {dtype}"
    a, g = (torch.randn(N, T, d, dtype=DTYPES[dtype], device="cuda") for d in shape)
    group, fan_in = METHODS[method]
    tables = (*table(shape[0], k, group, fan_in), *table(shape[1], k, group, fan_in))
    # float64 takes the reference; a fold rounds to the inputs' dtype once more.
    got, want = ops.compress_linear(a, g, *tables, group), ops.compress_linear(a.double(), g.double(), *tables, group)
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= 2e-5 + 2 * (fan_in > 1) * torch.finfo(a.dtype).eps
    compare(benchmark, lambda: ops.compress_linear(a, g, *tables, group), against, BASELINES[against](a, g, k))

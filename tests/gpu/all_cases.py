"""The small cases of every kernel on a GPU, for compute-sanitizer: `python -m tests.gpu.all_cases linear conv`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from unittest import mock

import torch

from dropinf_kernels import dequantize_rows
from dropinf_kernels.gpu import quantize
from dropinf_kernels.gpu.launch import launch
from tests.gpu.problems import DTYPES

OPS = sorted(p.stem for p in (Path(__file__).parents[1] / "cases").glob("*.py") if "def small(" in p.read_text())


def run(ops: list[str]) -> None:
    torch.set_default_device("cuda")
    for op in ops:
        for dtype in DTYPES:
            torch.manual_seed(0)
            for case in importlib.import_module(f"tests.cases.{op}").small(dtype):
                case.call()
                torch.cuda.synchronize()
                print(f"{op} {dtype} {case.name}", flush=True)


def run_out_of_bounds() -> None:
    """Ask a kernel for columns that do not exist: what the sanitizer must find."""

    def wider(kernel, grid, device, q, scale, out, K, *rest, **meta):
        launch(kernel, grid, device, q, scale, out, K + 64, *rest, **meta)

    with mock.patch.object(quantize, "launch", wider):
        dequantize_rows.triton(torch.ones(3, 30, dtype=torch.int8, device="cuda"), torch.ones(3, device="cuda"))
    torch.cuda.synchronize()


if __name__ == "__main__":
    run(sys.argv[1:] or OPS)

"""`dropinf doctor`: what is installed, what runs where, and whether it is right."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
import typer

import dropinf_kernels as ops
from dropinf_kernels.device import arch_of
from dropinf_kernels.ops.topk import in_integers

# Distribution, module, what to install, what for.
_OPTIONAL = (
    ("typer", "typer", "'dropinf[cli]'", "the command line"),
    ("rich", "rich", "'dropinf[cli]'", "its tables"),
    ("transformers", "transformers", "'dropinf[hf]'", "models of text"),
    ("peft", "peft", "'dropinf[hf]'", "LoRA"),
    ("gguf", "gguf", "gguf", "GGUF files"),
    ("pyarrow", "pyarrow", "pyarrow", "Parquet files"),
    ("datasets", "datasets", "datasets", "Hugging Face datasets"),
    ("faiss-cpu", "faiss", "'dropinf[faiss]'", "export to FAISS"),
    ("matplotlib", "matplotlib", "'dropinf[plots]'", "plots"),
    ("scikit-learn", "sklearn", "'dropinf[demo]'", "the demo"),
)


def doctor() -> None:
    """Say what is installed and which kernels run here; check one of them against float64."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for name, value in _versions():
        _print(name, value)
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        arch = arch_of(torch.device("cuda", i))
        _print("GPU", f"{found.name} ({arch.name if arch else 'too old'}), {found.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.device_count():
        _print("GPU", "none" if torch.version.cuda or torch.version.hip else "none; this torch is built for CPUs alone")
    _print("kernels", kernels(device))
    integers = in_integers(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int8))
    _print("int8 products", "in integers (VNNI)" if integers else "in floating point; this CPU or torch has no VNNI")
    for distribution, module, wanted, purpose in _OPTIONAL:
        there = importlib.util.find_spec(module) is not None
        value = (_version(distribution) or "installed") if there else f"missing: pip install {wanted}"
        _print(distribution, f"{value} ({purpose})")
    problem = check(device)
    _print("self-check", problem or f"compress_linear on {device.type} equals float64 to rounding")
    if problem:
        raise typer.Exit(1)


def _print(name: str, value: str) -> None:
    print(f"{name:<15}{value}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[tuple[str, str]]:
    yield "dropinf", version("dropinf")
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "triton", _version("triton") or "not installed"
    yield "numpy", np.__version__


def kernels(device: torch.device) -> str:
    """Return which bodies of the ops run on a device, and why."""
    if device.type != "cuda":
        return "plain PyTorch, as there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "plain PyTorch, slower, as triton is not installed: pip install triton"
    if arch_of(device) is None:
        return "plain PyTorch, slower, as this GPU is older than sm_80 or no CDNA2"
    return "Triton; plain PyTorch for float64 and on the CPU"


def check(device: torch.device) -> str | None:
    """Return what is wrong with one op on a device, against float64; None where nothing is."""
    torch.manual_seed(0)
    a, g = torch.randn(4, 64, 96), torch.randn(4, 64, 80)
    into, out = (torch.randperm(size)[:16].sort().values.int()[None] for size in (96, 80))
    expected = g.double()[..., out[0].long()].mT @ a.double()[..., into[0].long()]
    try:
        tables = (into.to(device), None, out.to(device))
        found = ops.compress_linear(a.to(device), g.to(device), *tables).cpu().double()
    except Exception as failure:  # whatever it is, it is what is asked for here
        return f"broken: compress_linear fails on {device.type}: {type(failure).__name__}: {failure}"
    error = float((found - expected).norm() / expected.norm())
    return None if error < 1e-5 else f"broken: compress_linear on {device.type} is off by {error:.1e} of its size"

"""What the sanitizer must find: errors that these tests plant in tables, masks, bounds and kernels."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
import triton_viz

from dropinf_kernels import compress_linear, dequantize_rows
from dropinf_kernels.gpu import linear, quantize, tiles
from dropinf_kernels.gpu.launch import launch
from tests.reference.helpers import make_table
from tests.sanitizer.clients import Bounds, bounds, symbols


@pytest.fixture
def problem():
    return torch.randn(2, 7, 20), torch.randn(2, 7, 12)


@pytest.mark.parametrize("entry", [20, 10_000, -1])
def test_finds_a_table_that_points_outside(problem, entry, monkeypatch):
    index = make_table(20, 5)[0]
    index[0, 3] = entry
    monkeypatch.setattr(linear, "check_index", lambda *args: None)
    with bounds() as client:
        compress_linear.triton(*problem, index)
    assert any("load outside p_a" in error for error in client.errors)


def test_finds_documents_that_run_past_the_rows(problem, monkeypatch):
    a, g = (x.flatten(0, 1) for x in problem)
    monkeypatch.setattr(tiles, "check_cu_seqlens", lambda cu_seqlens, *args: cu_seqlens)
    with bounds() as client:
        compress_linear.triton(a, g, cu_seqlens=torch.tensor([0, 5, 15]))
    assert {error.split(" at ")[0] for error in client.errors} == {"load outside p_a", "load outside p_g"}


@triton.jit
def always(offsets, k, GROUP: tl.constexpr):
    return offsets >= 0


def test_finds_a_missing_mask(problem, monkeypatch):
    monkeypatch.setattr(tiles, "below", always)
    with bounds() as client:
        compress_linear.triton(*problem)
    assert any("load outside p_a" in error for error in client.errors)


@pytest.mark.parametrize("check", [bounds, symbols])
def test_finds_columns_that_do_not_exist(check, monkeypatch):
    def wider(kernel, grid, device, q, scale, out, K, *rest, **meta):
        launch(kernel, grid, device, q, scale, out, K + 64, *rest, **meta)

    monkeypatch.setattr(quantize, "launch", wider)
    with check() as client:
        dequantize_rows.triton(torch.ones(3, 30, dtype=torch.int8), torch.ones(3))
    assert client.errors if check is bounds else client.records


def test_finds_an_access_between_the_elements_of_a_view(monkeypatch):
    q, scale = torch.ones(3, 60, dtype=torch.int8)[:, ::2], torch.ones(3)
    with bounds() as client:
        dequantize_rows.triton(q, scale)
    assert not client.errors

    def denser(kernel, grid, device, q, scale, out, K, stride_n, stride_k, **meta):
        launch(kernel, grid, device, q, scale, out, K, stride_n, 1, **meta)

    monkeypatch.setattr(quantize, "launch", denser)
    with bounds() as client:
        dequantize_rows.triton(q, scale)
    assert any(error.startswith("load outside p_q at elements [1 3 5 7 9]") for error in client.errors)


@triton.jit
def storing_kernel(p_out, N):
    tl.store(p_out + tl.program_id(0) % N, 1.0)


@triton.jit
def shifting_kernel(p_x, SHIFT):
    n = tl.program_id(0)
    tl.store(p_x + n, tl.load(p_x + n + SHIFT))


@pytest.mark.parametrize(
    ("kernel", "number", "message"),
    [
        (storing_kernel, 4, ""),
        (storing_kernel, 3, "two programs store to p_out, elements [0]"),
        (shifting_kernel, 0, ""),
        (shifting_kernel, 1, "p_x: elements [1 2 3] are read and written in a launch"),
    ],
)
def test_finds_programs_that_share_an_element(kernel, number, message):
    client = Bounds()
    triton_viz.trace(client=client)(kernel)[(4,)](torch.zeros(5), number)
    assert client.errors == ([message] if message else [])

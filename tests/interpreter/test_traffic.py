"""The traffic recorder counts what a hand-made kernel moves, and the kernels move little more than they must."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from bench.traffic import layers
from bench.traffic.cases import Case, dropout, fold, linear_case, runs
from bench.traffic.minimum import matched_entries, named_rows, touched_columns, used_columns, used_patches
from bench.traffic.predict import Side, Work, gaussian, predicted
from bench.traffic.recorder import Count, record
from bench.traffic.report import count, missed
from bench.traffic.resources import occupancy
from dropinf_kernels.device import ARCHS


@triton.jit
def copy_kernel(p_x, p_out, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + at * stride, mask=at < n, other=0.0)
    tl.store(p_out + at, x, mask=at < n)


@triton.jit
def twice_kernel(p_x, p_out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(p_out + tl.program_id(0) * BLOCK + at, tl.load(p_x + at) + tl.load(p_x + at))


@triton.jit
def interleaved_kernel(p_x, p_out, BLOCK: tl.constexpr):
    at = (tl.arange(0, BLOCK) * tl.num_programs(0) + tl.program_id(0)) * 8
    tl.store(p_out + at, tl.load(p_x + at))


@triton.jit
def dot_kernel(p_x, p_out):
    at = tl.arange(0, 16)
    x = tl.load(p_x + at[:, None] * 16 + at[None, :])
    tl.store(p_out + at[:, None] * 16 + at[None, :], tl.dot(x, x))


def copied(n: int, stride: int, programs: int, block: int):
    x, out = torch.randn(n * stride), torch.empty(n)
    with record() as launches:
        copy_kernel[(programs,)](x, out, n, stride, BLOCK=block)
    assert torch.equal(out, x[::stride])
    assert [launch.kernel for launch in launches] == ["copy_kernel"]
    return launches[0].counts


def test_contiguous_load_moves_its_bytes():
    counts = copied(n=256, stride=1, programs=4, block=64)
    assert counts == {("p_x", "load"): Count(1024, 1024, 1024), ("p_out", "store"): Count(1024, 1024, 1024)}


def test_strided_load_moves_a_sector_a_value():
    counts = copied(n=64, stride=8, programs=1, block=64)
    assert counts["p_x", "load"] == Count(requested=256, dram=64 * 32, l2=64 * 32)
    assert copied(n=64, stride=2, programs=1, block=64)["p_x", "load"] == Count(256, 512, 512)


def test_masked_lanes_move_nothing():
    counts = copied(n=33, stride=1, programs=3, block=16)
    assert counts["p_x", "load"] == Count(requested=132, dram=5 * 32, l2=5 * 32)
    assert copied(n=8, stride=1, programs=2, block=16)["p_out", "store"] == Count(32, 32, 32)


def test_programs_share_sectors_of_dram_and_not_of_l2():
    # Blocks of four floats: two programs meet in each sector.
    assert copied(n=64, stride=1, programs=16, block=4)["p_x", "load"] == Count(256, 256, 512)


def test_a_program_reads_a_sector_twice_and_moves_it_once():
    x, out = torch.randn(32), torch.empty(96)
    with record() as launches:
        twice_kernel[(3,)](x, out, BLOCK=32)
    assert launches[0].counts["p_x", "load"] == Count(requested=3 * 2 * 128, dram=128, l2=3 * 128)


def test_programs_that_interleave_are_told_apart():
    x, out = torch.randn(256), torch.empty(256)
    with record() as launches:
        interleaved_kernel[(2,)](x, out, BLOCK=16)
    assert launches[0].counts["p_x", "load"] == Count(requested=128, dram=1024, l2=1024)


@pytest.mark.parametrize("owner", ["torch", "numpy"])
def test_a_tensor_that_starts_inside_a_sector(owner):
    x = torch.randn(40)[3:] if owner == "torch" else torch.from_numpy(torch.randn(40).numpy()[3:])
    out = torch.empty(8)
    with record() as launches:
        copy_kernel[(1,)](x, out, 8, 1, BLOCK=8)
    assert launches[0].counts["p_x", "load"] == Count(32, 64, 64)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 16), (torch.float32, 32)])
def test_matrix_operations_by_width(dtype, width):
    with record() as launches:
        dot_kernel[(2,)](torch.ones(16, 16, dtype=dtype), torch.empty(16, 16))
    assert launches[0].flops == {width: 2 * 2 * 16**3}


def test_an_address_outside_of_every_tensor_is_an_error_and_the_interpreter_is_restored():
    from triton.runtime import interpreter

    before = interpreter.InterpreterBuilder.create_masked_load, interpreter.GridExecutor.__call__
    with pytest.raises(Exception, match="copy_kernel reaches outside"), record():
        copy_kernel[(1,)](torch.randn(8), torch.empty(64), 64, 1, BLOCK=64)
    assert before == (interpreter.InterpreterBuilder.create_masked_load, interpreter.GridExecutor.__call__)


def test_minimum():
    x = torch.zeros(2, 3, 64, dtype=torch.float16)
    index = torch.tensor([[0, 1, 17, 17]])
    assert used_columns(x, index) == 6 * 3 * 2
    assert used_columns(x, None) == 6 * 128
    assert touched_columns(x, index) == 6 * 2 * 32
    image = torch.zeros(2, 2, 4, 4, dtype=torch.float16)
    # Tap 0 is channel 0 one up and left; tap 13 is channel 1's centre.
    assert used_patches(image, torch.tensor([[0, 13]]), [3, 3], [1, 1]) == 2 * (9 + 16) * 2
    ids = torch.tensor([[5, 6, 7], [5, 9, 9]])
    assert named_rows(x, ids, torch.tensor([[5, 9]]), index) == 4 * 3 * 2
    assert matched_entries(x, ids, torch.tensor([0, 40, 8, 3]), torch.tensor([5, 5, 9, 1])) == (2 * 2 + 2 * 1) * 32


def test_predicted_time_is_bandwidth_or_matrix_rate_and_occupancy_is_the_scarcest_resource():
    arch = ARCHS["sm_90"]
    assert predicted([Work(int(arch.bandwidth), {}), Work(0, {16: int(arch.flops16)})], arch) == pytest.approx(2)
    sides = Side(inputs=100, d=8, k=2), Side(inputs=60, d=4, k=4)
    first, product = gaussian(10, *sides, outputs=32, itemsize=2)
    assert first == Work(100 + 8 * 2 * 2 + 10 * 2 * 2, {16: 2 * 10 * 8 * 2})
    assert product == Work(10 * 2 * 2 + 60 + 32, {16: 2 * 10 * 2 * 4})
    assert occupancy(registers=128, shared=0, warps=4) == 4
    assert occupancy(registers=32, shared=100 << 10, warps=4) == 2
    assert occupancy(registers=32, shared=0, warps=8) == 8
    assert occupancy(registers=16, shared=0, warps=1) == 32


@pytest.mark.parametrize(("make", "group"), [(runs(16), 16), (fold, 1)], ids=["runs", "fold"])
def test_linear_reads_each_value_once(make, group):
    result = count(Case("tiny", partial(linear_case, 3, 64, 128, 32, make, group), multiprocessors=3))
    assert [check.limit for check in result.checks] == [1.10]
    assert missed([result]) == []
    assert result.bytes("partial") == 0
    assert result.bytes("table") > 0
    # Tables are counted, and are in neither side of the ratio.
    assert result.ratio(1) == result.bytes("input") + result.bytes("output")
    assert result.bytes("output") == 3 * 32 * 32 * 4


def test_partial_results_and_wasted_sectors_count():
    split = count(Case("split", partial(linear_case, 1, 256, 128, 32, runs(16), 16), multiprocessors=4))
    assert split.bytes("partial") == 2 * 4 * 32 * 32 * 4
    assert split.bytes("output") == 32 * 32 * 4
    assert "split: DRAM / minimum is" in missed([split])[0]
    half = count(Case("half", partial(linear_case, 3, 64, 1024, 32, partial(dropout, group=8), 8), multiprocessors=3))
    assert half.ratio(half.problem.sectors) == pytest.approx(1, abs=0.01)
    assert half.ratio(half.problem.minimum) > 1.5
    assert [(check.name, check.limit) for check in half.checks] == [
        ("DRAM / minimum", None),
        ("DRAM / its sectors", 1.10),
    ]


def test_predicted_times_of_layers_count_bytes_and_launches():
    arch = ARCHS["sm_90"]
    layer = layers.Layer(4096, 14336, 8, 1024, 64, 16)
    rows, kept = 8 * 1024, 8 * 1024 * 64 * 2
    outputs = 8 * 64 * 64 * 4
    assert layer.ours() == [Work(2 * kept + outputs, {16: 2 * rows * 64 * 64})]  # whole runs of 32 bytes
    assert [work.bytes for work in layer.two_steps()] == [2 * kept, 2 * kept, 2 * kept + outputs]
    scattered = layers.Layer(4096, 14336, 8, 1024, 64, 1).ours()[0].bytes
    assert 14 * layer.ours()[0].bytes < scattered < 16 * layer.ours()[0].bytes  # a sector of 16 values for almost each
    big = [Work(int(arch.bandwidth), {})]
    assert layers.seconds(big, arch) == pytest.approx(1)
    assert layers.seconds([Work(1, {})] * 3, arch) == pytest.approx(3 * layers.LAUNCH)
    assert len(layers.lines()) == len(layers.LAYERS) * len(layers.BATCHES) * len(layers.KEPT)

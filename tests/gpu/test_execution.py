"""How ops are launched: on the current stream, in CUDA graphs, on the tensors' device, and without a wait."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import dropinf_kernels as ops
from tests.gpu.problems import NAMES, Problem, check, problems, results
from tests.reference.helpers import WRITES, make_table

CYCLES = 100_000_000  # a twentieth of a second
every_problem = pytest.mark.parametrize("name", NAMES)


def called(problem: Problem, args: tuple) -> tuple[Tensor, ...]:
    return results(getattr(ops, problem.op), args)


def warm(problem: Problem) -> tuple:
    """Return arguments on the GPU whose kernels are compiled and whose tables are checked; data are as they were."""
    args = problem.on("cuda")
    called(problem, args)
    copy_data(problem, args, problem.on("cuda"))
    torch.cuda.synchronize()
    return args


def copy_data(problem: Problem, args: tuple, source: tuple) -> None:
    for to, value in zip(args[: problem.data], source, strict=False):
        if isinstance(to, Tensor):
            to.copy_(value)


def same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@every_problem
def test_a_captured_graph_replays_on_new_data(name):
    problem = problems(torch.float16)[name]
    args, fresh = warm(problem), problem.fresh("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = called(problem, args)
    copy_data(problem, args, fresh)
    graph.replay()
    want, old = called(problem, fresh), called(problem, problem.on("cuda"))
    assert same_bits(got, want)
    assert not same_bits(want, old)


def test_a_table_that_is_first_used_in_a_capture_is_refused():
    a, index = torch.randn(2, 5, 8, device="cuda"), make_table(8, 4)[0].cuda()
    ops.compress_linear(a, a)
    with (
        pytest.raises(RuntimeError, match="call the op once before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.compress_linear(a, a, index)


@every_problem
def test_runs_behind_earlier_work_of_a_side_stream(name):
    problem = problems(torch.float16)[name]
    args, fresh = warm(problem), problem.fresh("cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # A launch on the default stream would not wait for this, and see the old data.
        torch.cuda._sleep(CYCLES)
        copy_data(problem, args, fresh)
        got = called(problem, args)
    stream.synchronize()
    assert same_bits(got, called(problem, problem.fresh("cuda")))


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wait_is_noticed():
    one = torch.ones(1, device="cuda")
    with no_waits(), pytest.raises(RuntimeError, match="synchronizing"):
        one.item()


@every_problem
def test_second_call_does_not_wait(name):
    problem = problems(torch.float16)[name]
    args = warm(problem)
    with no_waits():
        called(problem, args)


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Return how many allocations a call makes, and of how many bytes."""
    keys = ("allocation.all.allocated", "requested_bytes.all.allocated")
    before = torch.cuda.memory_stats()
    call()
    after = torch.cuda.memory_stats()
    count, size = (after[key] - before[key] for key in keys)
    return count, size


@every_problem
def test_allocations_do_not_depend_on_data(name):
    problem = problems(torch.float16)[name]
    args = warm(problem)
    count, size = allocated(lambda: called(problem, args))
    for v in args[: problem.data]:
        if isinstance(v, Tensor):
            v.zero_()
    assert allocated(lambda: called(problem, args)) == (count, size)
    if problem.op not in WRITES:
        assert count >= 1


@every_problem
def test_on_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    problem = problems(torch.float16)[name]
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    got = called(problem, problem.on(other))
    assert all(out.device == other for out in got)
    assert torch.cuda.current_device() != other.index
    check(problem, got)


def test_tensors_on_two_devices_are_refused():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    a = torch.zeros(1, 2, 8, device="cuda:0")
    with pytest.raises(ValueError, match=r"a is on cuda:0 and g on cuda:1"):
        ops.compress_linear(a, a.to("cuda:1"))


def test_a_table_on_the_cpu_is_refused():
    a = torch.zeros(1, 2, 8, device="cuda")
    with pytest.raises(ValueError, match=r"in_index is on cpu and g on cuda:0"):
        ops.compress_linear(a, a, make_table(8, 4)[0])


@every_problem
def test_inputs_are_not_written(name):
    problem = problems(torch.float16)[name]
    args, before = problem.on("cuda"), problem.on("cuda")
    called(problem, args)
    read = slice(1, None) if problem.op in WRITES else slice(None)
    for one, other in zip(args[read], before[read], strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)

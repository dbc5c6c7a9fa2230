"""A call that looks like an earlier one does its launches again, on its own arguments; whatever differs is done anew."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import dropinf_kernels as ops
from dropinf_kernels.gpu import replay
from dropinf_kernels.ops.conv import sketch_patches
from tests.reference.helpers import make_table

Arguments = tuple[Any, ...]
N, T, D, K = 3, 5, 12, 4


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    with mock.patch.object(replay, "can_replay", return_value=True):
        yield


@pytest.fixture
def recorded(monkeypatch) -> list[object]:
    """The calls that were not done again."""
    seen: list[object] = []
    record = replay._recorded
    monkeypatch.setattr(replay, "_recorded", lambda *args: (seen.append(args[1]), record(*args))[1])
    return seen


def both(T: int = T, N: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(N, T, D), torch.randn(N, T, D)


torch.manual_seed(0)
TABLE, OTHER = make_table(D, K, 1, False, 1), make_table(D, K, 1, False, 1)
FOLD = make_table(D, K, 3, True, 1)
CU = torch.tensor([0, 2, 2, 9])
ROWS, COLS = torch.tensor([0, 3, 11], dtype=torch.int32), torch.tensor([1, 1, 7], dtype=torch.int32)
CONV = ((3, 3), (1, 1), (1, 1), (1, 1))
CALLS: dict[str, tuple[Any, Callable[[], Arguments]]] = {
    "sketch": (ops.sketch, lambda: (torch.randn(N, T, D), *TABLE)),
    "sketch-fold": (ops.sketch, lambda: (torch.randn(N, T, D), *FOLD)),
    "linear": (ops.compress_linear, lambda: (*both(), *TABLE, *OTHER)),
    "linear-long": (ops.compress_linear, lambda: (*both(T=700, N=1), *TABLE, *OTHER)),
    "linear-int8": (ops.compress_linear_int8, lambda: (*both(), *TABLE, *OTHER)),
    "linear-packed": (ops.compress_linear, lambda: (*(x[0] for x in both(9)), *TABLE, *OTHER, 1, CU)),
    "conv": (ops.compress_conv, lambda: (torch.randn(N, 2, 5, 5), torch.randn(N, D, 5, 5), *CONV, 1, *SMALL, *TABLE)),
    "patches": (sketch_patches, lambda: (torch.randn(N, 2, 5, 5), *CONV, *SMALL)),
    "embedding": (ops.compress_embedding, lambda: (torch.randint(0, D, (N, T)), both()[1], D, *TABLE, *OTHER)),
    "norm": (ops.compress_norm, lambda: (*both(), *TABLE)),
    "bias": (ops.compress_norm, lambda: (None, both()[1], *TABLE)),
    "flat": (ops.compress_flat, lambda: (*both(), ROWS, COLS)),
    "quantize": (ops.quantize_rows, lambda: (torch.randn(N, D),)),
}
SMALL = make_table(18, K, 1, False, 1)


def equals_plain(op: Any, arguments: Arguments) -> None:
    got, want = op.triton(*arguments), op.plain(*arguments)
    largest = float((want[0] if isinstance(want, tuple) else want).abs().max())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * max(1.0, largest))  # of sums, whose terms cancel


@pytest.mark.parametrize("name", CALLS)
def test_other_values_give_their_own_results(name, recorded):
    op, make = CALLS[name]
    for _ in range(3):
        equals_plain(op, make())
    assert len(recorded) == 1


@pytest.mark.parametrize("name", CALLS)
def test_results_are_new_tensors(name):
    op, make = CALLS[name]
    arguments = make()
    first = op.triton(*arguments)
    kept = [x.clone() for x in (first if isinstance(first, tuple) else (first,))]
    op.triton(*make())
    torch.testing.assert_close(first if isinstance(first, tuple) else (first,), tuple(kept), rtol=0, atol=0)


def test_what_an_op_writes_is_that_of_the_call(recorded):
    block, (a, g) = torch.zeros(N, 3 * K * K), both()
    rooms = [part.unflatten(1, (K, K)) for part in block.split(K * K, 1)]
    for room in rooms[:2]:
        ops.compress_linear_into.triton(room, a, g, *TABLE, *OTHER)
        torch.testing.assert_close(room, ops.compress_linear.plain(a, g, *TABLE, *OTHER))
        a, g = both()
    assert not rooms[2].any()
    assert len(recorded) == 1


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def shifted(x: Tensor) -> Tensor:
    """The same values, not aligned to 16 bytes."""
    return torch.empty(x.numel() + 1).to(x)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize(
    "change", [transposed, shifted, torch.Tensor.half, lambda x: x[:2], lambda x: x[:, :3], lambda x: x[..., ::2]]
)
def test_what_looks_different_is_done_anew(change, recorded):
    table, _ = make_table(D // 2, K, 1, False, 1)
    for a, g in (both(), map(change, both()), both()):
        equals_plain(ops.compress_linear, (a, g, table, None, table, None))
    assert len(recorded) == 2


def test_other_options_are_other_calls(recorded):
    table = make_table(D, K, 1, False, 4)
    a, g = both()
    for group in (1, 4, 1, 4):
        for dtype in (torch.float32, torch.float16):
            torch.testing.assert_close(
                ops.compress_linear.triton(a, g, *table, *table, group, dtype=dtype),
                ops.compress_linear.plain(a, g, *table, *table, group, dtype=dtype),
                rtol=1e-2,
                atol=1e-2,
            )
    assert len(recorded) == 4


def test_a_table_that_was_written_is_checked_again():
    x, index = torch.randn(2, D), torch.tensor([[0, 5]], dtype=torch.int32)
    for _ in range(2):
        equals_plain(ops.sketch, (x, index))
    index[0, 1] = 7
    equals_plain(ops.sketch, (x, index))
    index[0, 1] = D
    with pytest.raises(IndexError, match="index has entries"):
        ops.sketch.triton(x, index)


def test_a_table_in_the_place_of_another_is_checked(monkeypatch):
    """Another tensor may come to lie where a table was: `id` alone does not tell."""
    x, index = torch.randn(2, D), torch.tensor([[0, 5]], dtype=torch.int32)
    ops.sketch.triton(x, index)
    monkeypatch.setattr(replay, "id", lambda _: 0, raising=False)
    index = torch.tensor([[0, 5]], dtype=torch.int32)
    ops.sketch.triton(x, index)
    del index
    gc.collect()
    with pytest.raises(IndexError, match="index has entries"):
        ops.sketch.triton(x, torch.tensor([[0, D]], dtype=torch.int32))


def test_tables_of_inference_mode_are_checked_in_every_call():
    x = torch.randn(2, D)
    with torch.inference_mode():
        index = torch.tensor([[0, 5]], dtype=torch.int32)
        for _ in range(2):
            ops.sketch.triton(x, index)
        index[0, 1] = D
        with pytest.raises(IndexError, match="index has entries"):
            ops.sketch.triton(x, index)


def test_one_tensor_for_two_arguments_is_no_rule_for_two(recorded):
    x, g = both()
    for arguments in ((g, g), (x, g), (g, g), (g, x)):
        equals_plain(ops.compress_linear, (*arguments, *TABLE, *TABLE))
    assert len(recorded) == 2  # what is known of two serves one


def test_what_is_copied_first_is_copied_in_each_call(recorded):
    for _ in range(2):
        x = torch.randn(2, 2, 2, 2, D).permute(3, 0, 2, 1, 4)  # no three strides address its rows
        equals_plain(ops.sketch, (x, *TABLE))
    assert len(recorded) == 2


def test_bounds_are_checked_in_every_call():
    a, g = (x[0] for x in both(9))
    call = functools.partial(ops.compress_linear.triton, a, g, *TABLE, *OTHER, 1)
    call(cu_seqlens=torch.tensor([0, 2, 9]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(cu_seqlens=torch.tensor([0, 2, 8]))


def test_an_error_leaves_nothing_behind():
    x = torch.randn(2, D)
    for _ in range(2):
        with pytest.raises(IndexError, match="index has entries"):
            ops.sketch.triton(x, torch.tensor([[0, D]], dtype=torch.int32))
    assert replay.recording() is None
    equals_plain(ops.sketch, (x, *TABLE))


def test_few_calls_are_remembered(monkeypatch, recorded):
    monkeypatch.setattr(replay, "MOST", 2)
    for _ in range(2):
        for rows in (2, 3, 4):
            equals_plain(ops.sketch, (torch.randn(rows, 1, D), *TABLE))
    assert 4 <= len(recorded) <= 6

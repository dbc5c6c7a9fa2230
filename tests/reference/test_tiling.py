"""The tile rules: pure functions of a problem and an architecture, so they are tested without either."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dropinf_kernels.device import ARCHS
from dropinf_kernels.gpu import launch, tiling

SHAPES = [(1, 4096), (8, 512), (512, 1), (3, 0), (0, 7)]
KS = [1, 16, 48, 64, 100, 256, 1000]


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("narrow", [False, True])
def test_outer_tiles_cover_the_problem_and_fit_the_part(arch, itemsize, narrow):
    for (samples, length), k_out, k_in in itertools.product(SHAPES, KS, KS):
        for tile in tiling.outer_candidates(samples, length, k_out, k_in, itemsize, narrow, arch):
            assert tile.stages * tile.block_t * (tile.block_o + tile.block_i) * itemsize <= arch.shared_bytes
            assert tile.warps * arch.warp_size <= 1024
            # Accumulator registers a thread, of 255.
            assert tile.block_o * tile.block_i / (tile.warps * arch.warp_size) <= 128
            assert tile.block_t >= 16  # the least depth of a 16-bit matrix instruction
            assert 1 <= tile.splits <= max(1, tiling.cdiv(length, tile.block_t))


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize("k", [16, 32, 64, 100, 256, 1000])
def test_few_long_samples_use_every_multiprocessor(arch, itemsize, samples, k):
    tiles = [tiling.outer_tile(samples, 4096, k, k, itemsize, narrow, arch) for narrow in (False, True)]
    tiles.append(tiling.computed_tile(samples, 4096, k, k, itemsize, arch))
    # A matrix instruction is 16 positions deep: 32 columns of 4096 positions are 256 programs at most.
    if samples * (4096 // 16) * (k // 32) ** 2 >= arch.multiprocessors:
        for tile in tiles:
            programs = samples * tiling.cdiv(k, tile.block_o) * tiling.cdiv(k, tile.block_i)
            assert programs * busy(4096, tile.block_t, tile.splits) >= arch.multiprocessors
    tile = tiling.row_tile(samples, 4096, k, itemsize, arch)
    assert samples * tiling.cdiv(k, tile.block_k) * busy(4096, tile.block_r, tile.splits) >= min(
        arch.multiprocessors, 256
    )


def busy(length, block, splits):
    """Return how many ranges of positions are not empty, as launchers cut them."""
    return tiling.cdiv(length, block * tiling.cdiv(tiling.cdiv(length, block), splits))


@pytest.mark.parametrize("programs", [1, 5, 40, 131])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4096, 100_000])
def test_no_range_is_empty_and_none_too_small(programs, length):
    splits = tiling.splits(programs, length, 64, ARCHS["sm_90"])
    assert busy(length, 64, splits) == splits <= 256
    assert programs * splits >= min(132, programs * tiling.cdiv(length, 64))


def test_the_largest_block_that_fills_the_machine_is_chosen():
    rule = lambda samples, length, k: tiling.outer_tile(samples, length, k, k, 2, False, ARCHS["sm_90"])  # noqa: E731
    assert (rule(64, 512, 256).block_o, rule(1, 16384, 64).block_o) == (128, 64)
    few = rule(1, 4096, 64)
    assert (few.block_o, few.block_i, few.block_t) == (32, 32, 64)
    assert rule(1, 1024, 64).block_t == 16


def test_many_samples_are_not_split():
    assert tiling.outer_tile(4096, 512, 64, 64, 2, False, ARCHS["sm_90"]).splits == 1


def test_the_rule_is_the_first_candidate():
    problem = (8, 512, 200, 64, 2, False, ARCHS["sm_90"])
    first, *others = tiling.outer_candidates(*problem)
    assert first == tiling.outer_tile(*problem)
    assert others
    assert first not in others


@pytest.mark.parametrize(("group", "itemsize"), [(1, 2), (4, 2), (1, 4), (8, 2), (16, 2), (8, 4)])
def test_expected_sectors_agree_with_counting(group, itemsize):
    d, k = 4096, 512
    torch.manual_seed(0)
    counts = []
    for _ in range(50):
        runs = torch.randperm(d // group)[: k // group] * group
        columns = (runs[:, None] + torch.arange(group)).flatten()
        counts.append(torch.unique(columns * itemsize // 32).numel())
    expected = tiling.touched_sectors(d, k, group, itemsize)
    assert math.isclose(expected, sum(counts) / len(counts), rel_tol=0.03)


def test_autotune_is_opt_in_and_remembers(monkeypatch):
    timed = []
    monkeypatch.setattr(
        "triton.testing.do_bench", lambda run, **_: timed.append(run()) or {"a": 3, "b": 1, "c": 2}[run()]
    )
    launch._tuned.clear()
    assert launch.choose("op", (1,), ["a", "b", "c"], lambda tile: tile) == "a"
    assert not timed
    monkeypatch.setenv("DROPINF_AUTOTUNE", "1")
    assert launch.choose("op", (1,), ["a", "b", "c"], lambda tile: tile) == "b"
    assert len(timed) == 3
    assert launch.choose("op", (1,), ["a", "b", "c"], lambda tile: tile) == "b"
    assert len(timed) == 3
    launch._tuned.clear()

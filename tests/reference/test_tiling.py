"""The tile rules: pure functions of a problem and an architecture, so they are tested without either."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dropinf_kernels import launch, tiling
from dropinf_kernels.tiling import ARCHS

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
def test_one_long_sample_uses_every_multiprocessor_or_every_block_of_positions(arch):
    tile = tiling.outer_tile(1, 4096, 64, 64, 2, False, arch)
    assert tile.splits == min(64, 2 * arch.multiprocessors)
    tile = tiling.outer_tile(8, 4096, 64, 64, 2, False, arch)
    assert 8 * tile.splits >= arch.multiprocessors


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

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import compress_conv, conv_output_size, sketch_patches
from tests.interpreter.helpers import DTYPES, assert_close
from tests.reference.helpers import layouts, make_table

pytestmark = pytest.mark.usefixtures("poisoned")
WINDOWS = {
    "1d": ([11], [3], [2], [1], [1]),
    "2d": ([7, 6], [3, 2], [2, 1], [1, 0], [2, 3]),
    "3d": ([3, 4, 3], [2, 2, 2], [2, 1, 1], [1, 0, 1], [1, 1, 1]),
    "pointwise": ([5, 4], [1, 1], [1, 1], [0, 0], [1, 1]),
}
NONE = (None, None)
EPS = torch.finfo(torch.float32).eps


def make(name, dtype, channels=6, outputs=12, n=2):
    size, *window = WINDOWS[name]
    out = conv_output_size(size, *window)
    return torch.randn(n, channels, *size).to(dtype), torch.randn(n, outputs, *out).to(dtype), window


def check(x, g, window, groups=1, right=NONE, left=NONE, group=1, eps=EPS):
    args = (*window, groups, *right, *left, group)
    got = compress_conv.triton(x, g, *args)
    positive = [None if w is None else w.abs() if w.is_floating_point() else w for w in (*right, *left)]
    magnitude = compress_conv.plain(x.double().abs(), g.double().abs(), *window, groups, *positive, group)
    assert_close(got, compress_conv.plain(x.double(), g.double(), *args), eps, magnitude=magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(0, 0), (1, 1), (3, 1), (8, 3)])
def test_equals_the_reference(dtype, window, groups, fan_in, fan_out):
    x, g, window = make(window, dtype)
    taps = 6 // groups * math.prod(window[0])
    right = make_table(taps, 5, fan_in, fan_in > 1) if fan_in else NONE
    left = make_table(12, 4, fan_out, fan_out > 1) if fan_out else NONE
    check(x, g, window, groups, right, left, eps=torch.finfo(dtype if fan_out > 1 else torch.float32).eps)


@pytest.mark.parametrize("group", [4, 8, 16])
def test_runs(group):
    x, g, window = make("2d", torch.float16, channels=16, outputs=32)
    check(x, g, window, 1, make_table(96, 16, 1, False, group), make_table(32, 16, 1, False, group), group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("fan_in", [1, 3])
def test_patches(dtype, window, fan_in):
    x, _, window = make(window, dtype)
    table = make_table(6 * math.prod(window[0]), 7, fan_in, fan_in > 1)
    got = sketch_patches.triton(x, *window, *table)
    positive = (table[0], None if table[1] is None else table[1].abs())
    magnitude = sketch_patches.plain(x.double().abs(), *window, *positive)
    assert got.dtype == dtype
    assert_close(got, sketch_patches.plain(x.double(), *window, *table), torch.finfo(dtype).eps, 4, magnitude)


@pytest.mark.parametrize("layout", ["sliced", "turned", "outer", "expanded", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2])
def test_strides(layout, groups):
    x, g, window = make("2d", torch.float32)
    if layout == "expanded":
        x, g = x[:1].expand_as(x), g[:, :1].expand_as(g)
    elif layout == "channels_last":
        x, g = x.to(memory_format=torch.channels_last), g.to(memory_format=torch.channels_last)
    else:
        x, g = layouts(x)[layout], layouts(g)[layout]
    check(x, g, window, groups, make_table(6 // groups * 6, 5), make_table(12, 4))


def test_long_samples_are_split_and_give_the_same_bits_again():
    x, g, window = torch.randn(1, 3, 20, 15), torch.randn(1, 4, 20, 15), ([3, 3], [1, 1], [1, 1], [1, 1])
    check(x, g, window)
    assert torch.equal(compress_conv.triton(x, g, *window, 1), compress_conv.triton(x, g, *window, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_no_samples_and_no_columns(groups):
    x, g, window = make("2d", torch.float32, n=0)
    check(x, g, window, groups)
    x, g, window = make("2d", torch.float32)
    check(x, g, window, groups, (torch.zeros(1, 0, dtype=torch.int32), None))


def test_bad_input():
    x, g, window = make("1d", torch.float32)
    with pytest.raises(IndexError, match="in_index has entries from 18 to 18"):
        compress_conv.triton(x, g, *window, 1, torch.tensor([[18]], dtype=torch.int32))
    with pytest.raises(ValueError, match="g has shape"):
        compress_conv.triton(x, g[..., :2], *window, 1)
    with pytest.raises(IndexError, match="index has entries from -1 to -1"):
        sketch_patches.triton(x, *window, torch.tensor([[-1]], dtype=torch.int32))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 3),
    size=st.integers(3, 9),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 1),
    groups=st.sampled_from([1, 2]),
)
def test_random_shapes(n, size, kernel, stride, padding, dilation, groups):
    window = ([kernel] * 2, [stride] * 2, [padding] * 2, [dilation] * 2)
    out = conv_output_size([size, size], *window)
    x, g = torch.randn(n, 4, size, size), torch.randn(n, 2, *out)
    check(x, g, window, groups, make_table(4 // groups * kernel**2, 3), make_table(2, 2))

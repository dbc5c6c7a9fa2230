from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dropinf_kernels as kernels
from tests.reference.helpers import assert_near, dense, layouts, make_table

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: [11], 2: [7, 6], 3: [5, 4, 6]}


def window(kernel_size, stride, padding, dilation):
    return [list(v) for v in (kernel_size, stride, padding, dilation)]


def per_sample_gradients(x: Tensor, g: Tensor, args: list[list[int]], groups: int) -> Tensor:
    """Return the gradients of the real module's weight, one backward per sample, as [N, C_out, taps]."""
    layer = CONVS[x.dim() - 2](x.shape[1], g.shape[1], *args, groups=groups, bias=False, dtype=torch.float64)
    grads = [
        torch.autograd.grad((layer(x[n : n + 1].double()) * g[n : n + 1].double()).sum(), layer.weight)[0]
        for n in range(x.shape[0])
    ]
    return torch.stack(grads).flatten(2)


def check(x, g, args, groups, tables, group=1):
    got = kernels.compress_conv(x, g, *args, groups, *tables, group)
    in_index, in_weight, out_index, out_weight = tables
    taps = x.shape[1] // groups * math.prod(args[0])
    grads = per_sample_gradients(x, g, args, groups)
    want = dense(out_index, out_weight, g.shape[1]) @ grads @ dense(in_index, in_weight, taps).T
    assert_near(got, want, torch.promote_types(x.dtype, g.dtype))


def random_case(spatial, groups, per_in, per_out, args, dtype=torch.float64):
    x = torch.randn(3, groups * per_in, *SIZES[spatial]).to(dtype)
    out = kernels.conv_output_size(x.shape[2:], *args)
    return x, torch.randn(3, groups * per_out, *out).to(dtype)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation"),
    [
        ((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
        ((3, 2, 2), (2, 1, 3), (1, 2, 0), (1, 2, 1)),
        ((2, 3, 1), (1, 2, 1), (3, 0, 1), (3, 1, 2)),
    ],
)
def test_conv_equals_folded_autograd(spatial, groups, kernel_size, stride, padding, dilation):
    args = window(kernel_size[:spatial], stride[:spatial], padding[:spatial], dilation[:spatial])
    x, g = random_case(spatial, groups, 2, 3, args)
    taps = 2 * math.prod(args[0])
    check(x, g, args, groups, (None, None, None, None))
    check(x, g, args, groups, (*make_table(taps, 5, 3, True), *make_table(3 * groups, 4, 2, True)))


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("per_out", [1, 2])
@pytest.mark.parametrize("fan_in", [1, 3])
def test_depthwise(spatial, per_out, fan_in):
    args = window([3] * spatial, [1] * spatial, [1] * spatial, [1] * spatial)
    x, g = random_case(spatial, 4, 1, per_out, args)
    taps = 3**spatial
    check(x, g, args, 4, (None, None, None, None))
    check(x, g, args, 4, (*make_table(taps, 5, 2, True), None, None))
    check(x, g, args, 4, (*make_table(taps, 2), *make_table(4 * per_out, 3, fan_in, fan_in > 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("group", [1, 4])
def test_conv_dtypes_and_runs(dtype, groups, group):
    args = window([2, 2], [1, 1], [1, 0], [1, 1])
    x, g = random_case(2, groups, 2, 4, args, dtype)
    tables = (*make_table(8, 4, 2, True, group), *make_table(4 * groups, 4, 2, True, group))
    check(x, g, args, groups, tables, group)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_conv_random_shapes(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    spatial, groups, per_in, per_out = draw(1, 3), draw(1, 3), draw(1, 2), draw(1, 3)
    args = window(*([draw(low, high) for _ in range(spatial)] for low, high in [(1, 3), (1, 3), (0, 2), (1, 1)]))
    x, g = random_case(spatial, groups, per_in, per_out, args)
    taps = per_in * math.prod(args[0])
    fan_in = draw(1, 4)
    check(
        x,
        g,
        args,
        groups,
        (*make_table(taps, draw(1, 6), fan_in, True), *make_table(groups * per_out, 4, fan_in)),
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_conv_strides_do_not_matter(groups, padding):
    args = window([3, 2], [2, 1], [padding] * 2, [1, 1])
    x, g = random_case(2, groups, 2, 3, args, torch.float32)
    tables = (*make_table(12, 5, 2, True), *make_table(3 * groups, 4, 2, True))
    want = kernels.compress_conv(x, g, *args, groups, *tables)
    patches = kernels.sketch_patches(x, *args, *tables[:2]) if groups == 1 else None
    odd = {**layouts(x), "channels_last": x.to(memory_format=torch.channels_last)}
    for name, y in odd.items():
        h = layouts(g).get(name, g.to(memory_format=torch.channels_last))
        torch.testing.assert_close(kernels.compress_conv(y, h, *args, groups, *tables), want, msg=name)
        if patches is not None:
            torch.testing.assert_close(kernels.sketch_patches(y, *args, *tables[:2]), patches, msg=name)
    one = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(
        kernels.compress_conv(one, g, *args, groups, *tables),
        kernels.compress_conv(one.contiguous(), g, *args, groups, *tables),
    )


@pytest.mark.parametrize("groups", [1, 4])
def test_chunks_do_not_change_the_result(groups, monkeypatch):
    args = window([3, 3], [1, 1], [1, 1], [1, 1])
    x, g = random_case(2, groups, 1, 2, args)
    tables = (None, None, *make_table(2 * groups, 5, 2, True))
    want = kernels.compress_conv(x, g, *args, groups, *tables)
    index, weight = make_table(9 * groups, 7, 2, True)
    patches = kernels.sketch_patches(x, *args, index, weight)
    for budget in (1, 7 * 6 * 8 * 2, 7 * 6 * 8 * 20):
        monkeypatch.setattr("dropinf_kernels.ops.conv.PATCH_BYTES", budget)
        torch.testing.assert_close(kernels.compress_conv(x, g, *args, groups, *tables), want)
        torch.testing.assert_close(kernels.sketch_patches(x, *args, index, weight), patches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("fan_in", "weighted"), [(1, False), (4, True)])
def test_sketch_patches_equals_a_sketched_unfold(dtype, fan_in, weighted):
    args = window([3, 2], [2, 1], [1, 2], [1, 2])
    x = torch.randn(2, 3, 7, 6).to(dtype)
    index, weight = make_table(18, 5, fan_in, weighted)
    got = kernels.sketch_patches(x, *args, index, weight)
    assert got.dtype == dtype
    assert got.mT.is_contiguous()
    columns = nn.functional.unfold(x.double(), args[0], args[3], args[2], args[1])
    want = columns.transpose(1, 2) @ dense(index, weight, 18).T
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=8 * eps if dtype.itemsize > 2 else 1e-6)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 40])  # few taps are copied one by one, many gathered
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation"),
    [
        ((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
        ((3, 2, 2), (2, 1, 3), (1, 2, 0), (1, 2, 1)),
        ((2, 3, 1), (1, 2, 1), (3, 0, 1), (3, 1, 2)),
        ((2, 1, 2), (3, 4, 2), (7, 9, 8), (2, 1, 1)),  # windows wholly outside
    ],
)
def test_every_tap_of_a_patch(spatial, channels, weighted, kernel_size, stride, padding, dilation):
    args = window(kernel_size[:spatial], stride[:spatial], padding[:spatial], dilation[:spatial])
    x = torch.randn(2, channels, *SIZES[spatial], dtype=torch.float64)
    taps = channels * math.prod(args[0])
    index, weight = make_table(taps, taps, 1, weighted)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[spatial - 1]
    units = torch.eye(taps, dtype=torch.float64).view(taps, channels, *args[0])
    patches = convolve(x, units, None, *args[1:3], args[3]).flatten(2).mT
    want = patches @ dense(index, weight, taps).T
    torch.testing.assert_close(kernels.sketch_patches(x, *args, index, weight), want)


class LargestTensor(TorchDispatchMode):
    """Record the storage of the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("groups", [1, 32])
def test_conv_never_holds_an_unfold(groups):
    x, g = torch.randn(16, 32, 32, 32), torch.randn(16, 32, 32, 32)
    args = window([3, 3], [1, 1], [1, 1], [1, 1])
    unfold = x.numel() * 9 * 4
    with LargestTensor() as largest:
        kernels.compress_conv(x, g, *args, groups)
    assert largest.bytes <= 5 << 20
    assert unfold > 3 * largest.bytes
    with LargestTensor() as largest:
        nn.functional.unfold(x, 3, padding=1)
    assert largest.bytes >= unfold


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_empty_and_single(groups):
    args = window([1], [1], [0], [1])
    for n in (0, 1):
        x, g = torch.randn(n, 2, 1), torch.randn(n, 4, 1)
        assert kernels.compress_conv(x, g, *args, groups).shape == (n, 4, 2 // groups)
    nothing = torch.zeros(1, 0, dtype=torch.int32)
    x, g = torch.randn(3, 2, 5), torch.randn(3, 4, 5)
    assert kernels.compress_conv(x, g, *args, groups, out_index=nothing).shape == (3, 0, 2 // groups)
    assert kernels.compress_conv(x, g, *args, groups, in_index=nothing).shape == (3, 4, 0)
    assert kernels.sketch_patches(torch.randn(0, 2, 5), *args, nothing).shape == (0, 5, 0)


X, G = torch.ones(2, 4, 6), torch.ones(2, 6, 4)
GOOD = {
    "x": X, "g": G, "kernel_size": [3], "stride": [1], "padding": [0], "dilation": [1], "groups": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x has shape \[4, 6\]; it must have 3 or 4 or 5 dimensions"),
        ({"g": G[:1]}, ValueError, r"g has shape \[1, 6, 4\]; it must be \[2, C_out, 4\]"),
        ({"g": G[..., :3]}, ValueError, "g has shape"),
        ({"g": G[:, :5]}, ValueError, "C_out a multiple of groups, 2"),
        ({"groups": 3}, ValueError, "groups is 3"),
        ({"stride": [1, 1]}, ValueError, "stride is .*one entry per spatial axis, 1"),
        ({"stride": [0]}, ValueError, "stride is .*at least 1"),
        ({"padding": [-1]}, ValueError, "padding is .*at least 0"),
        ({"kernel_size": [7]}, ValueError, "kernel_size .* does not fit"),
        ({"in_index": torch.full((1, 2), 6, dtype=torch.int32)}, IndexError, r"in_index .*\[0, 6\)"),
        ({"out_index": torch.full((1, 2), -1, dtype=torch.int32)}, IndexError, r"out_index .*\[0, 6\)"),
        ({"out_index": torch.zeros(1, 2)}, TypeError, "out_index has dtype torch.float32"),
    ],
)
def test_conv_bad_input_names_the_argument(change, error, message):
    kernels.compress_conv(**GOOD)
    with pytest.raises(error, match=message):
        kernels.compress_conv(**{**GOOD, **change})


def test_sketch_patches_bad_index():
    with pytest.raises(IndexError, match=r"^index has entries from 0 to 12.*\[0, 12\)"):
        kernels.sketch_patches(X, [3], [1], [0], [1], torch.tensor([[0, 12]], dtype=torch.int32))

"""A calibration that fails adds nothing: its moments are those of before, bit for bit, and it can be repeated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf

SKETCHES = [
    dropinf.PCA(2),
    dropinf.Dropout(2, sampling="energy"),
    dropinf.Dropout(2, rank=4),
    dropinf.Gaussian(3, whiten=True),
]


class Planted(Exception):  # noqa: N818
    """What no code expects."""


class Model(nn.Module):
    """Layers on hooks and one without, whose moments come in another way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) * self.scale)


class Loss:
    """Raises an error on its nth call of a batch that is marked."""

    def __init__(self):
        self.error, self.calls = None, 0

    def __call__(self, model, batch):
        x, y, mark = batch
        if self.error is not None and mark == "bad":
            self.calls -= 1
            if self.calls < 0:
                raise self.error
        return F.cross_entropy(model(x), y, reduction="none")


def batches(seed, count=3, size=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator), "good")
        for _ in range(count)
    ]


def moments(compressor):
    return {(n, s): t.clone() for n in ("first", "second", "scale") for s, t in compressor.moments(n).items()}


def masks(compressor):
    axes = [a for layer in compressor._layers.values() for a in (layer.out_axis, layer.in_axis) if a is not None]
    return [t.clone() for a in axes for t in (a.index, a.weight, a.matrix) if t is not None]


def assert_same(found, expected):
    assert len(found) == len(expected)
    keys = expected if isinstance(expected, dict) else range(len(expected))
    for key in keys:
        assert torch.equal(found[key], expected[key]), key


def fail(compressor, loss, how, calls):
    """Calibrate on three batches, the last of which fails."""
    bad = batches(2)
    if how == "loader":

        def loader():
            yield from bad
            raise OSError("a file is gone")

        with pytest.raises(OSError, match="a file is gone"):
            compressor.calibrate(loader())
        return
    if how == "nan":
        bad[2][0][1, 1] = float("nan")
        with pytest.raises(ValueError, match="calibration met a value that is not finite"):
            compressor.calibrate(bad)
        return
    bad[2] = (*bad[2][:2], "bad")
    loss.error, loss.calls = {"error": Planted(), "interrupt": KeyboardInterrupt(), "memory": MemoryError()}[how], calls
    with pytest.raises(type(loss.error)):
        compressor.calibrate(bad)
    loss.error = None


@pytest.mark.parametrize(
    ("how", "calls"),
    [("nan", 0), ("loader", 0), ("error", 0), ("interrupt", 0), ("memory", 0), ("interrupt", 1), ("memory", 1)],
)
@pytest.mark.parametrize("before", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("sketch", SKETCHES, ids=repr)
@pytest.mark.filterwarnings("ignore:layers scale")
def test_a_calibration_that_fails(sketch, before, how, calls):
    loss = Loss()
    compressor, same = (dropinf.Compressor(Model().eval(), sketch, loss) for _ in range(2))
    if before:
        for c in (compressor, same):
            c.calibrate(batches(1))
    old, drawn, samples = moments(compressor), masks(compressor), compressor._moments.samples
    fail(compressor, loss, how, calls)
    assert_same(moments(compressor), old)
    assert_same(masks(compressor), drawn)
    assert compressor._moments.samples == samples
    if not before:
        with pytest.raises(RuntimeError, match=r"call compressor\.calibrate\(batches\) first"):
            compressor.compress(batches(4))
    for c in (compressor, same):
        c.calibrate(batches(3))
    assert_same(moments(compressor), moments(same))
    assert_same(masks(compressor), masks(same))
    assert compressor._moments.samples == 12 * (1 + before)
    assert compressor.digest() == same.digest()

"""How often the host waits for the device in a batch like those before: once, and as often again to an index.

However many layers there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropinf
import dropinf_kernels as ops
from dropinf.capture import moments
from dropinf_kernels.gpu.launch import check_cu_seqlens
from tests.gpu_like.architectures import build
from tests.gpu_like.helpers import on_gpu, on_hooks
from tests.gpu_like.pretend import CUDA, Gpu, move

N, T, WIDTH = 4, 3, 8
LATER = pytest.mark.kernels  # left to `make test-kernels`
STEADY = 4  # the fifth batch of a call: not the first, none that is audited by its number


class Batches:
    """Batches that note how often the host has waited as each is asked for."""

    def __init__(self, gpu: Gpu, batches: list[Any]) -> None:
        self.gpu, self.batches = gpu, batches
        self.marks: list[int] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.marks.clear()
        for batch in self.batches:
            self.marks.append(len(self.gpu.waits))
            yield batch

    @property
    def steady(self) -> dict[tuple[str, str], int]:
        """The waits of a batch like those before: (what, file) -> how many. Those of the model and loss do not count."""
        found = self.gpu.waits[self.marks[STEADY] : self.marks[STEADY + 1]]
        return dict(Counter((what, at.split(":")[0]) for what, at in found if at.startswith(("python/", "dropinf_"))))


class OwnRMSNorm(nn.Module):
    """An RMSNorm as transformers' models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(WIDTH) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def stack(depth: int) -> nn.Module:
    torch.manual_seed(1)
    blocks = [m for _ in range(depth) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh(), OwnRMSNorm(), nn.LayerNorm(WIDTH))]
    return move(nn.Sequential(nn.Embedding(20, WIDTH), *blocks))


def sines(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).sin().flatten(1).sum(1)


def packed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    each = model(batch[0][None])[0].sin().sum(-1)
    return torch.stack([document.sum() for document in each.split(batch[1].cpu().diff().tolist())])


def ids_of(*shape: int) -> list[Tensor]:
    return [torch.randint(0, 20, shape).to(CUDA) for _ in range(STEADY + 2)]


TAPS = ("item", "python/dropinf/capture/taps.py")
ASKED = {TAPS: 1}  # whether gradients are finite, and all else as it was taken to be: asked once
COPY = "copy to the CPU"
WRITTEN = {(COPY, "python/dropinf/index/fingerprint.py"): 1}


@pytest.mark.parametrize(("depth", "device"), [(1, "cpu"), (3, "cpu"), (3, CUDA)])
def test_rows_in_memory(gpu, depth, device):
    batches, compressor = Batches(gpu, ids_of(N, T)), dropinf.Compressor(stack(depth), dropinf.Dropout(4), sines)
    compressor.compress(batches, device=device)
    assert on_hooks(compressor)
    assert batches.steady == ASKED


@pytest.mark.parametrize("depth", [pytest.param(1, marks=LATER), 3])
def test_rows_to_an_index(gpu, depth, tmp_path):
    batches, compressor = Batches(gpu, ids_of(N, T)), dropinf.Compressor(stack(depth), dropinf.Dropout(4), sines)
    compressor.compress(batches, out=tmp_path / "index")
    assert batches.steady == ASKED | WRITTEN


@pytest.mark.parametrize(
    ("depth", "sketch"),
    [
        pytest.param(1, dropinf.PCA(4), marks=LATER),
        (3, dropinf.PCA(4)),
        pytest.param(3, dropinf.Dropout(4, sampling="energy"), marks=LATER),
    ],
)
def test_calibration(gpu, depth, sketch):
    batches = Batches(gpu, ids_of(N, T))
    dropinf.Compressor(stack(depth), sketch, sines, layers=(nn.Linear, OwnRMSNorm, nn.LayerNorm)).calibrate(batches)
    assert batches.steady == {TAPS: 2}  # norms, and whether the sums are finite


def test_sums_that_are_too_large_leave_the_device(gpu, monkeypatch):
    batches, axes = Batches(gpu, ids_of(N, T)), []
    for most in (moments.ON_DEVICE, 0):
        monkeypatch.setattr(moments, "ON_DEVICE", most)
        compressor = dropinf.Compressor(stack(1), dropinf.PCA(4), sines, layers=nn.Linear)
        compressor.calibrate(batches)
        assert not any(total.is_cuda for total in compressor._moments.sums.values())
        axes.append(compressor.layers["1"].out_axis.matrix)
    assert batches.steady[COPY, "python/dropinf/capture/moments.py"] == 3
    torch.testing.assert_close(*axes)


@LATER
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("bounds_on", ["cpu", "cuda:0"])
def test_packed_documents(gpu, depth, bounds_on):
    cu = torch.tensor([0, 3, 4, 10])
    batches = Batches(gpu, [(ids, cu.to(bounds_on)) for ids in ids_of(10)])
    compressor = dropinf.Compressor(stack(depth), dropinf.Dropout(4), packed, cu_seqlens=lambda batch: batch[1])
    compressor.compress(batches)
    assert on_hooks(compressor)
    # Lengths that the loss reads as numbers: samples are found anew in each batch. Of bounds on the device, how many rows
    read = {("item", "python/dropinf/capture/samples.py"): 1} if bounds_on == "cuda:0" else {}  # there are is read once
    assert batches.steady == ASKED | read


@LATER
def test_parameters_at_ops_find_their_entries_once(gpu):
    """Gemma 3's embedding is also its head."""
    model, batch, loss_fn = build("gemma3")
    batches = Batches(gpu, [on_gpu(batch)] * (STEADY + 2))
    compressor = dropinf.Compressor(move(model), dropinf.Dropout(4), loss_fn)
    compressor.compress(batches)
    assert compressor._sweep.ladder.on("op")
    assert batches.steady == ASKED


def test_tables_are_checked_until_they_are_written(gpu):
    x, table = torch.ones(2, 8).to(CUDA), torch.tensor([[0, 5], [1, 3]], dtype=torch.int32).to(CUDA)
    for view in (table, table[:1], table[1:]):
        for waits in (True, False):
            gpu.waits.clear()
            ops.sketch(x, view[:])
            assert bool(gpu.waits) == waits
    table[1, 0] = 9
    assert ops.sketch(x, table[:1]).shape == (2, 2)
    with pytest.raises(IndexError, match="index has entries from 3 to 9"):
        ops.sketch(x, table[1:])


def test_bounds_of_documents_are_asserted_until_they_are_written(gpu, monkeypatch):
    asserted: list[str] = []
    monkeypatch.setattr(torch, "_assert_async", lambda fine, message: asserted.append(message))
    cu, counts = torch.tensor([0, 2, 6]).to(CUDA), []
    for write in (False, False, True, False):
        if write:
            cu[1] += 1
        check_cu_seqlens(cu, 6, CUDA)
        counts.append(len(asserted))
    assert counts == [1, 1, 2, 2]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_cu_seqlens(cu, 6, CUDA)  # the graph asserts in each replay
    assert len(asserted) == 3

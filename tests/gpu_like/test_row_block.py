"""A batch's rows on a GPU are one block, which kernels of linear layers write; nothing puts them side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropinf
from dropinf import builder
from dropinf.capture.row_block import RowBlock
from tests.gpu_like.helpers import near, on_gpu
from tests.gpu_like.pretend import CUDA, move

WIDTH, ODD = 8, 7


class Model(nn.Module):
    """Layers that are there, called twice, left out in some batches, and others than linear ones."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.again = kind, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.odd = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, ODD)
        self.rare = nn.Linear(WIDTH, WIDTH, bias=False)
        if kind == "tied":
            self.again.weight = self.first.weight

    def forward(self, x):
        x = self.first(x)
        for _ in range(2 if self.kind == "twice" else 1):
            x = self.norm(self.again(x).tanh())
        if self.kind != "rare" or x.shape[1] > 3:
            x = x + self.rare(x)
        return self.odd(x)


def squares(model, x):
    return model(x).square().flatten(1).sum(1)


def batches(dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(n, t, WIDTH, dtype=dtype) for n, t in ((3, 4), (2, 5), (3, 2), (1, 3), (2, 6))]


def compressed(model, data, sketch):
    compressor = dropinf.Compressor(model, sketch, squares, audit="never")
    compressor.calibrate(data[:1])
    return compressor.compress(data)


SKETCHES = {
    "masks": dropinf.Dropout(4),
    "runs": dropinf.Dropout(4, group=4),
    "flat": dropinf.Dropout(9, mode="flat"),
    "rotated": dropinf.Dropout(2, rank=4),
    "sums": dropinf.SJLT(4),
    "dense": dropinf.Gaussian(4),
    "whole": dropinf.Identity(),
}


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("kind", ["plain", "twice", "rare", "tied"])
def test_rows_are_those_of_the_cpu(gpu, kind, sketch):
    here = compressed(Model(kind), batches(), SKETCHES[sketch])
    there = compressed(move(Model(kind)), on_gpu(batches()), SKETCHES[sketch])
    near(there.flat, here.flat, 10)


def test_rows_in_float64_are_those_of_the_cpu(gpu):
    here = compressed(Model("plain").double(), batches(torch.float64), dropinf.Dropout(4))
    there = compressed(move(Model("plain").double()), on_gpu(batches(torch.float64)), dropinf.Dropout(4))
    assert there.dtype == torch.float64
    torch.testing.assert_close(there.flat.cpu(), here.flat)


class WithoutCat:
    """torch, but what puts tensors side by side."""

    def __getattr__(self, name):
        return pytest.fail("layers were put side by side") if name == "cat" else getattr(torch, name)


@pytest.mark.parametrize("kind", ["plain", "twice", "rare", "tied"])
def test_nothing_puts_layers_side_by_side(gpu, kind, monkeypatch, tmp_path):
    model, data = move(Model(kind)), on_gpu(batches())
    compressor = dropinf.Compressor(model, dropinf.Dropout(4), squares)
    want = compressor.compress(data)  # batches are audited, at their first look
    monkeypatch.setattr(builder, "torch", WithoutCat())
    into = []
    compressor.stream(data, lambda rows: into.append(rows.clone()))
    got = compressor.compress(data)
    monkeypatch.undo()
    assert torch.equal(got.flat, want.flat)
    assert torch.equal(torch.cat([rows.cpu() for rows in into]), want.flat)


def test_a_kernel_writes_each_linear_layer_into_the_block(gpu, monkeypatch):
    taken = []
    take = RowBlock.take

    def noted(block, name, *rest):
        room = take(block, name, *rest)
        taken.append((name, room is not None))
        return room

    monkeypatch.setattr(RowBlock, "take", noted)
    compressed(move(Model("twice")), on_gpu(batches()[:1]), dropinf.Dropout(4))
    names = "first", "again", "odd", "rare"
    assert sorted(taken) == sorted([*((name, True) for name in names), ("again", False)])


def test_a_block_has_room_for_its_own_kind_alone(gpu):
    compressor = dropinf.Compressor(move(Model("plain")), dropinf.Dropout(4), squares)
    block, g = RowBlock(compressor.layers), on_gpu(torch.randn(2, 3))
    room = block.take("first", 2, g)
    assert room.shape == (2, 4, 4)
    assert not room.is_contiguous()
    for name, n, like in (
        ("first", 2, g),
        ("odd", 3, g),
        ("odd", 2, g.double()),
        ("odd", 2, torch.randn(2, 3)),
    ):
        assert block.take(name, n, like) is None
    assert block.take("odd", 2, g) is not None


def test_what_is_no_block_is_copied(gpu):
    block = torch.arange(12.0, device="cpu").view(2, 6).to(CUDA)
    for parts in (block.split(2, 1)[::-1], block.split(2, 1)[1:], [block[:, :2], block[:, 4:]]):
        got = builder.side_by_side(list(parts))
        assert torch.equal(got.cpu(), torch.cat([part.cpu() for part in parts], 1))
        assert got.untyped_storage().data_ptr() != block.untyped_storage().data_ptr()
    whole = builder.side_by_side(block.split([1, 3, 2], 1))
    assert whole.data_ptr() == block.data_ptr()
    assert torch.equal(whole.cpu(), block.cpu())


def test_memory_that_a_loss_reaches_for(gpu):
    """Lengths that stay on the CPU are read by NumPy; a tensor on the GPU is shown."""

    def loss(m, batch):
        x, lengths = batch
        assert repr(x)
        return m(x).square().flatten(1).sum(1) * torch.as_tensor(1.0 + lengths.numpy().astype("float32")).to(x.device)

    plain = [(x, torch.arange(len(x))) for x in batches()]
    moved = [(on_gpu(x), lengths) for x, lengths in plain]
    here = dropinf.Compressor(Model("plain"), dropinf.Dropout(4), loss).compress(plain)
    there = dropinf.Compressor(move(Model("plain")), dropinf.Dropout(4), loss).compress(moved)
    near(there.flat, here.flat, 10)

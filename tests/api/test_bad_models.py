"""Models whose gradients would be wrong: those that mix samples, change activations in place, or draw at random."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def squared(model, x):
    return model(x).square().flatten(1).sum(1)


def batches(count=3, size=4):
    return [(torch.randn(size, 5), torch.randint(0, 3, (size,))) for _ in range(count)]


def compress(model, data, loss, sketch=None, **options):
    return dropinf.Compressor(model, sketch or dropinf.Dropout(3), loss, **options).compress(data)


def test_batchnorm_in_train_mode():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"BatchNorm '1' is in train mode.*mixes the samples.*model.eval\(\)"):
        compress(model, batches(), loss_fn)
    compress(model.eval(), batches(), loss_fn)
    stateless = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="BatchNorm '1' has no running statistics"):
        compress(stateless, batches(), loss_fn)


class Mixing(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.first, self.second, self.mix = nn.Linear(5, 4), nn.Linear(4, 3), mix

    def forward(self, x):
        return self.second(self.mix(self.first(x)))


@pytest.mark.parametrize("samples", [2, 3, 4, 7])
@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h - h.mean(0),
        lambda h: h.softmax(0),
        lambda h: h.cumsum(0),  # the first loss alone would not show it
        lambda h: h.flip(0).cumsum(0).flip(0),  # nor the last alone
        lambda h: h + h.roll(1, 0),
        lambda h: F.batch_norm(h, None, None, training=True),
    ],
    ids=["mean", "softmax", "cumsum", "reversed", "roll", "norm"],
)
def test_a_module_that_mixes_samples(mix, samples):
    with pytest.raises(
        dropinf.AttributionError,
        match=rf"layer first: the losses of samples \d and \d \(of the {samples} samples .*mixing=True",
    ):
        compress(Mixing(mix), [torch.randn(samples, 5)], squared)


def test_packed_documents_that_mix():
    cu = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    document = torch.repeat_interleave(cu.diff())

    def loss(model, x):
        return torch.zeros(3).index_add(0, document, model(x).square().sum(1))

    with pytest.raises(dropinf.AttributionError, match=r"layer first: the losses of samples \d and \d"):
        compress(Mixing(lambda h: h.cumsum(0)), [torch.randn(6, 5)], loss, cu_seqlens=lambda _: cu)
    assert len(compress(Mixing(torch.tanh), [torch.randn(6, 5)], loss, cu_seqlens=lambda _: cu)) == 3


class InPlace(nn.Module):
    """Modifies the input of its second layer after that layer has read it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.first(x) * 1.0
        y = self.second(h)
        h.add_(1.0)
        return y * 2 + h


@pytest.mark.parametrize(
    "sketch",
    [
        dropinf.Identity(),
        dropinf.Dropout(64),
        dropinf.Dropout(64, mode="flat"),
        dropinf.Gaussian(64),
        dropinf.Dropout(3),
        dropinf.Dropout(2, mode="flat"),
        dropinf.Gaussian(3),
        dropinf.SJLT(3),
    ],
    ids=lambda v: f"{v!r} {v.mode}",
)
def test_an_activation_modified_in_place(sketch):
    """Autograd itself refuses such a model. Where it is not asked, gathered copies do not care, and the rest is refused."""

    class OutOfPlace(InPlace):
        def forward(self, x):
            h = self.first(x) * 1.0
            return self.second(h) * 2 + (h + 1.0)

    model, same, x = InPlace().double(), OutOfPlace().double(), torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        compress(model, [x], squared, sketch)
    same.load_state_dict(model.state_dict())
    expected = compress(same, [x], squared, sketch).flat
    try:
        found = compress(model, [x], squared, sketch, audit="never").flat
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017  either is right
    else:
        torch.testing.assert_close(found, expected)


def test_ids_modified_in_place():
    class Shifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, ids):
            ids = ids.clone()
            h = self.table(ids)
            ids.add_(1)
            return self.head(h)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        compress(Shifting(), [torch.randint(0, 6, (4, 3))], squared)


def test_dropout_layers_in_train_mode_warn():
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"train mode and 1 drops activations at random.*model\.eval\(\)"):
        compress(model, batches(), loss_fn)

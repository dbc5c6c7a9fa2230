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


@pytest.mark.parametrize("sketch", [dropinf.Dropout(3), dropinf.PCA(2)], ids=["dropout", "pca"])
@pytest.mark.parametrize("steps", [3, 4, 6, 8])
def test_sequence_first_inputs_cannot_be_tied(steps, sketch):
    """[T, N, d], also where T is a multiple of N and the shape alone would not tell."""
    model = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(
        ValueError, match=rf"layer 0: .*\[{steps}, 4, 4\] cannot be tied to the 4 samples.*batch_first=True.*layers="
    ):
        dropinf.compress(
            model, [torch.randn(4, steps, 5)], lambda m, x: m(x.transpose(0, 1)).square().sum((0, 2)), sketch
        )


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
        ValueError,
        match=rf"layer first: .*\[{samples}, 4\] cannot be tied to the {samples} samples.*must not mix them",
    ):
        compress(Mixing(mix), [torch.randn(samples, 5)], squared)


def test_packed_documents_that_mix():
    cu = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    document = torch.repeat_interleave(cu.diff())

    def loss(model, x):
        return torch.zeros(3).index_add(0, document, model(x).square().sum(1))

    with pytest.raises(ValueError, match=r"layer first: .* cannot be tied to the 3 samples"):
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


def test_an_activation_modified_in_place():
    model, x = InPlace().double(), torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"layer second: its input was modified in place.*out-of-place operation"):
        compress(model, [x], squared, dropinf.Identity())
    # A gathered copy does not care: the result is right.
    gathered = dropinf.Compressor(model, dropinf.Dropout(3), squared)
    layer, c = gathered.layers["second"], gathered.compress([x])["second"]
    h = model.first(x)
    y = (model.second(h) * 2 + h + 1).detach()
    whole = (4 * y)[:, :, None] * h.detach()[:, None]
    torch.testing.assert_close(c, whole[:, layer.out_axis.index[0]][:, :, layer.in_axis.index[0]])


@pytest.mark.parametrize(
    ("sketch", "gathers"),
    [
        (dropinf.Dropout(64), False),
        (dropinf.Dropout(64, mode="flat"), False),
        (dropinf.Gaussian(64), False),
        (dropinf.Dropout(3), True),
        (dropinf.Dropout(2, mode="flat"), True),
        (dropinf.Gaussian(3), True),
        (dropinf.SJLT(3), True),
    ],
    ids=lambda v: f"{v!r} {v.mode}" if isinstance(v, dropinf.Sketch) else "",
)
def test_in_place_is_an_error_where_the_axis_is_whole_and_right_elsewhere(sketch, gathers):
    class OutOfPlace(InPlace):
        def forward(self, x):
            h = self.first(x) * 1.0
            return self.second(h) * 2 + (h + 1.0)

    model, x = InPlace(), torch.randn(4, 5)
    if not gathers:
        with pytest.raises(RuntimeError, match="layer second: its input was modified in place"):
            compress(model, [x], squared, sketch)
        return
    same = OutOfPlace()
    same.load_state_dict(model.state_dict())
    torch.testing.assert_close(compress(model, [x], squared, sketch).flat, compress(same, [x], squared, sketch).flat)


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

    with pytest.raises(RuntimeError, match="layer table: its input was modified in place"):
        compress(Shifting(), [torch.randint(0, 6, (4, 3))], squared)


def test_dropout_layers_in_train_mode_warn():
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"train mode and 1 drops activations at random.*model\.eval\(\)"):
        compress(model, batches(), loss_fn)

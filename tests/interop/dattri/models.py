"""Digits, models and what dattri's attributors keep."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import dropinf

WHOLE = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}


SKETCHES = [
    dropinf.Dropout(6),
    dropinf.Dropout(6, mode="flat"),
    dropinf.Dropout(6, keep=0.5, scale=True),
    dropinf.Dropout(4, rank=8, whiten=True),
    dropinf.Gaussian(5),
]


def digits(start, stop, flipped=0):
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[start:stop]
    y = torch.tensor(y)[order]
    y[:flipped] = (y[:flipped] + 1) % 10
    return TensorDataset(torch.tensor(x).float()[order].view(-1, 1, 8, 8) / 16, y)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_loss(model, batch, device):
    return losses(model, batch).mean()


def mlp(data, steps=60):
    """A model and its state dicts, early and late."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    optimizer, states = torch.optim.Adam(model.parameters(), 0.01), []
    for step in range(steps):
        optimizer.zero_grad()
        losses(model, data.tensors).mean().backward()
        optimizer.step()
        if step + 1 in (steps // 2, steps):
            states.append(copy.deepcopy(model.state_dict()))
    return model, states


def single(model):
    """dattri's loss of one sample, functional in the parameters, and the probability of its label."""

    def loss(params, sample):
        out = functional_call(model, params, (sample[0][None],))
        return F.cross_entropy(out, sample[1][None])

    return loss, lambda params, sample: torch.exp(-loss(params, sample))


def close(found, wanted, rtol=1e-5):
    assert found.shape == wanted.shape
    error = float((found - wanted).norm() / wanted.norm())
    assert error < rtol
    return error


def compressor_of(model, sketch, batches):
    compressor = dropinf.Compressor(model, sketch, losses)
    compressor.calibrate(batches)
    return compressor


def stored(attributor):
    found = attributor.offload_manager.cached_gradients
    return torch.cat([found[i] for i in sorted(found)])


def columns(gradients, names):
    """dropinf's rows in the order of these layers or parameters."""
    return torch.cat([gradients[name].flatten(1) for name in names], 1)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="dattri pins memory, which needs a GPU")


class Odd(nn.Module):
    """Positions in two dimensions, a layer that is called twice, and one that is not called."""

    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.twice, self.never = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)

    def inner(self, x):
        return torch.tanh(self.twice(x))

    def forward(self, x):
        x = x.view(-1, 2, 4, 8)
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        return self.head(x.mean((1, 2)))


class Pooled(nn.Module):
    """[N, T, 512] -> [N, 512]."""

    def __init__(self, bias):
        super().__init__()
        self.up, self.down = nn.Linear(512, 2048, bias=bias), nn.Linear(2048, 512, bias=bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x))).mean(1)


def projections(kind, dim):
    stages = {"sparsifier_kwargs": WHOLE | {"proj_dim": dim, "proj_type": kind}, "projector_kwargs": WHOLE}
    return stages | {"hessian": "Identity", "offload": "none"}  # without its second stage


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv, self.attention = nn.Conv1d(8, 8, 1), nn.MultiheadAttention(8, 1)
        self.second.weight = self.first.weight

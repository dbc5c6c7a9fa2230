"""Small models in float64 with their training set, and the curvature of it as a dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

TRAIN, QUERIES = 12, 3


class Work(NamedTuple):
    model: nn.Module
    batches: list
    queries: list
    outputs_fn: Callable
    loss_of_outputs: Callable

    def loss_fn(self, model, batch):
        return self.loss_of_outputs(self.outputs_fn(model, batch), batch)

    @property
    def options(self) -> dict:
        names = ("outputs_fn", "loss_of_outputs")
        return {"curvature": "gauss-newton"} | {name: getattr(self, name) for name in names}


class Tied(nn.Module):
    """A GPT of one block whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(9, 6), nn.Embedding(4, 6)
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = (p.unflatten(-1, (2, 3)).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def plain(model, batch):
    return model(batch[0])


def words(model, batch):
    return model(batch[0][:, :-1])


def cross_entropy(outputs, batch):
    return F.cross_entropy(outputs, batch[1], reduction="none")


def squared(outputs, batch):
    return (outputs - batch[1]).square().sum(1)


def next_word(outputs, batch):
    return F.cross_entropy(outputs.mT, batch[0][:, 1:], reduction="none").mean(1)


def work(name: str) -> Work:
    torch.manual_seed(3)
    total = TRAIN + QUERIES
    if name == "mlp":
        model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        data = torch.randn(total, 7).double(), torch.randint(0, 4, (total,))
        functions = plain, cross_entropy
    elif name == "conv":
        body = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.MaxPool2d(2)
        model = nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 3))
        data = torch.randn(total, 2, 4, 4).double(), torch.randn(total, 3).double()
        functions = plain, squared
    else:
        model, data, functions = Tied(), (torch.randint(0, 9, (total, 5)),), (words, next_word)
    batches = list(zip(*(x[:TRAIN].split(5) for x in data), strict=True))
    queries = list(zip(*(x[TRAIN:].split(2) for x in data), strict=True))
    return Work(model.double().eval(), batches, queries, *functions)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """[Q, *shape] of every parameter, in the model's order, as [Q, P]."""
    return torch.cat([x.flatten(1) for x in tensors.values()], 1)


def gradients(model: nn.Module, loss_fn, batches) -> Tensor:
    """[N, P], by one backward a sample of its own."""
    rows = []
    for batch in batches:
        for i in range(len(batch[0])):
            loss = loss_fn(model, tuple(x[i : i + 1] for x in batch)).sum()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def curvature(found: Work, kind: str) -> Tensor:
    """C [P, P], as its definition says."""
    if kind == "fisher":
        g = gradients(found.model, found.loss_fn, found.batches)
        return g.T @ g / len(g)
    names = [n for n, _ in found.model.named_parameters()]
    values = tuple(p.detach() for p in found.model.parameters())
    total = torch.zeros(())
    for batch in found.batches:
        for i in range(len(batch[0])):
            single = tuple(x[i : i + 1] for x in batch)
            inputs = single[0][:, :-1] if found.outputs_fn is words else single[0]

            def outputs(*values, inputs=inputs):
                return functional_call(found.model, dict(zip(names, values, strict=True)), (inputs,))

            z = outputs(*values)
            h = hessian(lambda z, single=single: found.loss_of_outputs(z, single).sum(), z).reshape(z.numel(), -1)
            j = torch.cat([x.reshape(z.numel(), -1) for x in jacobian(outputs, values)], 1)
            total = total + j.T @ h @ j
    return total / TRAIN


def of_direction(direction, model: nn.Module) -> Tensor:
    """[Q, P] of a Direction."""
    rows = [
        torch.cat([direction.tensor(name, q).flatten() for name, _ in model.named_parameters()])
        for q in range(len(direction))
    ]
    return torch.stack(rows)

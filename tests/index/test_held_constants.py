"""What losses and models hold, whatever holds it: another constant is another loss, or another model."""

from __future__ import annotations

import argparse
import collections
import enum
import fractions
import functools
import types

import numpy as np
import pytest
import torch
from torch import nn

import dropinf
from dropinf.loss_name import is_same_loss, name_of_loss
from tests.index.small import make_batches, make_model


class Holder:
    def __init__(self, value):
        self.value = value

    def times(self, losses):
        return losses * self.value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def returning(held):
    return lambda: held[0]


def frozen(value):
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(value)
        module.bias.zero_()
    return module.requires_grad_(False)


Scale = enum.Enum("Scale", {"TWO": 2.0, "THREE": 3.0})
# How a number is held, and how it is read.
HELD = {
    "list of tensors": (lambda v: [torch.tensor(v)], lambda h: h[0]),
    "tuple of tensors": (lambda v: (torch.tensor(v),), lambda h: h[0]),
    "dict of tensors": (lambda v: {"a": torch.tensor(v)}, lambda h: h["a"]),
    "lists in each other": (lambda v: [[{"a": [np.array(v)]}]], lambda h: float(h[0][0]["a"][0])),
    "array": (np.array, float),
    "namespace of a tensor": (lambda v: argparse.Namespace(v=torch.tensor(v)), lambda h: h.v),
    "namespace": (lambda v: types.SimpleNamespace(v=v), lambda h: h.v),
    "deque": (lambda v: collections.deque([v]), lambda h: h[0]),
    "user's dict": (lambda v: collections.UserDict(v=v), lambda h: h["v"]),
    "user's list": (lambda v: collections.UserList([v]), lambda h: h[0]),
    "chain": (lambda v: collections.ChainMap({"v": v}), lambda h: h["v"]),
    "proxy": (lambda v: types.MappingProxyType({"v": v}), lambda h: h["v"]),
    "fraction": (fractions.Fraction, float),
    "range": (lambda v: range(int(v)), len),
    "slice": (lambda v: slice(int(v)), lambda h: h.stop),
    "complex": (complex, lambda h: h.real),
    "member of an enum": (Scale, lambda h: h.value),
    "dtype": (lambda v: torch.float32 if v == 2 else torch.float64, lambda h: 2.0 if h == torch.float32 else 3.0),
    "parameters in a list": (lambda v: [nn.Parameter(torch.tensor(v), requires_grad=False)], lambda h: h[0]),
    "function's closure": (lambda v: returning([torch.tensor(v)]), lambda h: h()),
    "partial": (lambda v: functools.partial(torch.mul, torch.tensor(v)), lambda h: h(1.0)),
}
OF_LOSSES = {
    "object with a list": (lambda v: Holder([torch.tensor(v)]), lambda h: h.value[0]),
    "slots": (Slots, lambda h: h.value),
    "class": (lambda v: type("C", (), {"value": torch.tensor(v)}), lambda h: h.value),
    "method": (lambda v: Holder(v).times, lambda h: h(1.0)),
    "method of a tensor": (lambda v: torch.tensor(v).mul, lambda h: h(1.0)),
    "set": (lambda v: {v}, lambda h: 2.0 if 2.0 in h else 3.0),
    "frozen module": (frozen, lambda h: h(torch.ones(1, 1))[0, 0]),
}
OF_MODELS = {"module in a list": (lambda v: [frozen(v)], lambda h: h[0](torch.ones(1, 1))[0, 0])}


def plain(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def loss_of(held, read):
    return lambda model, batch: plain(model, batch) * read(held)


@pytest.mark.parametrize("kind", HELD | OF_LOSSES)
def test_a_loss_that_holds_another_constant_is_another(kind):
    hold, read = (HELD | OF_LOSSES)[kind]
    two, again, three = (name_of_loss(loss_of(hold(v), read)) for v in (2.0, 2.0, 3.0))
    assert is_same_loss(two, again)
    assert not is_same_loss(two, three)


class Model(nn.Module):
    def __init__(self, held, read):
        super().__init__()
        self.net, self.held = make_model(), held
        self.read = read

    def forward(self, x):
        return self.net(x) * self.read(self.held)


def compressor(kind, value):
    hold, read = (HELD | OF_MODELS)[kind]
    return dropinf.Compressor(Model(hold(value), read), dropinf.Dropout(3), plain)


@pytest.mark.parametrize("kind", HELD | OF_MODELS)
def test_a_model_that_holds_another_constant_is_another(kind, tmp_path):
    index = compressor(kind, 2.0).compress(make_batches(), out=tmp_path / "idx")
    same, others = (compressor(kind, v).compress(make_batches(2, 5)) for v in (2.0, 3.0))
    dropinf.score(same, index, kind="dot")
    with pytest.raises(ValueError, match="of different models"):
        dropinf.score(others, index, kind="dot")
    with pytest.raises(ValueError, match="of different models"):
        dropinf.score(others, same, kind="dot")
    with pytest.raises(ValueError, match=r"model: it is not the one that .*settings of modules are others"):
        compressor(kind, 3.0).compress(make_batches(2, 5), out=tmp_path / "idx", append=True)
    longer = compressor(kind, 2.0).compress(make_batches(2, 5), out=tmp_path / "idx", append=True)
    assert len(longer) == len(index) + len(same)


class Caching(nn.Module):
    """A model that keeps what it computed, in containers of its own."""

    def __init__(self, how):
        super().__init__()
        self.net, self.how, self.cache, self.log = make_model(), how, {}, collections.deque(maxlen=3)

    def forward(self, x):
        out = self.net(x)
        if self.how == "item":
            self.cache[len(x)] = out.detach()
        elif self.how == "method":
            self.cache.update({"last": out.detach()})
        else:
            self.keep(out)
        return out

    def keep(self, out):
        held = self.log
        held.append(out.detach())


@pytest.mark.parametrize("how", ["item", "method", "log"])
def test_a_model_that_keeps_what_it_computed_is_the_same(how, tmp_path):
    model = Caching(how)
    index = dropinf.Compressor(model, dropinf.Dropout(3), plain).compress(make_batches(), out=tmp_path / "idx")
    model(make_batches()[0][0])
    queries = dropinf.Compressor(model, dropinf.Dropout(3), plain).compress(make_batches(1, 5))
    dropinf.score(queries, index, kind="dot")
    dropinf.Compressor(model, dropinf.Dropout(3), plain).compress(make_batches(2, 5), out=tmp_path / "idx", append=True)


def test_rounding_that_differs_from_run_to_run_hides_no_other_loss(tmp_path):
    """As atomic sums on a GPU round."""

    def loss(scale):
        held = [scale] * 5000  # which no comparison looks into

        def noisy(model, batch):
            noise = torch.from_numpy(np.random.default_rng().random(len(batch[1])))
            return plain(model, batch) * held[7] * (1 + 1e-12 * noise)

        return noisy

    def compressed(scale, batches, **options):
        compressor = dropinf.Compressor(make_model(), dropinf.Dropout(3), loss(scale))
        return compressor.compress(batches, out=tmp_path / "idx", **options)

    compressed(1.0, make_batches())
    with pytest.raises(ValueError, match="they now give others than the gradients it holds"):
        compressed(5.0, make_batches(2, 5), append=True)
    compressed(1.0, make_batches(2, 5), append=True)

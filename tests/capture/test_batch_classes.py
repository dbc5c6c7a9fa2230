"""Batches in containers of their user's own classes."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from torch import nn
from transformers import BatchEncoding, BatchFeature
from transformers.modeling_outputs import BaseModelOutput

import dropinf
from tests.capture.right_or_refused import doubles  # noqa: F401


class ByName(dict):
    __getattr__ = dict.__getitem__


class Members(dict):
    """Its members are its attributes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Noted(list):
    def __init__(self, values, meta):
        super().__init__(values)
        self.meta = meta


class Pair(tuple):
    def __new__(cls, x, y, meta):
        made = super().__new__(cls, (x, y))
        made.meta = meta
        return made


class Slots(tuple):
    __slots__ = ()


class Uncopied(collections.OrderedDict):
    def __copy__(self):
        raise RuntimeError("one only")


def of_items(m, b):
    return m(b["x"]), b["y"]


def of_attributes(m, b):
    return m(b.x), b.y


def of_places(m, b):
    return m(b[0]), b[1]


def of_places_and_meta(m, b):
    return m(b[0]) * b.meta, b[1]


BATCHES = {
    "by_name": (lambda x, y: ByName(x=x, y=y), of_attributes),
    "members": (lambda x, y: Members(x=x, y=y), of_attributes),
    "members_as_items": (lambda x, y: Members(x=x, y=y), of_items),
    "ordered": (lambda x, y: collections.OrderedDict(x=x, y=y), of_items),
    "uncopied": (lambda x, y: Uncopied(x=x, y=y), of_items),
    "user_dict": (lambda x, y: collections.UserDict(x=x, y=y), of_items),
    "encoding": (lambda x, y: BatchEncoding({"x": x, "y": y}), of_attributes),
    "feature": (lambda x, y: BatchFeature({"x": x, "y": y}), of_items),
    "output": (lambda x, y: BaseModelOutput(x, y), lambda m, b: (m(b.last_hidden_state), b.hidden_states)),
    "noted": (lambda x, y: Noted([x, y], 2.0), of_places_and_meta),
    "pair": (lambda x, y: Pair(x, y, 2.0), of_places_and_meta),
    "slots": (lambda x, y: Slots((x, y)), of_places),
    "nested": (lambda x, y: {"of": Members(x=Noted([x], 1), y=y)}, lambda m, b: (m(b["of"].x[0]), b["of"].y)),
}


def test_a_list_of_one_sample_behind_lists_of_several():
    """As the last batch of a loader that leaves samples of other lengths in a list."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def loss(m, batch):
        return torch.stack([m(x).square().sum() for x in batch])

    batches = [[torch.randn(t, 3) for t in lengths] for lengths in ((4, 2, 5), (3, 3), (5,), (1,))]
    rows = dropinf.Compressor(model, dropinf.Identity(), loss).compress(batches)["weight"]
    one = [
        torch.autograd.grad(losses, model.weight, retain_graph=True)[0] for b in batches for losses in loss(model, b)
    ]
    torch.testing.assert_close(rows.flatten(1), torch.stack(one).flatten(1))
    with pytest.raises(ValueError, match="loss_fn returned 1 losses for a batch whose tensors have leading sizes"):
        dropinf.Compressor(model, dropinf.Identity(), loss).compress([[torch.randn(5, 3)]])


@pytest.mark.parametrize("options", [{}, {"route": {"*": "vmap"}}, {"route": {"*": "alone"}}], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_rows(name, options):
    make, read = BATCHES[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def loss(m, batch):
        out, y = read(m, batch)
        return (out - y).square().sum(1)

    plain = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (3, 3, 2)]
    batches = [make(x, y) for x, y in plain]
    before = [
        copy.deepcopy(b[0] if isinstance(b, tuple | list) else list(b.values())) for b in batches if name != "uncopied"
    ]
    rows = dropinf.Compressor(model, dropinf.Identity(), loss, **options).compress(batches)["0"]
    w = model[0].weight
    one = [torch.autograd.grad(losses, w, retain_graph=True)[0] for b in batches for losses in loss(model, b)]
    torch.testing.assert_close(rows, torch.stack(one))
    after = [b[0] if isinstance(b, tuple | list) else list(b.values()) for b in batches if name != "uncopied"]
    assert str(before) == str(after)

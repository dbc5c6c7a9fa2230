"""Objects of their user's own in batches, which ids make fit for an index."""

from __future__ import annotations

import array
import collections
import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.index.small import make_batches
from tests.index.test_one_model import compressor


class Record:
    """As graphs, or the samples of a detector, are held."""

    def __init__(self, x, y, names):
        self.x, self._store, self.names = x, {"y": y}, names

    @property
    def y(self):
        return self._store["y"]


class Slotted:
    __slots__ = ("names", "x", "y")

    def __init__(self, x, y, names):
        self.x, self.y, self.names = x, y, names


class Nested:
    def __init__(self, x, y, names):
        self.inside, self.names, self.itself = Record(x, y, names), names, self

    @property
    def x(self):
        return self.inside.x

    @property
    def y(self):
        return self.inside.y


def of_record(model, batch):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


class Private:
    """Its values have private names."""

    __slots__ = ("_y", "names", "x")

    def __init__(self, x, y, names):
        self.x, self._y, self.names = x, y, names

    @property
    def y(self):
        return self._y


class Cached(Record):
    @functools.cached_property
    def total(self):
        return self.x.sum()


class Frame:
    """As a table of pandas, or an image of PIL, whose content no attribute shows."""

    def __init__(self, x, y, names):
        self.of = collections.deque([array.array("d", x.flatten().tolist()), y.tolist(), names])

    x = property(lambda s: torch.tensor(s.of[0]).view(len(s.of[1]), -1).double())
    y = property(lambda s: torch.tensor(s.of[1]))
    names = property(lambda s: s.of[2])


class Graph(Record):
    """Twelve nodes, each of which knows all others."""

    def __init__(self, x, y, names):
        super().__init__(x, None, names)
        self.nodes = [SimpleNamespace(number=i) for i in range(12)]
        for node in self.nodes:
            node.others = self.nodes
        self.nodes[7].y = y

    @property
    def y(self):
        return self.nodes[7].y


@pytest.mark.parametrize("kind", [Record, Slotted, Nested, Private, Cached, Frame, Graph])
def test_objects_of_one_s_own_are_told_apart(kind, tmp_path):
    """With ids, which they need, a corrected label shows."""
    plain_batches = make_batches()
    names = [[f"{b}-{i}" for i in range(len(y))] for b, (_, y) in enumerate(plain_batches)]
    batches = [kind(x, y, name) for (x, y), name in zip(plain_batches, names, strict=True)]
    corrected = [
        kind(x, y.roll(int(b == 2)), name) for b, ((x, y), name) in enumerate(zip(plain_batches, names, strict=True))
    ]
    options = {"out": tmp_path / "idx", "ids": lambda batch: batch.names}
    with pytest.raises(KeyboardInterrupt):
        compressor(of_record).compress(Until(batches, 5), **options)
    with pytest.raises(ValueError, match="batch 2 is another"):
        compressor(of_record).compress(corrected, **options)
    index = compressor(of_record).compress([copy.deepcopy(batch) for batch in batches], **options)
    torch.testing.assert_close(index[:].flat, compressor().compress(plain_batches).flat)
    assert len(compressor(of_record).compress(corrected, append=True, **options)) == 2 * len(index)


class Until(list):
    """Batches that end in an error."""

    def __init__(self, batches, stop):
        super().__init__(batches)
        self.stop = stop

    def __getitem__(self, i):
        if i == self.stop:
            raise KeyboardInterrupt
        return super().__getitem__(i)


def test_what_is_asked_for_once_is_no_part_of_a_batch(tmp_path):
    """A property that is kept, filled between two runs on the same objects."""
    batches = [Cached(x, y, [f"{b}-{i}" for i in range(len(y))]) for b, (x, y) in enumerate(make_batches())]
    options = {"out": tmp_path / "idx", "ids": lambda batch: batch.names}
    index = compressor(of_record).compress(batches, **options)
    assert all(batch.total.isfinite() for batch in batches)
    assert len(compressor(of_record).compress(batches, **options)) == len(index)

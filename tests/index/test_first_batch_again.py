"""The first batch of an index leaves its user's batches alone, and is compared with nothing where it cannot be made again."""

from __future__ import annotations

import collections.abc
import dataclasses

import numpy as np
import pytest
import torch

import dropinf
from dropinf.index import probe
from dropinf.index.fingerprint import fingerprint
from tests.index.small import make_batches, make_model
from tests.index.test_first_batch import compressor, plain


class Own(collections.abc.MutableMapping):
    """A mapping around another, which a shallow copy shares."""

    def __init__(self, **held):
        self._held = held

    def __getitem__(self, key):
        return self._held[key]

    def __setitem__(self, key, value):
        self._held[key] = value

    def __delitem__(self, key):
        del self._held[key]

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)


@dataclasses.dataclass
class Derived:
    x: torch.Tensor
    y: torch.Tensor

    def __post_init__(self):
        self._weight = self.x.abs().sum(1)


class OwnList(list):
    pass


def of_any(model, batch):
    x, y = (
        (batch.x, batch.y)
        if isinstance(batch, Derived)
        else (batch["x"], batch["y"])
        if isinstance(batch, Own)
        else batch
    )
    return plain(model, (x, y))


UNFIT = {
    "a mapping of its user's": lambda x, y: Own(x=x, y=y),
    "fields and what was computed of them": Derived,
    "a list of its user's": lambda x, y: OwnList((x, y)),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_batches_that_cannot_be_made_again_are_left_alone(kind, tmp_path):
    def batches(seed):
        return [UNFIT[kind](*batch) for batch in make_batches(3, seed)]

    index = compressor(of_any).compress(batches(1), out=tmp_path / "idx")
    more = batches(5)
    before = [fingerprint(batch) for batch in more]
    want = compressor(of_any).compress(batches(5)).flat
    got = dropinf.Compressor.from_index(index, make_model(), of_any).compress(more)
    torch.testing.assert_close(got.flat, want)
    both = compressor(of_any).compress(more, out=tmp_path / "idx", append=True)
    assert [fingerprint(batch) for batch in more] == before
    torch.testing.assert_close(both[:].flat[len(index) :], want)


class Stream:
    """What was read from it is gone."""

    def __init__(self, batches):
        self.left = iter(batches)

    def __iter__(self):
        yield from self.left


def test_queries_from_a_stream_are_all_compressed(tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    want = compressor().compress(make_batches(3, 5)).flat
    for batches in (Stream(make_batches(3, 5)), iter(make_batches(3, 5)), make_batches(3, 5)):
        got = dropinf.Compressor.from_index(index, make_model(), plain).compress(batches)
        torch.testing.assert_close(got.flat, want)
    with pytest.raises(ValueError, match="it is empty"):
        dropinf.Compressor.from_index(index, make_model(), plain).compress([])


LONG = [2.0] * 5000


def by_a_long_list(model, batch):
    return plain(model, batch) * LONG[7]


def test_queries_that_were_refused_are_refused_again(tmp_path, monkeypatch):
    index = compressor(by_a_long_list).compress(make_batches(), out=tmp_path / "idx")
    monkeypatch.setitem(globals(), "LONG", [3.0] * 5000)
    queries = dropinf.Compressor.from_index(index, make_model(), by_a_long_list)
    for _ in range(2):
        with pytest.raises(ValueError, match="they now give others"):
            queries.compress(make_batches(1, 5))


@pytest.mark.parametrize(
    "extra",
    [
        np.array(2.5),
        np.zeros(2),
        np.float32(1.5).reshape(()),
        np.arange(3, dtype=">i4"),
        pytest.param(10**5000, id="long"),
    ],
)
def test_any_array_or_number_may_stand_in_a_batch(extra, tmp_path):
    batches = [(x, y, extra) for x, y in make_batches(3)]
    index = compressor(lambda m, b: plain(m, b)).compress(batches, out=tmp_path / "idx")
    data = probe.freeze(batches[0])
    if data is not None:
        assert fingerprint(probe.thaw(data, batches[1], tmp_path)) == fingerprint(batches[0])
    assert index.verify() == []


def test_another_damping_is_of_the_same_gradients(tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    other = dropinf.build_fisher(compressor(model=make_model(1)).compress(make_batches())).with_damping(0.5)
    with pytest.raises(ValueError, match="of different models: the weights"):
        index.save_fisher(other)

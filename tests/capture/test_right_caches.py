"""Caches of what a model computed from its weights."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import Cases, check, doubles, points, runs, squares  # noqa: F401

CASES = Cases()


class Cached(nn.Module):
    """Keeps something that it computed from a weight, in eval mode."""

    def __init__(self, get):
        super().__init__()
        self.t, self.l, self.get = nn.Parameter(torch.randn(3)), nn.Linear(3, 1), get
        self.cache, self.list, self.dict = None, [], {}
        self.register_buffer("buffer", None, persistent=False)

    def forward(self, x):
        return self.l(torch.tanh(x + self.get(self)))


def by_attribute(m):
    if m.training or m.cache is None:
        m.cache = m.t.flip(0)
    return m.cache


def by_list(m):
    if not m.list:
        m.list.append(m.t.flip(0) * 2)
    return m.list[0]


def by_dict(m):
    return m.dict.setdefault("k", m.t.exp()) if "k" not in m.dict else m.dict["k"]


def by_buffer(m):
    if m.buffer is None:
        m.buffer = m.t.square()
    return m.buffer


def by_version(m):
    if m.cache is None or m.cache[0] != m.t._version:
        m.cache = (m.t._version, m.t.flip(0))
    return m.cache[1]


def by_value_detached(m):
    if m.cache is None:
        with torch.no_grad():
            m.cache = m.t.flip(0)
    return m.cache


CACHES = frozenset({"cache", "list", "dict", "buffer"})
for get in (by_attribute, by_list, by_dict, by_buffer, by_version, by_value_detached):

    def cached(get=get):
        return Cached(get).eval(), squares, points()

    def warm(m):
        with torch.no_grad():
            m(torch.zeros(1, 3))

    cached.__name__ = f"cache_{get.__name__}"
    CASES.add(right=False, but=CACHES)(cached)

    def cached_and_warm(get=get):
        return Cached(get).eval(), squares, points()

    cached_and_warm.__name__ = f"warm_cache_{get.__name__}"
    CASES.add(right=False, but=CACHES, prepare=warm)(cached_and_warm)


@CASES.add(right=False, but=frozenset({"cached"}))
def cache_by_lru():
    class Lru(nn.Module):
        def __init__(self):
            super().__init__()
            self.t, self.l = nn.Parameter(torch.randn(3)), nn.Linear(3, 1)
            self.cached = functools.lru_cache(None)(lambda n: self.t.cumsum(0) * n)

        def forward(self, x):
            return self.l(torch.tanh(x + self.cached(x.shape[1])))

    return Lru().eval(), squares, points()


@CASES.add(right=False, but=frozenset({"w"}))
def cache_by_cached_property():
    class Property(nn.Module):
        def __init__(self):
            super().__init__()
            self.t, self.l = nn.Parameter(torch.randn(3)), nn.Linear(3, 1)

        @functools.cached_property
        def w(self):
            return F.normalize(self.l.weight, dim=1)

        def forward(self, x):
            return torch.tanh(x + self.t) @ self.w.T + self.l(x)

    return Property().eval(), squares, points()


@CASES.add(right=False, but=frozenset({"tables"}))
def cache_by_length_of_a_layer_s_output():
    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.l, self.tables = nn.Linear(1, 3), nn.Linear(3, 1), {}

        def forward(self, x):
            if x.shape[1] not in self.tables:
                self.tables[x.shape[1]] = self.p(torch.arange(x.shape[1])[:, None].double())
            return self.l(torch.tanh(x + self.tables[x.shape[1]]))

    return Lengths().eval(), squares, [torch.randn(n, t, 3) for n, t in ((4, 4), (4, 5), (5, 4), (3, 3), (1, 5))]


@CASES.add(right=False, but=frozenset({"memory"}))
def memory_of_the_batch_before():
    """What a batch leaves for the next one changes its loss: no row is right whatever came before."""

    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.memory = nn.Linear(3, 2), None

        def forward(self, x):
            h = self.l(x)
            out = h if self.memory is None else h + 0 * self.memory
            self.memory = h.mean().detach()
            return out

    return Memory(), squares, points()


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)

"""Loaders that draw another order each time are told from those that do not, and an index refuses them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dropinf.workload import shuffles
from tests.index.small import make_compressor

DATA = TensorDataset(torch.randn(30, 12).double(), torch.randint(4, (30,)))


class Own(Sampler):
    """A user's own: `draw` gives the order."""

    def __init__(self, draw) -> None:
        self.draw = draw

    def __iter__(self):
        return iter(self.draw())

    def __len__(self) -> int:
        return 30


class ByLength(BatchSampler):
    """Batches of an inner sampler, as those that put like lengths together."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __iter__(self):
        found = list(self.inner)
        return iter([found[:13], found[13:]])

    def __len__(self) -> int:
        return 2


def distributed(shuffle: bool) -> DistributedSampler:
    return DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=shuffle)


SHUFFLING = {
    "shuffle": lambda: DataLoader(DATA, 4, shuffle=True),
    "generator": lambda: DataLoader(DATA, 4, shuffle=True, generator=torch.Generator().manual_seed(0)),
    "subset": lambda: DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(9))),
    "weighted": lambda: DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 30, 30)),
    "distributed": lambda: DataLoader(DATA, 4, sampler=distributed(True)),
    "no batches": lambda: DataLoader(DATA, None, sampler=RandomSampler(DATA)),
    "batches": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, False)),
    "batches of distributed": lambda: DataLoader(DATA, batch_sampler=BatchSampler(distributed(True), 4, False)),
    "batches of batches": lambda: DataLoader(
        DATA, batch_sampler=ByLength(BatchSampler(RandomSampler(DATA), 30, False).sampler)
    ),
    "own, of torch": lambda: DataLoader(DATA, 4, sampler=Own(lambda: torch.randperm(30).tolist())),
    "own, of numpy": lambda: DataLoader(DATA, 4, sampler=Own(lambda: np.random.permutation(30).tolist())),  # noqa: NPY002
    "own, of random": lambda: DataLoader(DATA, 4, sampler=Own(lambda: random.sample(range(30), 30))),
    "own batches": lambda: DataLoader(DATA, batch_sampler=Own(lambda: torch.randperm(28).view(-1, 2).tolist())),
}
FIXED = {
    "plain": lambda: DataLoader(DATA, 4),
    "no batches": lambda: DataLoader(DATA, None),
    "subset": lambda: DataLoader(Subset(DATA, torch.randperm(30).tolist()), 4),
    "a list": lambda: DataLoader(DATA, 4, sampler=[3, 1, 2]),
    "lists": lambda: DataLoader(DATA, batch_sampler=[[3, 1], [2]]),
    "batches": lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 4, False)),
    "by length": lambda: DataLoader(DATA, batch_sampler=ByLength(SequentialSampler(DATA))),
    "distributed": lambda: DataLoader(DATA, 4, sampler=distributed(False)),
    "own": lambda: DataLoader(DATA, 4, sampler=Own(lambda: range(29, -1, -1))),
    "no loader": lambda: [(DATA.tensors[0], DATA.tensors[1])],
}


def seen() -> tuple:
    return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002


@pytest.mark.parametrize("name", SHUFFLING)
def test_an_index_refuses_loaders_that_shuffle(name, tmp_path):
    loader = SHUFFLING[name]()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert shuffles(loader)
    found = seen()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    assert found == seen()
    with pytest.raises(ValueError, match="shuffling DataLoader gives another order each time; make it with shuffle=F"):
        make_compressor().compress(loader, out=tmp_path / "idx")
    assert not (tmp_path / "idx").exists()


@pytest.mark.parametrize("name", FIXED)
def test_other_loaders_are_taken(name):
    assert not shuffles(FIXED[name]())


def test_a_sampler_that_can_be_read_once_is_left_alone():
    once = iter(range(30))
    loader = DataLoader(DATA, 4, sampler=once)
    assert not shuffles(loader)
    assert next(once) == 0

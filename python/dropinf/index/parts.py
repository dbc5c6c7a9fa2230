"""Loaders of which each rank has another part of the samples, as torch's DistributedSampler makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from ..ranks import Ranks
from ..workload import sampler_of_ranks, untouched_random

_FEW, _FEW_TIMES = 10_000, 20  # few samples may stand alike by chance, and are soon read


class Parts:
    """A DataLoader that gives each rank of a group another part of the samples, for ``compress(out=, group=)``.

    Without this name it is refused: the ranks share all batches among themselves, and need no such sampler. Every rank
    must have as many batches, and no sample may come twice (``DistributedSampler(drop_last=True)`` pads nothing). The
    index has the samples in the order of their numbers in the data. To go on, or to write the same again, takes as many
    ranks.

    Raises:
        TypeError: not a DataLoader of numbered samples.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        streams = isinstance(getattr(loader, "dataset", None), IterableDataset)
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None or streams:
            raise TypeError(
                f"loader is {type(loader).__name__}{' of a stream' if streams else ''}; it must be a DataLoader that "
                "makes batches of numbered samples, "
                "with a sampler such as DistributedSampler(data, shuffle=False, drop_last=True)"
            )
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def _numbers(loader: DataLoader[Any]) -> list[list[int]]:
    """Return the numbers of the samples of each batch.

    The loader reads its batch sampler once more for the batches, so it must give the same each time.
    """
    sampler: Iterable[Iterable[int]] = () if loader.batch_sampler is None else loader.batch_sampler
    with untouched_random():
        found = [list(map(int, batch)) for batch in sampler]
        if type(sampler) is BatchSampler and type(sampler.sampler) in (SequentialSampler, DistributedSampler):
            return found
        for _ in range(_FEW_TIMES if sum(map(len, found)) <= _FEW else 1):
            if [list(map(int, batch)) for batch in sampler] != found:
                raise ValueError(
                    f"batches: {_name(loader)} gives other numbers of samples when it is read again, and they are read "
                    "before the batches are; it must give the same each time: pass a list, such as "
                    "DataLoader(data, batch_sampler=list(sampler))"
                )
    return found


def _name(loader: DataLoader[Any]) -> str:
    """Return what the order of a loader comes from."""
    own = type(loader.batch_sampler) is BatchSampler
    return f"their sampler {type(loader.sampler if own else loader.batch_sampler).__name__}"


class Share(Iterator[Any]):
    """The batches of one rank, as they come; its length is that of all ranks' batches, which stand rank by rank.

    ``order``: the number of each sample in the data, of all ranks.

    Raises:
        ValueError: the sampler is for other ranks, or gives another order each time, or a sample comes twice, or a rank
            has more batches than another.
    """

    def __init__(self, parts: Parts, ranks: Ranks) -> None:
        replicas = getattr(parts.loader.sampler, "num_replicas", ranks.world)
        if replicas != ranks.world:
            raise ValueError(
                f"batches: their {sampler_of_ranks(parts.loader)} makes {replicas} parts, and group= has {ranks.world} "
                "ranks; make it with num_replicas and rank of the group"
            )
        numbers = _numbers(parts.loader)
        mine = torch.tensor([i for batch in numbers for i in batch], dtype=torch.int64, device="cpu")
        every: list[tuple[int, Tensor]] = ranks.everyone((len(numbers), mine))
        self.each, self.rank, self.world = len(numbers), ranks.rank, ranks.world
        counts = [count for count, _ in every]
        if len(set(counts)) > 1:
            raise ValueError(f"batches: the ranks have {counts} of them; each must have as many")
        self.order = torch.cat([part for _, part in every])
        found, times = self.order.unique(return_counts=True)
        if len(found) < len(self.order):
            raise ValueError(
                f"batches: their sampler gives sample {int(found[times > 1][0])} more than once, as DistributedSampler "
                "does to fill the last batches; pass drop_last=True to it, or all batches to every rank without it"
            )
        self._batches = iter(parts)
        self._first = [next(self._batches)] if self.each else []

    def __len__(self) -> int:
        return self.each * self.world

    def __next__(self) -> Any:
        return self._first.pop() if self._first else next(self._batches)

    @property
    def first(self) -> Any:
        """The first batch of this rank, before it was taken."""
        if not self._first:
            raise ValueError("batches: it is empty; pass at least one batch")
        return self._first[0]

    def is_mine(self, b: int) -> bool:
        """Return whether a batch is this rank's."""
        return b // self.each == self.rank

    def shard_batches(self, most: int) -> int:
        """Return how many batches make a shard, at most so many: each shard is of one rank."""
        return max(size for size in range(1, min(most, self.each) + 1) if self.each % size == 0)

"""Ranks of ``torch.distributed`` that share one job, and stop together where one of them fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

T = TypeVar("T")
# A rank beats once a second; one that was not heard of for this long is taken for dead.
BEAT, PATIENCE = 1.0, 15.0


class Ranks:
    """The ranks of a group that share one job; a single one where `group` is None."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of its ranks")
        self._lost: str | None = None
        self._heard: dict[int, tuple[bytes, float]] = {}

    @property
    def device(self) -> torch.device:
        """The device that tensors must be on to be sent."""
        return torch.device("cuda" if self.group is not None and dist.get_backend(self.group) == "nccl" else "cpu")

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks, on x's device."""
        if self.world == 1:
            return x
        total = x.to(self.device, copy=True).contiguous()
        with self._together():
            dist.all_reduce(total, group=self.group)
        return total.to(x.device)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return every rank's tensor, in rank order; they may differ in their leading size."""
        if self.world == 1:
            return [x]
        sizes = torch.zeros(self.world, dtype=torch.int64, device="cpu")
        sizes[self.rank] = len(x)
        sizes = self.sum(sizes)
        padded = x.new_zeros(int(sizes.max()), *x.shape[1:], device=self.device)
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        with self._together():
            dist.all_gather(parts, padded, group=self.group)
        return [part[:n].to(x.device) for part, n in zip(parts, sizes.tolist(), strict=True)]

    def first(self, job: Callable[[], T]) -> T:
        """Return what `job` returns on rank 0, on every rank, or raise what it raises."""
        if self.group is None:
            return job()
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box = [(job(), None)]
            except Exception as error:
                box = [(None, error)]
        with self._together():
            dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        found, failure = box[0]
        if failure is not None:
            raise failure
        value: T = found
        return value

    def everyone(self, value: T) -> list[T]:
        """Return every rank's value, in rank order."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.world
        with self._together():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def barrier(self) -> None:
        if self.world > 1:
            with self._together():
                dist.barrier(group=self.group)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Turn a RuntimeError inside, where all ranks do the same, into one which says that another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"another rank is gone ({error}); this rank ({self.rank}) stops too. Run it again"
            ) from error

    def check(self) -> None:
        """Raise RuntimeError if another rank failed or was not heard from for `PATIENCE` seconds."""
        if self._lost is not None:
            raise RuntimeError(f"{self._lost}; this rank ({self.rank}) stops too. Run it again to go on from here")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Exchange signs of life with the other ranks inside, and tell them of the error that ends this one."""
        if self.world == 1:
            yield
            return
        store = c10d.PrefixStore(f"dropinf/{_serial()}", c10d._get_default_store())
        with self._together():
            store.set(f"alive/{self.rank}", "begins")  # one that is gone before its first beat is missed too
        done = threading.Event()
        listener = threading.Thread(target=self._listen, args=(store, done), daemon=True)
        listener.start()
        try:
            yield
            self.barrier()
        except BaseException as error:
            if self._lost is None and isinstance(error, RuntimeError):
                listener.join(2 * BEAT)  # a collective that broke off: it may be another rank's doing
                self.check()
            if self._lost is None:
                with suppress(RuntimeError):  # the store may be gone
                    store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error}")
            raise
        finally:
            done.set()
            listener.join()

    def _listen(self, store: c10d.Store, done: threading.Event) -> None:
        try:
            while self._lost is None and not done.wait(BEAT):
                self._lost = self._beat(store)
        except RuntimeError as error:  # the store went with the rank that held it
            if not done.is_set():
                self._lost = f"the store of torch.distributed is gone ({error})"

    def _beat(self, store: c10d.Store) -> str | None:
        """Say that this rank lives, and return what is wrong with another."""
        now = time.monotonic()
        store.set(f"alive/{self.rank}", str(now))
        for other in range(self.world):
            if store.check([f"failed/{other}"]):
                return f"rank {other} failed: {store.get(f'failed/{other}').decode()}"
            if store.check([f"alive/{other}"]):
                beat = store.get(f"alive/{other}")
                if self._heard.get(other, (b"", 0.0))[0] != beat:
                    self._heard[other] = (beat, now)
                elif now - self._heard[other][1] > PATIENCE:
                    return f"rank {other} was not heard of for {PATIENCE:.0f} s"
        return None


_calls = 0


def _serial() -> int:
    """Return the number of this call: every rank makes the same calls in the same order."""
    global _calls
    _calls += 1
    return _calls

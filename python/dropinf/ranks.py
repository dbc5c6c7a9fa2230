"""Ranks of ``torch.distributed`` that share one job, and stop together where one of them fails."""

from __future__ import annotations

import json
import sys
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
POLL = 0.002  # seconds between looks for other ranks that a collective needs
_HERE = "here"  # the state of a rank that waits for the others


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
        self._store: c10d.Store | None = None  # while it is watched
        self._met = 0  # collectives
        self._broke = False  # a collective did
        self._waits = False  # for others to come to one
        self._thread = threading.get_ident()
        self._held: tuple[str, float] = "", 0.0  # another collective that this rank is in, and since when

    @property
    def device(self) -> torch.device:
        """The device that tensors must be on to be sent."""
        return torch.device("cuda" if self.group is not None and dist.get_backend(self.group) == "nccl" else "cpu")

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks, on x's device."""
        if self.world == 1:
            return x
        total = x.to(self.device, copy=True).contiguous()
        with self._together("a sum"):
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
        with self._together("a gathering of tensors"):
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
        with self._together("what the first rank found"):
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
        with self._together("what every rank found"):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def barrier(self, what: str = "a barrier") -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with self._together(what):
                dist.barrier(group=self.group)

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Have a collective inside, which all ranks have come to; an error of it says that another rank is gone."""
        try:
            self._meet(what)
        except dist.DistNetworkError as error:  # of the store, which one of the ranks holds
            raise self._gone(error) from error
        try:
            yield
        except RuntimeError as error:
            raise self._gone(error) from error

    def _gone(self, error: Exception) -> RuntimeError:
        self._broke = True
        return RuntimeError(f"another rank is gone ({error}); this rank ({self.rank}) stops too. Run it again")

    def _meet(self, what: str) -> None:
        """Wait until all ranks are about to do the same: a collective itself cannot be left where one is missing."""
        if self._store is None:
            return
        self._met += 1
        self._store.set(f"at/{self.rank}", json.dumps([self._met, what]))
        self._waits = True
        try:
            self._await_others(self._store, what)
        finally:
            self._waits = False

    def _await_others(self, store: c10d.Store, what: str) -> None:
        missing, pause = set(range(self.world)) - {self.rank}, POLL
        while missing:
            for other in sorted(missing):
                if store.check([f"at/{other}"]):
                    count, its = json.loads(store.get(f"at/{other}"))
                    if count == self._met and its != what:
                        raise RuntimeError(
                            f"rank {other} is at {its}, this rank ({self.rank}) at {what}: all must make the same "
                            "calls with the same arguments"
                        )
                    missing -= {other} if count >= self._met else set()
            self.check()
            if missing:
                time.sleep(pause)
                pause = min(2 * pause, BEAT / 4)

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
        with self._together("the beginning"):
            store.set(f"alive/{self.rank}", "begins")  # one that is gone before its first beat is missed too
        self._store, self._met, self._thread = store, 0, threading.get_ident()
        done = threading.Event()
        listener = threading.Thread(target=self._listen, args=(store, done), daemon=True)
        listener.start()
        try:
            yield
            self.barrier("the end")
        except BaseException as error:
            if self._lost is None and isinstance(error, RuntimeError):
                # It may be another rank's doing; who it was shows once it is missed.
                listener.join(2 * BEAT + PATIENCE * self._broke)
                self.check()
            if self._lost is None:
                with suppress(RuntimeError):  # the store may be gone
                    store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error}")
                    self._await_told(store)
            raise
        finally:
            self._store = None
            done.set()
            listener.join()

    def _await_told(self, store: c10d.Store) -> None:
        """Wait until the others know what ended this rank, as the store may go with it; not for ranks that are gone."""
        end = time.monotonic() + 4 * BEAT
        unaware = set(range(self.world)) - {self.rank}
        while unaware and time.monotonic() < end:
            time.sleep(BEAT / 20)
            unaware = {r for r in unaware if not store.check([f"told/{r}"]) and not store.check([f"failed/{r}"])}

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
        state = self._state(now)
        store.set(f"alive/{self.rank}", json.dumps([now, state]))
        for other in range(self.world):
            if store.check([f"failed/{other}"]):
                failed = f"rank {other} failed: {store.get(f'failed/{other}').decode()}"
                store.set(f"told/{self.rank}", "")
                return failed
            if store.check([f"alive/{other}"]):
                beat = store.get(f"alive/{other}")
                if self._heard.get(other, (b"", 0.0))[0] != beat:
                    self._heard[other] = (beat, now)
                elif now - self._heard[other][1] > PATIENCE:
                    return f"rank {other} was not heard of for {PATIENCE:.0f} s"
        return self._stuck() if state == _HERE else None

    def _state(self, now: float) -> str:
        """Return what this rank waits for: others, another collective (for longer than `PATIENCE`), or nothing."""
        if self._waits:
            return _HERE
        name = _collective(self._thread)
        self._held = (name, self._held[1] if self._held[0] == name else now)
        return name if name and now - self._held[1] > PATIENCE else ""

    def _stuck(self) -> str | None:
        """Return which rank waits in a collective of its own while all others wait here; None where some compute."""
        states = {other: json.loads(beat)[1] if beat[:1] == b"[" else "" for other, (beat, _) in self._heard.items()}
        others = {other: state for other, state in states.items() if state != _HERE}
        if len(states) < self.world or not others or not all(others.values()):
            return None
        return "; ".join(f"rank {other} waits in torch.distributed's {name}" for other, name in sorted(others.items()))


def _collective(thread: int) -> str:
    """Return the function of torch.distributed that a thread is in, other than for this module; or nothing."""
    frame, name = sys._current_frames().get(thread), ""
    while frame is not None:
        if frame.f_code.co_filename == __file__:
            return ""
        if frame.f_code.co_filename == c10d.__file__:
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


_calls = 0


def _serial() -> int:
    """Return the number of this call: every rank makes the same calls in the same order."""
    global _calls
    _calls += 1
    return _calls

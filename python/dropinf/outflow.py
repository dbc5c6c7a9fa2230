"""Rows on their way from a GPU to what stores them, while the next batch is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

WAITING = 2  # batches whose rows are copied or stored while the next is computed


class Outflow:
    """Hands rows on in the order in which they come. Those on the CPU are handed on at once.

    Those on a GPU are copied to pinned memory on a stream of their own, one copy a batch, for which neither the host
    nor the batches that follow wait; a thread waits for the copy and hands the rows on. An error of that thread is
    raised by the next call, and nothing is handed on behind it.
    """

    def __init__(self) -> None:
        self._waiting: deque[Future[None]] = deque()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._failed = False

    def __enter__(self) -> Outflow:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until all rows are handed on, those too that came before another error."""
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def put(self, rows: Tensor, take: Callable[[Tensor], None]) -> None:
        """Have ``take`` called with the rows [n, K] on the CPU."""
        if rows.device.type == "cpu":
            take(rows)
            return
        while self._waiting and (len(self._waiting) >= WAITING or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._thread = self._thread or ThreadPoolExecutor(1, "dropinf-outflow")
        self._waiting.append(self._thread.submit(self._hand_on, *self._copied(rows), take))

    def _copied(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Copy rows to the host without a wait. Return what they are copied to, and the event that ends it."""
        stream = self._streams.get(rows.device)
        if stream is None:
            stream = self._streams[rows.device] = torch.cuda.Stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream):
            host = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
            host.copy_(rows, non_blocking=True)
            rows.record_stream(stream)  # whose memory serves no other tensor before
            return host, stream.record_event()

    def _hand_on(self, rows: Tensor, copied: Any, take: Callable[[Tensor], None]) -> None:
        if self._failed:
            return
        try:
            copied.synchronize()
            take(rows)
        except BaseException:
            self._failed = True
            raise

"""A process that does to an index what it is told, and stops before each operation on a file until it may go on."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import dropinf
from dropinf.gradients import Origin
from dropinf.index import compact, plan, write_index
from tests.faults.jobs import Operations

Call = list[int]  # numbers of batches


def batch_of(number: int) -> torch.Tensor:
    """Return a batch of one to three samples, and no two alike."""
    return torch.tensor([[float(number), float(i)] for i in range(1 + number % 3)])


def rows_of(batch: torch.Tensor) -> torch.Tensor:
    return torch.stack([batch[:, 0], batch[:, 1], batch[:, 0] * (batch[:, 1] + 1)], 1)


def rows(calls: Iterable[Call]) -> list[list[float]]:
    """Return what an index holds of these calls."""
    return [row for call in calls for number in call for row in rows_of(batch_of(number)).tolist()]


def names(batch: torch.Tensor) -> list[str]:
    return [f"{number:.0f}.{i:.0f}" for number, i in batch.tolist()]


class LossError(Exception):
    """What a loss raises."""


class Source:
    """Rows of three numbers that are made of the batch: a compressor without a model."""

    is_sharded = False

    def __init__(self, fails_at: int | None) -> None:
        self.shapes, self.fails_at = {"layer": (3,)}, fails_at

    def digest(self) -> dict[str, str]:
        return {"layer": "sketch"}

    def fingerprint(self) -> str:
        return "model"

    def origin(self) -> Origin:
        return Origin("model", "loss")

    def save(self, path) -> None:
        dropinf.files.write_whole(Path(path), safetensors.torch.save({"mask": torch.zeros(1)}))

    def stream(self, batches: Iterable[Any], take: Callable[[torch.Tensor], None], **_) -> None:
        for count, batch in enumerate(batches):
            if count == self.fails_at:
                raise LossError
            take(rows_of(batch))


class Steps(Operations):
    """Operations on files, and reads: told to whoever says when to go on."""

    def __init__(self, line: Line) -> None:
        super().__init__(Path("/nowhere"))
        self.line, self.turn = line, threading.Lock()

    def note(self, *what) -> None:
        with self.turn:  # a thread reads ahead
            self.line.say(step=[what[0], *map(os.fspath, what[1 : 3 if what[0] == "rename" else 2])])
            self.line.hear()

    def _hook(self, event: str, args: tuple) -> None:
        super()._hook(event, args)
        if (
            event == "open"
            and isinstance(args[0], str | os.PathLike)
            and self._ours(args[0])
            and "r" in (args[1] or "")
        ):
            self.note("read", args[0])


class Line:
    """Messages in JSON, a line each."""

    def __init__(self, connection: socket.socket) -> None:
        self.file = connection.makefile("rw")

    def say(self, **message) -> None:
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()

    def hear(self) -> dict[str, Any]:
        line = self.file.readline()
        if not line:
            raise EOFError
        return json.loads(line)


class Actor:
    """Does one thing after another; handles stay open."""

    def __init__(self) -> None:
        self.handle: dropinf.Index | None = None

    def write(self, folder: str, call: Call, append: bool, once: bool, ids: bool, fisher: str | None, fails_at) -> None:
        batches: Any = [batch_of(number) for number in call]
        made = dropinf.Fisher(fisher) if fisher else None
        write_index(
            Source(fails_at),
            iter(batches) if once else batches,
            folder,
            append=append,
            ids=names if ids else None,
            fisher=made,
        )

    def open(self, folder: str) -> list[list[float]]:
        self.handle = dropinf.Index.open(folder)
        return self.handle[:].flat.tolist()

    def read(self, folder: str) -> list[list[float]]:
        return dropinf.Index.open(folder)[:].flat.tolist() if self.handle is None else self.handle[:].flat.tolist()

    def save_fisher(self, folder: str) -> None:
        index = dropinf.Index.open(folder)
        index.save_fisher(dropinf.build_fisher(index))

    def compact(self, folder: str) -> None:
        dropinf.Index.open(folder).compact()

    def discard(self, folder: str) -> None:
        dropinf.Index.open(folder).discard()

    def forget(self, folder: str) -> None:
        self.handle = None


def act(address: str) -> None:
    """Do what is asked for until there is no more."""
    plan._LEAST_SHARDS, compact.GATHERED = 2, 3
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    line, actor = Line(connection), Actor()
    steps = Steps(line)
    steps.watch(None)
    while True:
        try:
            asked = line.hear()
        except EOFError:
            return
        steps.folder = asked["folder"]
        try:
            found = getattr(actor, asked.pop("do"))(**asked)
        except Exception as error:
            line.say(kind=type(error).__name__, error=str(error))
        else:
            line.say(found=found)

"""A process that does to an index what it is told, and stops before each operation on a file until it may go on."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import dropinf
from dropinf.index import compact, plan, write_index
from dropinf.index.codec import DTYPES, Codec
from dropinf.origin import Origin
from tests.faults.jobs import Operations

Call = list[int]  # numbers of batches
SHAPES = {"few": (3,), "more": (16,)}  # whose scales stand beside int8 rows, and within them
CODECS = {dtype: Codec(dtype, tuple(SHAPES), (3, 16)) for dtype in ("float32", "int8")}


def batch_of(number: int) -> torch.Tensor:
    """Return a batch of one to three samples, and no two alike."""
    return torch.tensor([[float(number), float(i)] for i in range(1 + number % 3)])


def rows_of(batch: torch.Tensor) -> torch.Tensor:
    few = torch.stack([batch[:, 0], batch[:, 1], batch[:, 0] * (batch[:, 1] + 1)], 1)
    return torch.cat([few, few[:, :1] * torch.arange(16) + few[:, 1:2]], 1)


def order_of(call: Call) -> list[int] | None:
    """Return where the samples of a call stand among its own; of some calls, as they come."""
    found = list(range(sum(len(batch_of(number)) for number in call)))
    random.Random(str(call)).shuffle(found)
    return found if sum(call) % 3 else None


def in_order(call: Call, samples: list[Any], ordered: bool) -> list[Any]:
    places = order_of(call) if ordered else None
    return samples if places is None else [sample for _, sample in sorted(zip(places, samples, strict=True))]


def rows(calls: Iterable[Call], ordered: bool, dtype: str) -> list[list[float]]:
    """Return what is read from an index of these calls."""
    found = []
    for call in calls:
        encoded = CODECS[dtype].encode(torch.cat([rows_of(batch_of(number)) for number in call]))
        decoded = CODECS[dtype].decode(encoded["gradients"], encoded.get("scale")).tolist()
        found += in_order(call, decoded, ordered)
    return found


def ids(calls: Iterable[Call], ordered: bool) -> list[str]:
    return [
        name
        for call in calls
        for name in in_order(call, [name for number in call for name in names(batch_of(number))], ordered)
    ]


def names(batch: torch.Tensor) -> list[str]:
    return [f"{number:.0f}.{i:.0f}" for number, i in batch.tolist()]


class LossError(Exception):
    """What a loss raises."""


class Source:
    """Rows of two layers that are made of the batch: a compressor without a model."""

    is_sharded = False
    cu_seqlens = None

    def __init__(self, fails_at: int | None) -> None:
        self.shapes, self.fails_at = SHAPES, fails_at

    def digest(self) -> dict[str, str]:
        return dict.fromkeys(SHAPES, "sketch")

    def fingerprint(self) -> str:
        return "model"

    def origin(self) -> Origin:
        return Origin("model", self.loss_name())

    def loss_name(self) -> str:
        return "loss"

    def version(self) -> int:
        return 0

    def code(self) -> dict[str, str]:
        return {}

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

    def write(self, folder: str, call: Call, append: bool, once: bool, fails_at, fisher: str | None, **about) -> None:
        batches: Any = [batch_of(number) for number in call]
        made = dropinf.Fisher(fisher) if fisher else None
        write_index(
            Source(fails_at),
            iter(batches) if once else batches,
            folder,
            append=append,
            ids=names if about["ids"] else None,
            order=order_of(call) if about["ordered"] else None,
            dtype=DTYPES[about["dtype"]],
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

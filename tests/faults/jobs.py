"""What the processes of these tests do: each a function of plain values, run in a process of its own (`forks`)."""

from __future__ import annotations

import builtins
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf import ranks
from dropinf.index import plan
from tests.bounds import HOUR

BATCHES, SMALL = 130, 12  # in shards of three, by `index` below


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_batches(count: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    sizes = [3 + i % 3 for i in range(count)]
    return [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def names(batch) -> list[str]:
    return [f"é{float(x):.6f}" for x in batch[0][:, 0]]


def make_compressor(loss=loss_fn) -> dropinf.Compressor:
    return dropinf.Compressor(make_model(), dropinf.Dropout(3), loss)


def make_query() -> dropinf.Gradients:
    return make_compressor().compress(make_batches(2, 9))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of an index by its name, but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def index(
    folder: str,
    *,
    batches: int = BATCHES,
    dtype: str = "float32",
    fisher: str | None = "block",
    append: int = 0,
    slow: float = 0.0,
    stalls_at: int | None = None,
    patience: float | None = None,
    dies_at: int | None = None,
    dies_on: int = 0,
    trace: str | None = None,
) -> None:
    """Index `batches` batches, and then `append` others; alone, or as a rank where the environment has `RANK`.

    slow: seconds that each batch takes. stalls_at: the first batch that never comes. patience: how long a silent rank is
    waited for; an hour where it is not to be missed. dies_at: kill this process before so many operations on files, on
    rank `dies_on`. trace: a file to list these operations in.
    """
    group, rank = None, 0
    if "RANK" in os.environ:
        ranks.PATIENCE = HOUR if patience is None else patience
        ranks.BEAT = min(ranks.BEAT, ranks.PATIENCE / 5)
        dist.init_process_group("gloo")
        group, rank = dist.group.WORLD, dist.get_rank()
    if batches < plan._LEAST_SHARDS:
        plan._LEAST_SHARDS = -(-batches // 3)

    def slowly(model, batch):
        time.sleep(slow)
        return loss_fn(model, batch)

    compressor = make_compressor(slowly if slow else loss_fn)
    options = {"out": folder, "dtype": getattr(torch, dtype), "fisher": fisher, "ids": names, "group": group}
    data, more = Batches(make_batches(batches), stalls_at), make_batches(append, 2)
    operations = Operations(Path(folder)) if trace or dies_at is not None else None
    if operations is not None and rank == dies_on:
        operations.watch(dies_at)
    print("begins", flush=True)
    compressor.compress(data, **options)
    if append:
        compressor.compress(more, append=True, **options)
    if operations is not None and trace is not None:
        Path(trace).write_text("\n".join(map(repr, operations.seen)))
    print("ends", flush=True)
    if group is not None:
        dist.destroy_process_group()


class Batches(list):
    """Batches, of which one and all after it never come."""

    def __init__(self, batches, stalls_at: int | None) -> None:
        super().__init__(batches)
        self.stalls_at = stalls_at

    def __getitem__(self, i):
        if self.stalls_at is not None and i >= self.stalls_at:
            time.sleep(HOUR)
        return super().__getitem__(i)


class Operations:
    """Every operation that changes the folder, in order: ("write", path, bytes), ("sync", path), ("remove", path),
    ("rename", path, to), ("mkdir", path); a file is opened with ("open", path) and written in two halves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = str(folder), []
        self.dies_at: int | None = None

    def watch(self, dies_at: int | None) -> None:
        self.dies_at = dies_at
        sys.addaudithook(self._hook)
        sync = os.fsync

        def fsync(handle):
            self.note("sync", os.readlink(f"/proc/self/fd/{handle}"))
            sync(handle)

        os.fsync = fsync
        dropinf.files.open = self._open

    def note(self, *what) -> None:
        if len(self.seen) == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(what)

    def _hook(self, event: str, args: tuple) -> None:
        if event == "os.rename" and self._ours(args[0]):
            self.note("rename", os.fspath(args[0]), os.fspath(args[1]))
        elif event in ("os.remove", "os.rmdir") and (path := self._path(*args)) and os.path.exists(path):
            self.note("remove", path)
        elif event == "os.mkdir" and (path := self._path(args[0], args[2])):
            self.note("mkdir", path)

    def _ours(self, path) -> bool:
        return os.fspath(path).startswith(self.folder)

    def _path(self, path, handle: int) -> str | None:
        """The whole path of one that may be relative to an open folder."""
        whole = os.fspath(path)
        if handle != -1:
            whole = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), whole)
        return whole if whole.startswith(self.folder) else None

    def _open(self, path, mode="r", **options):
        if "w" not in mode:
            return builtins.open(path, mode, **options)
        self.note("open", os.fspath(path))
        return Halves(self, builtins.open(path, mode, **options))


class Halves:
    """A file that takes what it is given in two halves, each on its own."""

    def __init__(self, operations: Operations, file) -> None:
        self.operations, self.file = operations, file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data) -> None:
        data, half = bytes(data), len(data) // 2
        for part in (data[:half], data[half:]):
            self.operations.note("write", self.file.name, part)
            self.file.write(part)
            self.file.flush()

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


def export(folder: str, what: str, out: str) -> None:
    """Write something that is made of an index."""
    made = dropinf.Index.open(folder)
    if what == "scores":
        dropinf.score(make_query(), made, made.fisher(), out=out)
    elif what == "whitened":
        made.whitened(out)
    else:
        made.save_fisher(dropinf.build_fisher(made))


def fails(rank: int) -> None:
    """Fail on a rank, whose process is gone the next moment, while the others compute."""
    dist.init_process_group("gloo")
    together = ranks.Ranks(dist.group.WORLD)
    try:
        with together.watched():
            if together.rank == rank:
                raise OSError("no room")
            while True:
                time.sleep(0.01)
                together.check()
    except OSError:
        os._exit(1)


def fuzz(*arguments) -> None:
    from tests.faults import fuzz

    fuzz.fuzz(*arguments)


def forge(*arguments) -> None:
    from tests.faults import forgeries

    forgeries.forge(*arguments)


def act(*arguments) -> None:
    from tests.faults import model

    model.act(*arguments)

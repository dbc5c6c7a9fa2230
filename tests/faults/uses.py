"""Every use of an index that was damaged or forged: as before, or an error that says why.

A mutation that leaves the checksums as they were must not show in any result. One with new checksums is a forgery: it
may hold other values, but never ones that the file formats do not have, and never reach beyond its folder.
"""

from __future__ import annotations

import codecs
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import dropinf
from dropinf.index import plan, verify
from tests.faults.jobs import SMALL, files, make_batches, make_compressor, make_query, names
from tests.faults.mutations import FORGED, STRICT, Files

SECONDS = 20  # of CPU time, what one use may take
FISHERS = {"float32": "block", "int8": "kronecker"}


def uses(folder: Path, query, fisher) -> dict[str, Callable[[], Any]]:
    def open_() -> dropinf.Index:
        return dropinf.Index.open(folder)

    def opened() -> Any:
        index = open_()
        index.info()
        return len(index), repr(index)

    def kept() -> Any:
        found = open_().fisher()
        other = found.with_damping("auto")
        return torch.cat([x.flat for x in (found.solve(query), found.whiten(query), other.solve(query))])

    return {
        "verify": lambda: verify(folder),
        "open": opened,
        "rows": lambda: open_()[:].flat,
        "row": lambda: open_()[[0, -1]].flat,
        "ids": lambda: open_().ids(),
        "blocks": lambda: torch.cat([part.flat for _, part in open_().blocks(4)]),
        "scores": lambda: dropinf.score(query, open_(), fisher).T,
        "best": lambda: torch.cat(list(dropinf.score(query, open_(), fisher, top=3))),
        "cosines": lambda: dropinf.score(query, open_(), kind="cosine").T,
        "self": lambda: dropinf.self_influence(open_(), fisher),
        "build": lambda: dropinf.build_fisher(open_()).solve(query).flat,
        "fisher": kept,
    }


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.shape == expected.shape and torch.equal(found, expected)
    return found == expected


class Late(BaseException):
    pass


class Watch:
    """What a process does outside of the folders that it may use."""

    def __init__(self, *folders: Path) -> None:
        self.folders, self.on, self.odd = tuple(map(str, folders)), False, []
        sys.addaudithook(self.hook)
        signal.signal(signal.SIGPROF, self.late)

    @staticmethod
    def late(*_) -> None:
        raise Late

    def hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        paths = {"open": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.symlink": 2, "os.link": 2}
        if event in paths:
            for path in args[: paths[event]]:
                if not isinstance(path, int) and not os.path.realpath(os.fspath(path)).startswith(self.folders):
                    self.odd.append(f"{event} of {path!r}")
        elif event.split(".")[0] in ("pickle", "subprocess", "socket", "ctypes") or event in ("os.system", "os.exec"):
            self.odd.append(f"{event} {args!r}"[:200])

    def run(self, use: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        self.odd, self.on = [], True
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            return use(), None
        except BaseException as error:
            return None, error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.on = False


def clear(error: BaseException, folder: Path, forged: bool) -> bool:
    """Whether it is an error that a user can act on: of a file, or, of other values, of what they are not fit for."""
    if not isinstance(error, ValueError | OSError) or isinstance(error, UnicodeError):
        return False
    values = r"^(query|fisher) and (train|gradients) (differ: layer|are of different models)|is singular to working precision"
    return str(folder) in str(error) or (forged and re.search(values, str(error)) is not None)


def valid_rows(data: bytes, index: dropinf.Index, rows: int) -> torch.Tensor | None:
    """The rows of a forged shard, as the safetensors library and no other reads it; None where it is not one."""
    try:
        found = safetensors.torch.load(data)
        values = found["gradients"]
        if index.manifest.dtype == "int8":
            assert values.dtype == torch.int8
            assert found["scale"].dtype == torch.bfloat16
            values = index._codec.decode(values, found["scale"])
        assert values.dtype == torch.float32
        assert values.shape == (rows, index._codec.width)
        return values
    except Exception:
        return None


def wrong(use: str, found: Any, kind: str, whole: dict[str, Any], changed: Files, folder: Path) -> str | None:
    """Say what is wrong with a result that is not the whole index's."""
    if kind in STRICT:
        return "another result, and no error"
    if use in ("verify", "open", "build", "best", "row"):
        return None
    if kind == "fisher":
        return None if use == "fisher" and bool(torch.isfinite(found).all()) else "not finite, or another's result"
    index = dropinf.Index.open(folder)
    if use == "ids":
        few = found == whole["ids"][: len(found)] or (kind == "manifest" and found == list(map(str, range(len(index)))))
        return None if few or kind == "shard" else "other ids"
    if len(found) != len(index):
        return f"{len(found)} results of {len(index)} samples"
    if kind == "manifest":
        sizes = [layer.size for layer in index.manifest.layers]
        if sizes != whole["sizes"]:
            return None
        return None if same(found, whole[use][: len(found)]) else "rows that no shard has"
    if use == "rows":
        for i, shard in enumerate(index.manifest.shards):
            part = found[index._starts[i] : index._starts[i + 1]]
            data = changed[f"shards/{i:06d}-{shard.checksum}.safetensors"]
            expected = valid_rows(data, index, shard.rows)
            if expected is None or not torch.equal(part, expected):
                return "rows that its shard does not have"
    return None


class Bench:
    """An index, and what every use of it gives; changed, the uses are tried again."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.base, self.mutated, self.again = (folder / name for name in ("base", "mutated", "again"))
        self.dtype = dtype
        plan._LEAST_SHARDS = 4
        made = self.compress(self.base)
        self.index, self.query, self.fisher = files(self.base), make_query(), dropinf.build_fisher(made)
        warnings.simplefilter("ignore")  # which would open the source that warns
        for codec in ("utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be", "utf-32-le"):
            codecs.lookup(codec)  # opens a file of Python's; json may guess any of them
        self.watch = Watch(self.base, self.mutated, self.again)
        shutil.copytree(self.base, self.mutated)
        self.whole: dict[str, Any] = {use: run() for use, run in uses(self.mutated, self.query, self.fisher).items()}
        self.whole["sizes"] = [layer.size for layer in made.manifest.layers]
        self.slowest, self.failures = 0.0, []

    def compress(self, out: Path) -> dropinf.Index:
        return make_compressor().compress(
            make_batches(SMALL), out=out, dtype=getattr(torch, self.dtype), fisher=FISHERS[self.dtype], ids=names
        )

    def put(self, before: Files, after: Files) -> None:
        for name in before.keys() - after.keys():
            (self.mutated / name).unlink()
        for name, data in after.items():
            if before.get(name) != data:
                (self.mutated / name).write_bytes(data)

    def attempt(self, label: str, kind: str, changed: Files, resume: bool, only: str | None = None) -> set[str]:
        """Try every use of changed files, or one and `verify`; return those that refused them, and keep what is wrong."""
        self.put(self.index, changed)
        jobs = uses(self.mutated, self.query, self.fisher)
        if only is not None:
            jobs = {use: jobs[use] for use in ("verify", only)}
        if resume:
            shutil.copytree(self.mutated, self.again)
            jobs["resume"] = lambda: self.compress(self.again)
        refused = set()
        for use, run in jobs.items():
            began = time.process_time()
            found, error = self.watch.run(run)
            self.slowest = max(self.slowest, time.process_time() - began)
            problem = None
            if self.watch.odd:
                problem = f"it did {self.watch.odd}"
            elif error is not None:
                refused.add(use)
                if not clear(error, self.again if use == "resume" else self.mutated, kind in FORGED):
                    problem = "".join(traceback.format_exception(error))[-1500:]
            elif use == "verify":
                refused |= {use} if found else set()
            elif use != "resume" and not same(found, self.whole[use]):
                problem = wrong(use, found, kind, self.whole, changed, self.mutated)
            if problem:
                self.failures.append(label)
                print(f"{label} ({self.dtype}), {kind}, {use}: {problem}", flush=True)
        shutil.rmtree(self.again, ignore_errors=True)
        self.put(changed, self.index)
        return refused

    def end(self, what: str) -> None:
        assert files(self.mutated) == self.index
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{what}; slowest use {self.slowest:.1f} s, {most} MiB at most")
        assert not self.failures, f"{sorted(set(self.failures))}"

"""Indexes that were damaged or forged, by seed, and what every use of them does: as before, or an error that says why.

A mutation that leaves the checksums as they were must not show in any result. One with new checksums is a forgery: it
may hold other values, but never ones that the file formats do not have, and never reach beyond its folder.
"""

from __future__ import annotations

import codecs
import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from fault_jobs import SMALL, files, make_batches, make_compressor, make_query, names

import dropinf
from dropinf import writer
from dropinf.index import verify

Files = dict[str, bytes]
SECONDS = 20  # what one use may take
DEEP = 3000
FISHERS = {"float32": "block", "int8": "kronecker"}


class Raw(str):
    """JSON text that stands for itself: what cannot be written as a value."""


NESTED = Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP)
HOSTILE = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.0, 1.0, 1.5, -2.5, 1e308, float("nan"), float("inf"), float("-inf"),
    2**31, 2**32 + 1, 2**40, 2**48 - 1, 2**48, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 10**4000, Raw("9" * 5000),
    Raw("1e999"), Raw("-1E+400"), "", "..", "../../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "é", "0",
    "float32", "int8", "bfloat16", "float64", "complex64", "F32", "F16", "I64", "U8", "BOOL", 32 * "0", 32 * "f", 31 * "0",
    32 * "F", "shards/../..", "fisher.safetensors", "manifest.json", "auto", "block", "kronecker",
    [], {}, [0], [0, 0], [1, 1], [-1, 4], [4, -1], [2**62, 2**62], [2**20, 2**20], [2**40], [1.0], [True], ["a"], [[]],
    [0, 2**63], [0, 2**64], {"a": 1}, {"format": "dropinf.index"}, [1, 2, 3], *NESTED,
]  # fmt: skip


def text_of(value: Any, **options) -> str:
    """JSON in which `Raw` stands for itself."""
    raw: list[str] = []

    def mark(x: Any) -> Any:
        if isinstance(x, Raw):
            raw.append(x)
            return f"@raw{len(raw) - 1}@"
        if isinstance(x, dict):
            return {k: mark(v) for k, v in x.items()}
        return [mark(v) for v in x] if isinstance(x, list) else x

    return re.sub(r'"@raw(\d+)@"', lambda m: raw[int(m[1])], json.dumps(mark(value), **options))


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The path to every value inside."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield from places(child, (*at, key))


def reach(value: Any, at: tuple) -> Any:
    for key in at:
        value = value[key]
    return value


def mutate(chance: random.Random, value: Any) -> Any:
    """Change JSON in one place."""
    value = copy.deepcopy(value)
    everywhere = list(places(value))
    numbers = [at for at in everywhere if type(reach(value, at)) in (int, float)]
    at = chance.choice(numbers if numbers and chance.random() < 0.3 else everywhere)
    if not at:
        return chance.choice(HOSTILE)
    parent, key = reach(value, at[:-1]), at[-1]
    kind = chance.randrange(9)
    if kind < 4:
        parent[key] = chance.choice(HOSTILE)
    elif kind == 4:
        del parent[key]
    elif kind == 5:
        if isinstance(parent, list):
            parent.insert(chance.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        else:
            parent[chance.choice(["more", "", "\0", "name", "../x", "\ud800"])] = copy.deepcopy(parent[key])
    elif kind == 6:
        parent[key] = copy.deepcopy(reach(value, chance.choice(list(places(value)))))
    elif type(parent[key]) in (int, float):
        parent[key] += chance.choice([-1, 1, 8, -8, 4096, 2**20, 2**40, 0.5])
    else:
        parent[key] = [parent[key]]
    return value


# Mutations: files -> files.


def flip(chance: random.Random, data: bytes, most: int = 8) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, most)):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(chance: random.Random, data: bytes) -> bytes:
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    other = bytes(chance.randrange(256) for _ in range(chance.randrange(64)))
    whole = [data[:a] + other + data[b:], data[:a] + bytes(b - a) + data[b:]]
    return chance.choice([b"", data[:a], data[a:], data[:a] + data[b:], data + other, *whole])


def bytes_changed(chance: random.Random, index: Files) -> Files:
    name = chance.choice(sorted(index))
    return index | {name: (flip if chance.random() < 0.6 else cut)(chance, index[name])}


def files_changed(chance: random.Random, index: Files) -> Files:
    one, two = chance.sample(sorted(index), 2)
    changed = dict(index)
    kind = chance.randrange(3)
    if kind == 0:
        del changed[one]
    elif kind == 1:
        changed[one], changed[two] = index[two], index[one]
    else:
        changed[one] = index[two]
    return changed


def sealed(body: dict[str, Any]) -> bytes:
    """A manifest with its checksum."""
    options = {"indent": 1, "sort_keys": True}
    plain = {k: v for k, v in body.items() if k != "checksum"}
    text = text_of(plain, **options).encode() + b"\n"
    return text_of({**plain, "checksum": xxhash.xxh3_128_hexdigest(text)}, **options).encode() + b"\n"


def manifest_forged(chance: random.Random, index: Files) -> Files:
    body = json.loads(index["manifest.json"])
    for _ in range(chance.randint(1, 3)):
        changed = mutate(chance, body)
        body = changed if isinstance(changed, dict) else body
    return index | {"manifest.json": sealed(body)}


def with_checksum(index: Files, name: str, data: bytes) -> Files:
    """The index with another file, and its checksum in the manifest."""
    body = json.loads(index["manifest.json"])
    changed = dict(index)
    del changed[name]
    digest = xxhash.xxh3_128_hexdigest(data)
    if name.startswith("shards/"):
        number = int(name[7:13])
        body["runs"][0]["shards"][number]["checksum"] = digest
        name = f"shards/{number:06d}-{digest}.safetensors"
    else:
        body["files"][name] = digest
    return changed | {name: data, "manifest.json": sealed(body)}


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = text_of(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor_file_changed(chance: random.Random, data: bytes, inner: Callable[[random.Random, Any], Any]) -> bytes:
    """Change a safetensors file: its header as JSON, the header's bytes, its length, or where its data ends."""
    header, rest = split(data)
    kind = chance.randrange(10)
    if kind < 4:
        for _ in range(chance.randint(1, 2)):
            changed = mutate(chance, header)
            header = changed if isinstance(changed, dict) and changed else header
        return joined(header, rest)
    if kind == 4:
        start = 8 + int.from_bytes(data[:8], "little")
        return data[:8] + flip(chance, data[8:start]) + data[start:]
    if kind == 5:
        lengths = [0, 1, 7, len(data) - 8, len(data), 2**26, 2**31, 2**62, 2**63, 2**64 - 1]
        return joined(header, rest, chance.choice(lengths))
    if kind == 6:
        return joined(header, cut(chance, rest))
    if kind == 7:
        names = [name for name in header if name != "__metadata__"]
        one, two = chance.choice(names), chance.choice(names)
        a, b = header[one]["data_offsets"]
        size, far = b - a, len(rest)
        header[one]["data_offsets"] = chance.choice(
            [
                header[two]["data_offsets"], [a - 8, b - 8], [a + 8, b + 8], [0, size], [far, far + size], [-size, 0], [b, a],
                [2**63, 2**63 + size], [2**64 - size, 2**64], [far - size, far], [a, b, b], [a], [float(a), float(b)],
            ]
        )  # fmt: skip
        return joined(header, rest)
    return joined(inner(chance, header), rest)


def shard_forged(chance: random.Random, index: Files) -> Files:
    name = chance.choice([name for name in sorted(index) if name.startswith("shards/")])

    def inner(chance: random.Random, header: Any) -> Any:
        meta = json.loads(header["__metadata__"]["dropinf"])
        header["__metadata__"]["dropinf"] = text_of(mutate(chance, meta))
        return header

    if chance.random() < 0.6:
        return with_checksum(index, name, tensor_file_changed(chance, index[name], inner))
    header, rest = split(index[name])
    rest = bytearray(rest)
    a, b = header["ids"]["data_offsets"]
    c, d = header["id_offsets"]["data_offsets"]
    if chance.random() < 0.5:
        rest[chance.randrange(a, b)] = chance.choice([0x80, 0xC3, 0xFF, 0xED, 0xA0, 0xF8, 0, 10])
    else:
        at = chance.randrange(c, d, 8)
        value = chance.choice([-1, -(2**63), 2**63 - 1, 2**62, 0, 1, 2, b - a, b - a + 1, 10**9])
        rest[at : at + 8] = value.to_bytes(8, "little", signed=True)
    return with_checksum(index, name, joined(header, bytes(rest)))


def fisher_forged(chance: random.Random, index: Files) -> Files:
    name = "fisher.safetensors"

    def inner(chance: random.Random, header: Any) -> Any:
        meta = json.loads(header["__metadata__"]["dropinf"])
        for _ in range(chance.randint(1, 2)):
            meta = mutate(chance, meta)
        header["__metadata__"]["dropinf"] = text_of(meta)
        return header

    if chance.random() < 0.5:
        return with_checksum(index, name, joined(inner(chance, split(index[name])[0]), split(index[name])[1]))
    return with_checksum(index, name, tensor_file_changed(chance, index[name], inner))


STRICT = {"bytes": bytes_changed, "files": files_changed}
FORGED = {"manifest": manifest_forged, "shard": shard_forged, "fisher": fisher_forged}
KINDS = ("bytes", "files", "manifest", "manifest", "shard", "shard", "fisher")


# Uses.


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
        signal.signal(signal.SIGALRM, self.late)

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
        signal.alarm(SECONDS)
        try:
            return use(), None
        except BaseException as error:
            return None, error
        finally:
            signal.alarm(0)
            self.on = False


def clear(error: BaseException, folder: Path, forged: bool) -> bool:
    """Whether it is an error that a user can act on: of a file, or, of other values, of what they are not fit for."""
    if not isinstance(error, ValueError | OSError) or isinstance(error, UnicodeError):
        return False
    values = r"^(query|fisher) and (train|gradients) differ: layer|is singular to working precision"
    return str(folder) in str(error) or (forged and re.search(values, str(error)) is not None)


def valid_rows(data: bytes, index: dropinf.Index, rows: int) -> torch.Tensor | None:
    """The rows of a forged shard, as the safetensors library and no other reads it; None where it is not one."""
    try:
        found = safetensors.torch.load(data)
        values = found["gradients"]
        if index.manifest.dtype == "int8":
            assert values.dtype == torch.int8
            assert found["scale"].dtype == torch.float32
            values = values * found["scale"].unsqueeze(1) * index.factors()
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
        writer._LEAST_SHARDS = 4
        made = self.compress(self.base)
        self.index, self.query, self.fisher = files(self.base), make_query(), dropinf.build_fisher(made)
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
            began = time.monotonic()
            found, error = self.watch.run(run)
            self.slowest = max(self.slowest, time.monotonic() - began)
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


def fuzz(folder: str, dtype: str, first: int, count: int, resumes: int) -> None:
    """Mutate an index by each seed of a range; every one of `resumes` is compressed into again, too."""
    bench = Bench(Path(folder), dtype)
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        chance = random.Random(seed)
        kind = chance.choice(KINDS)
        changed = {**STRICT, **FORGED}[kind](chance, bench.index)
        refused = bench.attempt(f"seed {seed}", kind, changed, seed % resumes == 0)
        outcomes[f"{kind}: {'refused' if refused else 'as before' if kind in STRICT else 'accepted'}"] += 1
    bench.end(f"{count} indexes: {dict(sorted(outcomes.items()))}")


# Forgeries by name, each of which must be refused.


def put(*at_and_value: Any) -> Callable[[Any], None]:
    """Set the value at a path; the last is the value."""
    *at, value = at_and_value

    def change(body: Any) -> None:
        reach(body, tuple(at[:-1]))[at[-1]] = value

    return change


def drop(*at: Any) -> Callable[[Any], None]:
    def change(body: Any) -> None:
        del reach(body, at[:-1])[at[-1]]

    return change


SHARD, LAYER = ("runs", 0, "shards", 0), ("layers", 0)
MANIFESTS: dict[str, Callable[[Any], None]] = {
    **{f"a shard's checksum is {x!r}": put(*SHARD, "checksum", x) for x in ("../../etc/passwd", "/etc/passwd", 32 * "F", 31 * "0", "", None, 7, 32 * "٣")},
    **{f"a file is {x!r}": put("files", x, 32 * "0") for x in ("../secret", "/etc/passwd", "manifest.json", "", "shards/x", "a\0b")},
    **{f"a file's checksum is {x!r}": put("files", "fisher.safetensors", x) for x in ("..", None, [], 32 * "g")},
    **{f"rows are {str(x)[:12]}": put(*SHARD, "rows", x) for x in (0, -1, True, 1.0, None, "3", 2**30, 2**40, 2**48, 2**63, 10**30, 10**4000)},
    **{f"a shape is {x}": put(*LAYER, "shape", x) for x in ([2**20, 2**20], [2**40], [2**63, 2], [0], [-3, 3], [-3, -3], [True, 3], [3.0, 3], [], [1, 1, 9], "33", None, 9, [9, "1"], {"0": 9})},
    **{f"a size is {x}": put(*LAYER, "size", x) for x in (float("nan"), float("inf"), Raw("1e999"), 0.0, -1.0, 1, None, "1.0")},
    **{f"a name is {x!r}": put(*LAYER, "name", x) for x in (None, 3, [], "2")},
    **{f"version is {str(x)[:8]}": put("version", x) for x in (2, 0, -1, "1", None, [1], 10**30)},
    **{f"dtype is {x!r}": put("dtype", x) for x in ("complex64", "", None, ["float32"], {}, "bfloat16", "float64")},
    **{f"ids are {x!r}": put("ids", x) for x in (1, 0, "true", None)},
    **{f"{name} is {x!r}": put(name, x) for name in ("layers", "runs", "files", "about") for x in (None, 1, "x")},
    **{f"{name} is missing": drop(name) for name in ("version", "layers", "dtype", "model", "ids", "runs", "files", "about", "format")},
    **{f"a run's {name} is missing": drop("runs", 0, name) for name in ("first", "batches", "shard_batches", "shards")},
    **{f"a run's {name} is {x!r}": put("runs", 0, name, x) for name in ("batches", "shard_batches") for x in (0, -1, 1.5, True, "2", [])},
    "no layers": put("layers", []),
    "no runs": put("runs", []),
    "a run that is not finished": put("runs", 0, "shards", None),
    "a run in the middle that is not finished": lambda body: body["runs"].insert(0, {**body["runs"][0], "shards": None}),
    "a layer twice": lambda body: body["layers"].append(body["layers"][0]),
    "a shard twice": lambda body: body["runs"][0]["shards"].append(body["runs"][0]["shards"][0]),
    "two shards in another order": lambda body: body["runs"][0]["shards"].reverse(),
    "another format": put("format", "dropinf.gradients"),
    "a field more": put("more", 1),
    "about is not text": put("about", "a", 1),
    "about is deep": put("about", "a", NESTED[0]),
    "more is deep": put("more", NESTED[1]),
}  # fmt: skip


def tensor(name: str, **fields: Any) -> Callable[[Any, bytearray], None]:
    """Change a tensor's entry in a header."""

    def change(header: Any, rest: bytearray) -> None:
        header[name] |= fields

    return change


def moved(name: str, first: int, last: int) -> Callable[[Any, bytearray], None]:
    def change(header: Any, rest: bytearray) -> None:
        header[name]["data_offsets"] = [x + d for x, d in zip(header[name]["data_offsets"], (first, last), strict=True)]

    return change


def offset(at: int, value: int) -> Callable[[Any, bytearray], None]:
    """Change one of the offsets of ids."""

    def change(header: Any, rest: bytearray) -> None:
        start = header["id_offsets"]["data_offsets"][0] + 8 * at
        rest[start : start + 8] = value.to_bytes(8, "little", signed=True)

    return change


def not_text(header: Any, rest: bytearray) -> None:
    rest[header["ids"]["data_offsets"][0]] = 0xFF


SHARDS: dict[str, Callable[[Any, bytearray], None]] = {
    **{f"dtype {x}": tensor("gradients", dtype=x) for x in ("F16", "BF16", "F64", "U8", "", None, 7)},
    **{f"shape {x}": tensor("gradients", shape=x) for x in ([1, 1], [2**62, 2**62], [-1, -1], [], None, "x", [12], [[12, 30]])},
    **{f"offsets {x}": tensor("gradients", data_offsets=x) for x in ([0, 2**63], [2**64, 2**65], [-8, 8], [8, 0], [0], [0, 8, 16], None, "x", [0.0, 8.0], [False, True], {})},
    **{f"{name} moved by {d}": moved(name, d, d) for name in ("gradients", "ids", "id_offsets") for d in (-8, 8, -1, 1, 2**40)},
    **{f"{name} grown by {d}": moved(name, 0, d) for name in ("gradients", "ids", "id_offsets") for d in (-8, 8, -1, 1)},
    **{f"no {name}": lambda header, rest, name=name: header.pop(name) for name in ("gradients", "ids", "id_offsets")},
    **{f"offset {at} of ids is {x}": offset(at, x) for at, x in ((0, 1), (0, -1), (1, -1), (1, 10**6), (2, 2**62), (2, -(2**63)), (11, 0), (12, 10**6), (12, 0))},
    "ids that are not text": not_text,
    "a byte more": lambda header, rest: rest.append(0),
    "a byte less": lambda header, rest: rest.pop(),
    "a gap": lambda header, rest: rest.extend(bytes(64)),
    "nothing": lambda header, rest: (header.clear(), rest.clear()),
    "deep": lambda header, rest: header.update(more=NESTED[0]),
    "one inside another": lambda header, rest: header.update(more={"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}),
}  # fmt: skip
HEADS = {
    "an endless header": lambda data: (2**64 - 1).to_bytes(8, "little") + data[8:],
    "a header of half of all memory": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "a header to the end": lambda data: (len(data) - 8).to_bytes(8, "little") + data[8:],
    "no header": lambda data: bytes(8) + data[8:],
    "nothing at all": lambda data: b"",
    "a short length": lambda data: data[:5],
    "a list": lambda data: joined([1, 2], split(data)[1]),
    "not JSON": lambda data: data[:8] + b"\xff" + data[9:],
}
FISHER: dict[str, Callable[[Any], None]] = {
    **{f"kind is {x!r}": put("kind", x) for x in ("dense", None, ["block"], {}, 3, "joint", "diagonal")},
    **{f"damping is {str(x)[:12]}": put("damping", x) for x in (-1, float("nan"), float("inf"), "x", None, [], True, {}, 10**400)},
    **{f"absolute is {x!r}": put("absolute", x) for x in (1, None, "no")},
    **{f"count is {str(x)[:12]}": put("count", x) for x in (0, -1, 1, 1.5, True, None, "x", 2**60, 10**30)},
    **{f"a layer is {x!r}": put("layers", 0, x) for x in (None, [], ["0", [3, 3]], ["0", [3, 3], 7], ["0", [2**40, 2**40], "x"], ["0", "33", "x"], ["0", [3, -3], "x"], ["0", [1, 3, 3], "x"], [["0"], [3, 3], "x"], "abc")},
    **{f"a block is {x!r}": put("blocks", 0, x) for x in (None, {}, [], 3)},
    **{f"a block's count is {x!r}": put("blocks", 0, "count", x) for x in (0, -1, None, "x", 1.5, 2**40)},
    **{f"a block's fourths are {x!r}": put("blocks", 0, "fourths", x) for x in (None, "x", float("nan"), float("inf"), [])},
    **{f"a block's {name} is {x!r}": put("blocks", 1, name, x) for name in ("rows", "gram") for x in (None, 2, 2**40, -1, "x", 0.5, [])},
    **{f"a block has a {name}": put("blocks", 0, name, "x") for name in ("solve", "width", "__class__", "name", "_factor")},
    "layers in another order": lambda header: header["layers"].reverse(),
    "a layer less": lambda header: (header["layers"].pop(), header["blocks"].pop()),
    "a block less": lambda header: header["blocks"].pop(),
    "no blocks": put("blocks", None),
    "no layers": put("layers", None),
    "no sums": put("blocks", 1, "gram", False),
    "another layer's digest": lambda header: header["layers"][0].__setitem__(2, header["layers"][1][2]),
    "another format": put("format", "dropinf-masks-1"),
    "deep": put("more", NESTED[1]),
}  # fmt: skip


def named_forgeries(index: Files) -> Iterator[tuple[str, str, str, Files]]:
    """(label, kind, the use that must refuse it, files)."""
    for label, change in MANIFESTS.items():
        body = json.loads(index["manifest.json"])
        change(body)
        inside = label in ("a shard twice", "two shards in another order", "dtype is 'bfloat16'", "dtype is 'float64'")
        yield f"manifest, {label}", "manifest", "rows" if inside else "open", index | {"manifest.json": sealed(body)}
    shard = min(name for name in index if name.startswith("shards/"))
    for label, alter in SHARDS.items():
        header, data = split(index[shard])
        rest = bytearray(data)
        alter(header, rest)
        use = "ids" if "ids" in label or "id_offsets" in label else "rows"
        yield f"shard, {label}", "shard", use, with_checksum(index, shard, joined(header, bytes(rest)))
    for name, kind, use in ((shard, "shard", "rows"), ("fisher.safetensors", "fisher", "fisher")):
        for label, head in HEADS.items():
            yield f"{kind}, {label}", kind, use, with_checksum(index, name, head(index[name]))
    name = "fisher.safetensors"
    for label, change in FISHER.items():
        header, rest = split(index[name])
        meta = json.loads(header["__metadata__"]["dropinf"])
        change(meta)
        header["__metadata__"]["dropinf"] = text_of(meta)
        yield f"fisher, {label}", "fisher", "fisher", with_checksum(index, name, joined(header, rest))
    for label, value in (("NaN", b"\0\0\xc0\x7f"), ("infinite", b"\0\0\x80\x7f")):
        header, rest = split(index[name])
        yield f"fisher, {label}", "fisher", "fisher", with_checksum(index, name, joined(header, value + rest[4:]))


def forge(folder: str, dtype: str, all_uses: bool) -> None:
    """Try every forgery that has a name, each by what must refuse it, or by all uses."""
    bench = Bench(Path(folder), dtype)
    count = 0
    for label, kind, use, changed in named_forgeries(bench.index):
        count += 1
        if use not in bench.attempt(label, kind, changed, all_uses, None if all_uses else use):
            bench.failures.append(label)
            print(f"{label} ({dtype}): {use} took it", flush=True)
    bench.end(f"{count} forgeries")

"""Forgeries by name, each of which must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.mutations import NESTED, Files, Raw, joined, reach, sealed, split, text_of, with_checksum
from tests.faults.uses import Bench


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
CALL = {"first": 32 * "0", "batches": 12, "rows": 47, "printed": True}  # a row less than there are
MANIFESTS: dict[str, Callable[[Any], None]] = {
    **{f"a shard's checksum is {x!r}": put(*SHARD, "checksum", x) for x in ("../../etc/passwd", "/etc/passwd", 32 * "F", 31 * "0", "", None, 7, 32 * "٣")},
    **{f"a file is {x!r}": put("files", x, 32 * "0") for x in ("../secret", "/etc/passwd", "manifest.json", "", "shards/x", "a\0b")},
    **{f"a file's checksum is {x!r}": put("files", "fisher.safetensors", x) for x in ("..", None, [], 32 * "g")},
    **{f"rows are {str(x)[:12]}": put(*SHARD, "rows", x) for x in (0, -1, True, 1.0, None, "3", 2**30, 2**40, 2**48, 2**63, 10**30, 10**4000)},
    **{f"a shape is {x}": put(*LAYER, "shape", x) for x in ([2**20, 2**20], [2**40], [2**63, 2], [0], [-3, 3], [-3, -3], [True, 3], [3.0, 3], [], [1, 1, 9], "33", None, 9, [9, "1"], {"0": 9})},
    **{f"a size is {x}": put(*LAYER, "size", x) for x in (float("nan"), float("inf"), Raw("1e999"), 0.0, -1.0, 1, 1.0, "1.0")},
    **{f"a name is {x!r}": put(*LAYER, "name", x) for x in (None, 3, [], "2")},
    **{f"version is {str(x)[:8]}": put("version", x) for x in (4, 0, -1, "1", None, [1], 10**30)},
    **{f"dtype is {x!r}": put("dtype", x) for x in ("complex64", "", None, ["float32"], {}, "bfloat16", "float64")},
    **{f"ids are {x!r}": put("ids", x) for x in (1, 0, "true", None)},
    **{f"{name} is {x!r}": put(name, x) for name in ("layers", "runs", "files", "about") for x in (None, 1, "x")},
    **{f"{name} is missing": drop(name) for name in ("version", "layers", "dtype", "model", "ids", "runs", "files", "about", "format")},
    **{f"a run's {name} is missing": drop("runs", 0, name) for name in ("first", "batches", "shard_batches", "shards", "printed", "key", "calls", "replaces")},
    **{f"a run's {name} is {x!r}": put("runs", 0, name, x) for name in ("batches", "shard_batches") for x in (0, -1, 1.5, True, "2", [])},
    **{f"a run's printed is {x!r}": put("runs", 0, "printed", x) for x in (0, 1, None, "true", [])},
    **{f"a shard's number is {x!r}": put(*SHARD, "number", x) for x in (-1, 1, 7, True, None, "0", 2**48, 10**30)},
    **{f"a run's key is {x!r}": put("runs", 0, "key", x) for x in (None, "", 7, 31 * "0", "../x")},
    **{f"a run's replaces is {x!r}": put("runs", 0, "replaces", x) for x in (None, "x", [7], ["x"], {})},
    **{f"a run's calls are {x!r}": put("runs", 0, "calls", x) for x in (None, "x", [7], [{}], [CALL], [{**CALL, "rows": 0}], [{**CALL, "batches": -1}], [{**CALL, "batches": None}])},
    **{f"origin is {x!r}": put("origin", x) for x in (1, [], ["a"], [1, 2], ["a", "b", "c"], "ab", {})},
    **{f"order is {x!r}": put("order", x) for x in (1, "", "x", [], 32 * "0", 32 * "F")},
    "no layers": put("layers", []),
    "no runs": put("runs", []),
    "a run that is not finished": put("runs", 0, "shards", None),
    "a run in the middle that is not finished": lambda body: body["runs"].insert(0, {**body["runs"][0], "shards": None}),
    "a layer twice": lambda body: body["layers"].append(body["layers"][0]),
    "a run twice": lambda body: body["runs"].append(body["runs"][0]),
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
    **{f"a block's exponent is {x!r}": put("blocks", 0, "exponent", x) for x in (None, "x", 0.5, True, -127, 2**40, [])},
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

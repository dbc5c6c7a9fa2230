"""Files of an index, changed by chance: their bytes, which is where, or what they say, with checksums that are right."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import xxhash

Files = dict[str, bytes]


DEEP = 3000


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

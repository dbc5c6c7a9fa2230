"""The fingerprint of a batch: of every leaf, the same wherever it is taken, and asked for by name where there is none."""

from __future__ import annotations

import copy
import dataclasses
import enum
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from safetensors import safe_open

import dropinf
from dropinf.index.fingerprint import fingerprint
from tests.index.small import make_batches, make_compressor, names

Pair = namedtuple("Pair", "x y")
RECORD = np.dtype([("a", "<i4"), ("b", "<f8")])


@dataclasses.dataclass
class Sample:
    x: object
    y: object = 0


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Opaque:
    pass


# Each differs from its neighbours by one leaf, and all are told apart.
VALUES = {
    "zeros": torch.zeros(2, 3), "ones": torch.ones(2, 3), "another shape": torch.zeros(3, 2), "of rank 1": torch.zeros(6),
    "float64": torch.zeros(2, 3, dtype=torch.float64), "int32": torch.zeros(2, 3, dtype=torch.int32),
    "bfloat16": torch.ones(2, dtype=torch.bfloat16), "float16": torch.ones(2, dtype=torch.float16),
    "complex": torch.ones(2, dtype=torch.complex64) * 1j, "its conjugate": (torch.ones(2, dtype=torch.complex64) * 1j).conj(),
    "scalar": torch.tensor(1.0), "empty": torch.zeros(0), "another empty": torch.zeros(0, 2), "minus zero": -torch.zeros(2, 3),
    "nan": torch.tensor(float("nan")), "sparse": torch.eye(3).to_sparse(), "dense": torch.eye(3),
    "more sparse": torch.eye(4).to_sparse(), "flags": torch.tensor([True, False]), "bytes in a tensor": torch.tensor([1, 0], dtype=torch.uint8),
    "array": np.zeros((2, 3), np.float32), "array of float64": np.zeros((2, 3)), "array of text": np.array(["a", "b"]),
    "other text": np.array(["a", "c"]), "array of objects": np.array([1, "a", None], dtype=object),
    "other objects": np.array([1, "b", None], dtype=object), "records": np.zeros(2, RECORD), "NumPy number": np.float32(0),
    "masked": np.ma.masked_array([1, 2], [False, True]), "not masked": np.ma.masked_array([1, 2], [False, False]),
    "text": "abc", "more text": "abcd", "no text": "", "é": "é", "half a character": "\ud800", "text of a number": "1",
    "bytes": b"abc", "no bytes": b"", "1": 1, "1.0": 1.0, "True": True, "False": False, "None": None, "0": 0, "0.0": 0.0,
    "-0.0": -0.0, "large": 10**5000, "larger": 10**5000 + 1, "imaginary": 1j, "path": pathlib.PurePosixPath("a"),
    "range": range(3), "red": Colour.RED, "blue": Colour.BLUE, "dtype": torch.float32,
    "list": ["ab", "c"], "list cut elsewhere": ["a", "bc"], "list in a list": [["ab"], "c"], "nested": [["ab", "c"]],
    "no list": [], "list of none": [None], "list of no list": [[]], "numbers": [1, 2, 3], "other numbers": [1, 2, 4],
    "numbers and a large one": [1, 2, 10**5000], "tensors": [torch.zeros(2), torch.ones(2)], "tensors, swapped": [torch.ones(2), torch.zeros(2)],
    "mapping": {"a": 1, "b": 2}, "mapping, swapped": {"a": 2, "b": 1}, "no mapping": {}, "number key": {1: "a"}, "text key": {"1": "a"},
    "set": {1, 2}, "other set": {1, 3}, "fields": Sample(1, 2), "other fields": Sample(2, 1), "deep": Sample([{"a": (torch.ones(1), "x")}]),
    "deep, otherwise": Sample([{"a": (torch.ones(1), "y")}]),
}  # fmt: skip


def test_all_leaves_count():
    found = {name: fingerprint(value) for name, value in VALUES.items()}
    same = [pair for pair in itertools.combinations(found, 2) if found[pair[0]] == found[pair[1]]]
    assert same == []
    assert all(fingerprint(copy.deepcopy(value)) == found[name] for name, value in VALUES.items())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, OrderedDict(a=1)),
        ({"a": 1}, UserDict(a=1)),
        ([1, torch.ones(2)], (1, torch.ones(2))),
        ((1, torch.ones(2)), Pair(1, torch.ones(2))),
        ({"a", "b", "c"}, frozenset(["c", "b", "a"])),
        (torch.arange(6).view(2, 3).t(), torch.arange(6).view(2, 3).t().contiguous()),
        (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(2, 3).T.copy()),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
    ],
)
def test_what_a_loss_cannot_tell_apart_is_the_same(one, other):
    assert fingerprint(one) == fingerprint(other)


def test_batches_of_transformers():
    transformers = pytest.importorskip("transformers")
    one = transformers.BatchEncoding({"input_ids": torch.ones(2, 3), "text": ["a", "b"]})
    two = transformers.BatchEncoding({"text": ["a", "b"], "input_ids": torch.ones(2, 3)})
    three = transformers.BatchEncoding({"text": ["a", "c"], "input_ids": torch.ones(2, 3)})
    assert fingerprint(one) == fingerprint(two) != fingerprint(three)


def test_another_process_finds_the_same():
    """Whose hashes of text, and so the order of sets, are others."""
    code = "from tests.index.test_fingerprint import *; print({n: fingerprint(v) for n, v in VALUES.items()})"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout == f"{ {name: fingerprint(value) for name, value in VALUES.items()} }\n", done.stderr


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Opaque(), r"a batch has a tests\.\S+\.Opaque, which has no fingerprint, .* pass ids="),
        ([1, [Opaque()]], r"Opaque at batch\[1\]\[0\], which has no fingerprint"),
        ({"x": Sample(Opaque())}, r"Opaque at batch\['x'\]\.x, which has no fingerprint"),
        (np.array([Opaque()], dtype=object), r"Opaque at batch\[0\], which has no fingerprint"),
        (torch.zeros(2, device="meta"), "on the meta device, which has no values"),
    ],
)
def test_what_has_no_fingerprint(batch, message):
    with pytest.raises(ValueError, match=message):
        fingerprint(batch)


def test_a_batch_that_contains_itself():
    batch: list = [torch.ones(2)]
    batch.append(batch)
    with pytest.raises(ValueError, match="contains itself"):
        fingerprint(batch)


def test_with_ids_what_has_no_fingerprint_counts_by_its_type():
    assert fingerprint([Opaque(), 1], named=True) == fingerprint([Opaque(), 1], named=True)
    assert fingerprint([Opaque(), 1], named=True) != fingerprint([Opaque(), 2], named=True)


def test_an_index_of_batches_without_a_fingerprint_asks_for_ids(train, tmp_path):
    batches = [(*batch, Opaque()) for batch in make_batches()]
    with pytest.raises(ValueError, match=r"Opaque at batch\[2\], which has no fingerprint, .* pass ids="):
        make_compressor().compress(batches, out=tmp_path / "idx")
    assert not (tmp_path / "idx" / "manifest.json").exists()
    index = make_compressor().compress(batches, out=tmp_path / "idx", ids=names)
    assert torch.equal(index[:].flat, train.flat)
    with pytest.raises(ValueError, match="ids: those of batch 0 are"):
        make_compressor().compress(batches, out=tmp_path / "idx", ids=lambda batch: [f"{n}!" for n in names(batch)])


def test_every_batch_has_its_fingerprint_in_its_shard(index):
    found = []
    for path in sorted((index.path / "shards").iterdir()):
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["dropinf"])
        assert header["run"] == index.manifest.runs[0].key
        found += header["prints"]
    assert found == [fingerprint(batch, named=True) for batch in make_batches()]


def test_a_loss_that_changes_its_batch_changes_no_fingerprint(tmp_path):
    """It is of the batch as it came."""

    def batches():
        return [{"x": x, "y": y} for x, y in make_batches()]

    def loss(model, batch):
        batch["seen"] = True
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    for _ in range(2):
        dropinf.Compressor(make_compressor().model, dropinf.Dropout(6), loss).compress(batches(), out=tmp_path / "idx")


class Tagged(np.ndarray):
    """An array with an attribute."""


def tagged(value):
    x = np.zeros(3).view(Tagged)
    x.tag = value
    return x


@pytest.mark.parametrize(
    "make", [tagged, lambda v: np.ma.MaskedArray(np.array([v, 1.0]), mask=[True, False], fill_value=0.0)]
)
def test_what_arrays_hold_beside_their_values(make):
    assert fingerprint(make(1.0)) == fingerprint(make(1.0))
    assert fingerprint(make(1.0)) != fingerprint(make(2.0))

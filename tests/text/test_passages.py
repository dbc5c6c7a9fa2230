"""Passages from every kind of source, what is wrong with a source, and how passages are put into batches."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropinf.text.passage_file import write_passages
from dropinf.text.passages import Passage, length_batches, packed_batches, read_passages

ROWS = [
    {"key": "a", "body": "ein Satz", "class": 1, "rest": [1]},
    {"key": "b", "body": "第二\u2028x", "class": 0, "rest": []},
    {"key": "c", "body": " three ", "class": 2, "rest": None},
]
FIELDS = {"text_field": "body", "id_field": "key", "label_field": "class"}
WANTED = [Passage("a", "ein Satz", 1), Passage("b", "第二\u2028x", 0), Passage("c", " three ", 2)]


@contextlib.contextmanager
def refused(*parts: str, error: type[Exception] = ValueError):
    """The error's message, of one line, has all parts."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def lines(*rows) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def jsonl(folder: Path, *rows) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(lines(*rows))
    return path


def parquet(folder: Path, rows: list[dict]) -> Path:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = folder / "data.parquet"
    writer.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


class Table:
    """What is used of a datasets.Dataset."""

    split = "train"

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])

    def select_columns(self, names: list[str]) -> list[dict]:
        return [{name: row[name] for name in names} for row in self.rows]


@pytest.fixture
def fake_datasets(monkeypatch):
    """The library, with one dataset of two splits that goes by the name "org/words"."""
    splits = {"train": Table(ROWS), "test": Table(ROWS[:1])}

    def load_dataset(name: str, split: str | None = None):
        if name != "org/words":
            raise FileNotFoundError(f"no {name}\non the hub")
        return splits if split is None else splits[split]

    module = SimpleNamespace(load_dataset=load_dataset, load_from_disk=None)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_json_lines(tmp_path):
    data = (
        b"\xef\xbb\xbf" + lines(*ROWS[:2], b"", b"  ", ROWS[2])[:-1]
    )  # a byte order mark, blank lines, no last newline
    for path in (tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"):
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        assert read_passages(path, **FIELDS) == WANTED
        assert read_passages(str(path), text_field="body") == [Passage(str(i), p.text) for i, p in enumerate(WANTED)]
        assert read_passages(path, **FIELDS, limit=2) == WANTED[:2]
        assert read_passages(path, **FIELDS, limit=9) == WANTED


def test_parquet(tmp_path):
    path = parquet(tmp_path, ROWS)
    assert read_passages(path, **FIELDS) == WANTED
    assert read_passages(path, text_field="body", id_field="body")[0] == Passage("ein Satz", "ein Satz")
    assert [p.id for p in read_passages(path, text_field="body", limit=2)] == ["0", "1"]


def test_ids_of_numbers_and_labels_of_booleans(tmp_path):
    path = jsonl(tmp_path, {"text": "x", "n": 7, "y": True}, {"text": "y", "n": 8, "y": False})
    assert read_passages(path, id_field="n", label_field="y") == [Passage("7", "x", 1), Passage("8", "y", 0)]


@pytest.mark.parametrize(("source", "count"), [("org/words:train", 3), ("org/words:test", 1)], ids=["train", "test"])
def test_datasets_by_name(fake_datasets, source, count):
    assert read_passages(source, **FIELDS) == WANTED[:count]


def test_what_is_wrong_with_a_dataset(fake_datasets):
    with refused("org/words: which of its splits?; pass one of org/words:train, org/words:test"):
        read_passages("org/words", **FIELDS)
    with refused("org/word: datasets cannot load it (no org/word); pass a file"):
        read_passages("org/word", **FIELDS)
    with refused("words:train: no field 'text'; its fields are key, body, class, rest: name one with text_field="):
        read_passages("org/words:train")


def test_saved_datasets(fake_datasets, tmp_path):
    (tmp_path / "dataset_dict.json").touch()
    one, two = {"train": Table(ROWS)}, {"train": Table(ROWS), "test": Table(ROWS[:1])}
    fake_datasets.load_from_disk = lambda folder: {str(tmp_path): two}[folder]
    assert read_passages(f"{tmp_path}:test", **FIELDS) == WANTED[:1]
    with refused(f"no split 'dev'; pass one of {tmp_path}:train, {tmp_path}:test"):
        read_passages(f"{tmp_path}:dev", **FIELDS)
    fake_datasets.load_from_disk = lambda folder: one
    assert read_passages(tmp_path, **FIELDS) == WANTED
    fake_datasets.load_from_disk = lambda folder: Table(ROWS)
    assert read_passages(tmp_path, **FIELDS) == read_passages(f"{tmp_path}:train", **FIELDS) == WANTED
    with refused("no split 'test', it is one dataset; pass"):
        read_passages(f"{tmp_path}:test", **FIELDS)


def test_datasets_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "two")
    assert read_passages(tmp_path / "one", **FIELDS) == WANTED
    assert read_passages(f"{tmp_path}/two:test", **FIELDS) == WANTED[:1]
    with refused("which of its splits"):
        read_passages(tmp_path / "two", **FIELDS)
    with refused("one: no field 'text'; its fields are key, body, class, rest"):
        read_passages(tmp_path / "one")


def test_missing_libraries(monkeypatch, tmp_path):
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with refused(
        "'org/words', not a file,", "datasets; install it with: pip install datasets", error=ModuleNotFoundError
    ):
        read_passages("org/words")
    (tmp_path / "x.parquet").touch()
    with refused("a Parquet file needs pyarrow; install it with: pip install pyarrow", error=ModuleNotFoundError):
        read_passages(tmp_path / "x.parquet")


GOOD = {"text": "x", "id": "a", "label": 0}
WRONG = {
    "not JSON": ([GOOD, b"{"], "line 2: not JSON (", "); every line must be one JSON object"),
    "deep": ([b"[" * 100_000], "line 1: not JSON"),
    "no object": ([b"[1]"], "line 1: list [1]; every line must be"),
    "not UTF-8": ([GOOD, b'{"text": "\xff"}'], "line 2: not UTF-8 (", " at byte 10)"),
    "no field": (
        [{"id": "a", "body": "x"}],
        "line 1: no field 'text'; its fields are id, body: name one with text_field=",
    ),
    "no fields": ([{}], "line 1: no field 'text'; its fields are none"),
    "no id": (
        [GOOD, b"", {"text": "x", "label": 0}],
        "line 3: no field 'id'; its fields are text, label: name one with id_field=",
    ),
    "no label": (
        [{"text": "x", "id": "a"}],
        "line 1: no field 'label'; its fields are text, id: name one with label_field=",
    ),
    "number": ([GOOD | {"text": 3}], "line 1: field 'text' is int 3; it must be text"),
    "null": ([GOOD | {"text": None}], "line 1: field 'text' is null; it must be text"),
    "empty": ([GOOD | {"text": ""}], "line 1: field 'text' is empty"),
    "white": ([GOOD | {"text": " \n"}], "line 1: field 'text' is empty, or white space alone; leave the row out"),
    "surrogate": ([GOOD | {"text": "ab\ud800"}], "line 1: field 'text' has half a surrogate pair at character 2"),
    "surrogate id": ([GOOD | {"id": "\ud800"}], "line 1: field 'id' has half a surrogate pair"),
    "twice": ([GOOD, GOOD | {"id": "b"}, GOOD], "line 3: id 'a' is that of line 1 too; ids must be unique"),
    "twice, as text": ([GOOD | {"id": 1}, GOOD | {"id": "1"}], "line 2: id '1' is that of line 1 too"),
    "id": ([GOOD | {"id": 1.5}], "line 1: field 'id' is float 1.5; an id must be"),
    "boolean id": ([GOOD | {"id": True}], "line 1: field 'id' is bool True"),
    "empty id": ([GOOD | {"id": ""}], "line 1: field 'id' is str ''"),
    "label": (
        [GOOD | {"label": 1.0}],
        "line 1: field 'label' is float 1.0; a label must be a whole number, a class from 0 on",
    ),
    "no rows": ([b"", b" "], "data.jsonl: no passages in it"),
    "nothing": ([], "data.jsonl: no passages in it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_json_lines(tmp_path, name):
    rows, *parts = WRONG[name]
    path = jsonl(tmp_path, *rows)
    with refused(str(path), *parts):
        read_passages(path, id_field="id", label_field="label")


def test_what_is_wrong_with_a_file(tmp_path):
    for name in ("x.jsonl", "x.jsonl.gz", "x.parquet"):
        with refused(f"{name}: no such file", error=FileNotFoundError):
            read_passages(tmp_path / name)
    (tmp_path / "x.csv").write_text("text\nx\n")
    with refused("x.csv: not a file that can be read; it must end in .jsonl, .jsonl.gz or .parquet"):
        read_passages(tmp_path / "x.csv")
    with refused("limit is 0; it must be at least 1"):
        read_passages(tmp_path / "x.csv", limit=0)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    whole = gzip.compress(lines(*({"text": f"text {i} {i * i}"} for i in range(500))))
    for data in (whole[:-20], b"plain text", whole[:40] + bytes(60) + whole[100:]):
        path.write_bytes(data)
        with refused("x.jsonl.gz: damaged, not a whole gzip file ("):
            read_passages(path)


def test_what_is_wrong_with_parquet(tmp_path):
    path = parquet(tmp_path, [{"text": "x", "n": 1}, {"text": "y", "n": 2}, {"text": "z", "n": 1}])
    with refused("data.parquet, row 2: id '1' is that of row 0 too"):
        read_passages(path, id_field="n")
    with refused("data.parquet, row 0: field 'n' is int 1; it must be text"):
        read_passages(path, text_field="n")
    with refused("data.parquet: no field 'body'; its fields are text, n: name one with text_field="):
        read_passages(path, text_field="body")
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    with refused("data.parquet: damaged, not a whole Parquet file ("):
        read_passages(path)
    path.write_bytes(data[:4] + bytes(30) + data[34:])
    with refused("data.parquet: damaged, not a whole Parquet file, after row 0 ("):
        read_passages(path)


def test_write_and_read_back(tmp_path):
    path = tmp_path / "passages.jsonl"
    write_passages([Passage("old", "x")], path)
    write_passages(WANTED, path)
    assert read_passages(path, id_field="id", label_field="label") == WANTED
    assert "第二" in path.read_text(encoding="utf-8")
    write_passages([Passage("a", "x")], path)
    assert json.loads(path.read_bytes()) == {"id": "a", "text": "x"}
    assert os.listdir(tmp_path) == ["passages.jsonl"]


def test_a_write_that_fails_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "passages.jsonl"
    write_passages(WANTED, path)
    before = path.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"passages\.jsonl"):
        write_passages(WANTED[:1], path)
    assert os.listdir(tmp_path) == ["passages.jsonl"]
    assert path.read_bytes() == before


LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(LENGTHS, st.integers(1, 100))
def test_length_batches(lengths, tokens):
    batches = length_batches(lengths, tokens)
    order = [i for batch in batches for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= tokens
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > tokens, "the next would have fitted"
    assert length_batches(lengths, tokens) == batches


def naive_first_fit(lengths: list[int], tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [row for row in rows if sum(lengths[j] for j in row) + lengths[i] <= tokens]
        if fits:
            fits[0].append(i)
        else:
            rows.append([i])
    return rows


@given(LENGTHS, st.integers(1, 100))
def test_packed_batches(lengths, tokens):
    rows = packed_batches(lengths, tokens)
    assert rows == naive_first_fit(lengths, tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= tokens for row in rows)


def test_packing_many_is_quick():
    lengths = [1 + i * 7919 % 512 for i in range(50_000)]
    rows = packed_batches(lengths, 1024)
    assert len(rows) <= 1.01 * sum(lengths) / 1024


@pytest.mark.parametrize("batches", [length_batches, packed_batches])
def test_what_is_wrong_with_lengths(batches):
    assert batches([], 5) == []
    with refused("lengths[1] is 0; a sample must have at least 1 token"):
        batches([3, 0], 5)
    with refused("tokens is 0; a batch must have room"):
        batches([3], 0)

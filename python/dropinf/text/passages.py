"""Passages of text from files and datasets, and how they are put into batches."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SAVED = ("dataset_dict.json", "state.json")  # what datasets.save_to_disk leaves in a folder


@dataclass(frozen=True)
class Passage:
    """One sample of text."""

    id: str
    text: str
    label: int | None = None  # for sequence classifiers


def read_passages(
    source: str | os.PathLike[str],
    *,
    text_field: str = "text",
    id_field: str | None = None,
    label_field: str | None = None,
    limit: int | None = None,
) -> list[Passage]:
    """Read passages, in order.

    Args:
        source: a file `.jsonl`, `.jsonl.gz` (one JSON object a line, blank lines are skipped) or `.parquet`; a folder
            that `datasets.save_to_disk` wrote; or the name of a Hugging Face dataset. The last two take `name:split`.
        text_field: where the text is.
        id_field: where the id is, text or a whole number; the row's number from 0 on where None.
        label_field: where the class is, a whole number.
        limit: read the first so many rows alone.

    Raises:
        ValueError: no passage, a field that is missing or of another type, an empty text, an id twice, damaged data;
            the message names the file, the line from 1 on or the row from 0 on, and the fields that exist.
        FileNotFoundError: no such file.
        ModuleNotFoundError: pyarrow, for Parquet, or datasets is not installed.
    """
    name = os.fspath(source)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None to read all")
    given = {"text_field": text_field, "id_field": id_field, "label_field": label_field}
    fields = {option: field for option, field in given.items() if field is not None}
    passages: list[Passage] = []
    seen: dict[str, str] = {}
    for number, (place, row) in enumerate(itertools.islice(_rows(name, fields), limit)):
        where = f"{name}, {place}"
        text = _text(where, text_field, row[text_field])
        label = None if label_field is None else _label(where, label_field, row[label_field])
        key = str(number) if id_field is None else _id(where, id_field, row[id_field])
        if key in seen:
            raise ValueError(
                f"{where}: id {key!r} is that of {seen[key]} too; ids must be unique: name another field with "
                "id_field=, or none to number the rows"
            )
        seen[key] = place
        passages.append(Passage(key, text, label))
    if not passages:
        raise ValueError(f"{name}: no passages in it; it must have at least one row")
    return passages


def length_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return padded batches as positions in `lengths`, the longest first, so that memory problems show at once.

    A batch's size times its longest is at most `tokens`, but every batch has a sample. Equal lengths keep their order.
    """
    _check_lengths(lengths, tokens)
    order = _longest_first(lengths)
    batches = []
    start = 0
    while start < len(order):
        size = max(1, tokens // lengths[order[start]])
        batches.append(order[start : start + size])
        start += size
    return batches


def packed_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return packed rows of at most `tokens` as positions in `lengths`, by first-fit decreasing.

    A document longer than that has a row of its own. Takes O(n log n).
    """
    _check_lengths(lengths, tokens)
    # A tree over the rows, opened or not, with the most room in any below each node: the first that fits is leftmost.
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [tokens] * (2 * leaves)
    rows: list[list[int]] = [[] for _ in lengths]
    for position in _longest_first(lengths):
        need = min(lengths[position], tokens)
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < need)
        rows[node - leaves].append(position)
        room[node] -= need
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [row for row in rows if row]


def _check_lengths(lengths: Sequence[int], tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; a batch must have room for at least 1")
    for position, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths[{position}] is {length}; a sample must have at least 1 token: leave it out")


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda position: -lengths[position])


# Where rows come from. Each yields (the row's place, the row), and every row has all of ``fields``.

PlacedRows = Iterator[tuple[str, Mapping[str, Any]]]


def _rows(name: str, fields: Mapping[str, str]) -> PlacedRows:
    path = Path(name)
    if name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such file")
        return _parquet_rows(path, fields) if path.suffix == ".parquet" else _json_rows(path, fields)
    if path.is_file():
        raise ValueError(
            f"{name}: not a file that can be read; it must end in .jsonl, .jsonl.gz or .parquet and be one of these"
        )
    return _dataset_rows(name, fields)


def _json_rows(path: Path, fields: Mapping[str, str]) -> PlacedRows:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        lines = enumerate(file, 1)
        while True:
            try:
                number, line = next(lines, (0, b""))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path}: damaged, not a whole gzip file ({error})") from None
            if not number:
                return
            if line.strip():
                row = _json_row(f"{path}, line {number}", line)
                _check_fields(f"{path}, line {number}", fields, row)
                yield f"line {number}", row


def _json_row(where: str, line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); every line must be one JSON object") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {_what(row)}; every line must be one JSON object")
    return row


def _parquet_rows(path: Path, fields: Mapping[str, str]) -> PlacedRows:
    parquet = need_package("pyarrow.parquet", "a Parquet file")
    damaged = f"{path}: damaged, not a whole Parquet file"
    try:  # pyarrow's own errors are ValueErrors and OSErrors
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{damaged} ({first_line(error)})") from None
    with file:
        _check_fields(str(path), fields, file.schema_arrow.names)
        parts = file.iter_batches(columns=list(dict.fromkeys(fields.values())))
        number = 0
        while True:
            try:
                part = next(parts, None)
            except (ValueError, OSError) as error:
                raise ValueError(f"{damaged}, after row {number} ({first_line(error)})") from None
            if part is None:
                return
            for row in part.to_pylist():
                yield f"row {number}", row
                number += 1


def _dataset_rows(name: str, fields: Mapping[str, str]) -> PlacedRows:
    data = _dataset(need_package("datasets", f"{name!r}, not a file, is taken for a dataset, which"), name)
    _check_fields(name, fields, data.column_names)
    for number, row in enumerate(data.select_columns(list(dict.fromkeys(fields.values())))):
        yield f"row {number}", row


def _dataset(datasets: Any, name: str) -> Any:
    """Load one split of a dataset, from a folder or by name."""
    folder, _, split = (name, "", "") if Path(name).exists() else name.partition(":")
    saved = any((Path(folder) / marker).is_file() for marker in _SAVED)
    try:
        found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder, split=split or None)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{name}: datasets cannot load it ({first_line(error)}); pass a file, a folder that save_to_disk wrote, "
            "or the name of a dataset, as name or name:split"
        ) from error
    if not isinstance(found, Mapping):
        if saved and split and str(found.split) != split:
            raise ValueError(f"{name}: it has no split {split!r}, it is one dataset; pass {folder}")
        return found
    splits = list(found)
    if not split and len(splits) == 1:
        return found[splits[0]]
    if split not in splits:
        what = f"it has no split {split!r}" if split else "which of its splits?"
        raise ValueError(f"{name}: {what}; pass one of {', '.join(f'{folder}:{known}' for known in splits)}")
    return found[split]


def need_package(module: str, what: str) -> Any:
    """Import an optional library, which `what` needs.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{what} needs {package}; install it with: pip install {package}", name=package
        ) from None


# What a row holds.


def _check_fields(where: str, fields: Mapping[str, str], found: Iterable[str]) -> None:
    known = list(found)
    for option, field in fields.items():
        if field not in known:
            raise ValueError(
                f"{where}: no field {field!r}; its fields are {', '.join(known) or 'none'}: name one with {option}="
            )


def _text(where: str, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} is {_what(value)}; it must be text")
    if not value.strip():
        raise ValueError(f"{where}: field {field!r} is empty, or white space alone; leave the row out")
    _check_unicode(where, field, value)
    return value


def _id(where: str, field: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{where}: field {field!r} is {_what(value)}; an id must be text or a whole number")
    _check_unicode(where, field, str(value))
    return str(value)


def _label(where: str, field: str, value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(
            f"{where}: field {field!r} is {_what(value)}; a label must be a whole number, a class from 0 on"
        )
    return int(value)


def _check_unicode(where: str, field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field {field!r} has half a surrogate pair at character {error.start}, which is no text; "
            "repair it or leave the row out"
        ) from None


def _what(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""The first batch of an index, kept with it: what a later call's model and loss make of it must be its rows.

Code can be compared in part alone; what it computes shows. A batch is kept as its leaves, and comes back in the
containers of a batch that the later call has; its fingerprint says whether it is the same.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import warnings
from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..files import checksum, is_whole, metadata_of, read_header, serialize
from ..loss_name import is_same_loss
from ..workload import check_batches
from .coded import Coded, load_code
from .fingerprint import fingerprint
from .finished import Finished
from .folder import PROBE, write_whole
from .manifest import Manifest
from .rows_alike import distance
from .runs import plans_of
from .source import RowSource

FORMAT = "dropinf.batch"
_OFTEN = 10  # times as far as two runs of today are apart, rows are of another loss or model
LARGEST = 1 << 26  # bytes of a batch that is kept
_PLAIN = (bool, int, float, str, type(None))
_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
}  # fmt: skip


class _Unfitting(Exception):  # noqa: N818
    """A batch cannot be kept, or not brought back."""


def freeze(batch: Any) -> bytes | None:
    """Return a batch's leaves and how they lie in it, as a file; None where it has others than tensors, arrays, numbers
    and text in lists, mappings and dataclasses, or is large."""
    tensors: dict[str, Tensor] = {}
    try:
        tree = _frozen(batch, tensors)
        text = len(json.dumps(tree))
    except (_Unfitting, RecursionError, ValueError):  # numbers of thousands of digits, say
        return None
    if text + sum(x.numel() * x.element_size() for x in tensors.values()) > LARGEST:
        return None
    return serialize(tensors or {"0": torch.zeros(0)}, {"format": FORMAT, "version": 1, "tree": tree})


def _frozen(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return how a value lies in a batch, in JSON: what it is, and its parts."""
    if isinstance(value, _PLAIN) and type(value) in _PLAIN:
        return ["value", value]
    if isinstance(value, bytes):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, PurePath):
        return ["path", str(value)]
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        if isinstance(value, np.ndarray) and (type(value) is not np.ndarray or value.dtype.kind not in "biuf"):
            raise _Unfitting
        found = value if isinstance(value, Tensor) else _of_array(value)
        if found.layout != torch.strided or found.is_nested or found.is_meta or found.dtype not in _DTYPES:
            raise _Unfitting
        tensors[str(len(tensors))] = found.detach().cpu().clone()
        return [kind, str(len(tensors) - 1)]
    if isinstance(value, Mapping):
        if not all(type(key) in (str, int) for key in value):
            raise _Unfitting
        return ["mapping", [[key, _frozen(value[key], tensors)] for key in value]]
    if isinstance(value, list | tuple):
        return ["sequence", [_frozen(part, tensors) for part in value]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return ["fields", [[name, _frozen(getattr(value, name), tensors)] for name in names]]
    raise _Unfitting


def _of_array(value: np.ndarray[Any, Any]) -> Tensor:
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError):  # of a dtype that torch has none of, or of another order of bytes
        raise _Unfitting from None


def thaw(data: bytes, like: Any, path: Path) -> Any:
    """Return a batch that was kept, in containers as those of another batch; None where they do not fit."""
    header = read_header(metadata_of(data), path, FORMAT)
    try:
        return _thawed(header["tree"], like, safetensors.torch.load(data))
    except Exception:  # of classes of their user's, which may do anything as they are made
        return None


def _thawed(tree: Any, like: Any, tensors: Mapping[str, Tensor]) -> Any:
    kind, content = tree
    if kind == "value":
        return content
    if kind in ("bytes", "path"):
        return base64.b64decode(content) if kind == "bytes" else Path(content)
    if kind == "tensor":
        if like is not None and type(like) not in (Tensor, torch.nn.Parameter):
            raise _Unfitting
        return tensors[content].to(like.device) if isinstance(like, Tensor) else tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "sequence":
        return _sequence(content, like, tensors)
    parts = {key: _thawed(part, _part(like, key), tensors) for key, part in content}
    if kind == "mapping":
        return parts if like is None or type(like) is dict else _mapping(parts, like)
    if not dataclasses.is_dataclass(like) or isinstance(like, type):
        raise _Unfitting
    _check_derived(like, {field.name for field in dataclasses.fields(like)})
    fields: Any = copy.copy(like)
    for name, part in parts.items():
        object.__setattr__(fields, name, part)
    return fields


def _mapping(parts: Mapping[Any, Any], like: Any) -> Any:
    """Return a mapping of the class of another, which has nothing of that other's."""
    if not isinstance(like, dict | UserDict):
        raise _Unfitting
    if isinstance(like, UserDict) and type(like).__module__.partition(".")[0] == "transformers":
        return type(like)(parts)  # whose further attributes are of the tokenizer, not of the samples
    _check_derived(like, {"data"} if isinstance(like, UserDict) else set())
    found = copy.copy(like)  # with contents of its own
    for key in like.keys() - parts.keys():  # that batches of then had not
        del found[key]
    for key, part in parts.items():
        found[key] = part
    return found


def _check_derived(like: Any, known: set[str]) -> None:
    """Raise _Unfitting where a value has attributes that may have been computed from what it holds."""
    rest = {name: x for name, x in getattr(like, "__dict__", {}).items() if name not in known}
    if not all(isinstance(x, _PLAIN) for x in rest.values()):
        raise _Unfitting


def _sequence(content: Sequence[Any], like: Any, tensors: Mapping[str, Tensor]) -> Any:
    known = like if isinstance(like, list | tuple) and len(like) else [None]
    parts = [_thawed(part, known[min(i, len(known) - 1)], tensors) for i, part in enumerate(content)]
    if like is None or type(like) in (list, tuple):
        return tuple(parts) if isinstance(like, tuple) else parts
    if not (isinstance(like, tuple) and hasattr(like, "_fields")):
        raise _Unfitting
    return type(like)(*parts)


def _part(like: Any, key: Any) -> Any:
    if isinstance(like, Mapping):
        return like.get(key)
    return None if isinstance(like, list | tuple | Set) else getattr(like, str(key), None)


def keep_again(folder: Path, manifest: Manifest, first: Any) -> None:
    """Write the first batch of an index again where its file is damaged or lost, and this is the batch."""
    path, known = folder / PROBE, manifest.files.get(PROBE)
    if known is None or is_whole(path, known):
        return
    data = freeze(first)
    if data is not None and checksum(data) == known:
        write_whole(path, data)


def compared(source: RowSource, folder: Path, batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches of queries, once the model is seen to give the first batch of an index the gradients it holds.

    Queries of another loss are compared with nothing: they may have one of their own.
    """
    manifest = Manifest.load(folder)
    if manifest.made_by is None or not is_same_loss(manifest.made_by[1], source.loss_name()):
        return batches
    if isinstance(batches, Sequence):
        first = next(iter(batches), None)
    else:
        check_batches(batches)
        iterator = iter(batches)  # once: what is read from a stream is gone
        kept = list(islice(iterator, 1))
        first, batches = kept[0] if kept else None, chain(kept, iterator)
    code = load_code(folder, manifest)
    check_first_batch(source if code is None else Coded(source, code), folder, manifest, first)
    return batches


def check_first_batch(source: RowSource, folder: Path, manifest: Manifest, like: Any) -> None:
    """Raise ValueError where a model and a loss make other rows of the first batch of an index than it holds.

    ``like``: a batch of today's. Where the batch that is kept fits neither its form nor plain containers, a warning
    says that nothing was compared, as where the index keeps no batch. Nothing is said where the rows are random.
    """
    path = folder / PROBE
    if source.is_sharded:
        return
    if PROBE not in manifest.files:
        warnings.warn(
            f"{folder}: it keeps no first batch to compare with what the model and the loss now give (that batch was "
            f"larger than {LARGEST >> 20} MiB, or has other parts than tensors, arrays, numbers, text and paths, or an "
            "earlier version made the index): see to it that both are those of then",
            stacklevel=3,
        )
        return
    data = path.read_bytes() if path.is_file() else b""
    if checksum(data) != manifest.files[PROBE]:
        raise ValueError(
            f"{path}: missing, or damaged: its bytes do not match their checksum; run the call that made the "
            "index again, which writes it, or restore it from a copy"
        )
    first = _first_rows(folder, manifest)
    if first is None:
        return
    finished, kept = first
    found = _computed(source, data, like, path, finished.plan.began.first)
    if found is None:
        warnings.warn(
            f"{folder}: the first batch that it keeps could not be compared with what the model and the loss now give, "
            "as batches are of another form than then: see to it that both are those of then",
            stacklevel=3,
        )
        return
    batch, rows = found
    try:
        finished.check_rows(0, rows, kept)
    except ValueError as error:
        if distance(rows, kept) <= _OFTEN * distance(rows, rows_of(source, batch)):
            return  # as they differ from run to run
        raise ValueError(
            f"loss_fn, or the model: of the first batch of {folder}, which it keeps, they now give others than "
            "the gradients it holds; use the loss and the model's code of then, or name another folder"
        ) from error


def _first_rows(folder: Path, manifest: Manifest) -> tuple[Finished, Tensor] | None:
    """Return the finished batches of an index's first call, and the rows of the first; None where it is not finished.

    Where shards were merged meanwhile, as nothing keeps others out of the folder, they are read where they now are.

    Raises:
        ValueError: they cannot be read.
    """
    while True:
        failed: Exception | None = None
        try:
            finished = Finished(next(plans_of(folder, manifest)))
            if 0 in finished:
                finished.check_bytes(0)
                return finished, finished.rows(0)
        except (ValueError, FileNotFoundError) as error:
            failed = error
        now = Manifest.load(folder)
        if now.shards != manifest.shards and now.files.get(PROBE) == manifest.files[PROBE]:
            manifest = now
        elif failed is None:
            return None
        else:
            raise failed


def _computed(source: RowSource, data: bytes, like: Any, path: Path, first: str) -> tuple[Any, Tensor] | None:
    """Return a batch that was kept, and its rows of today: in the form of today's batches, or in plain containers."""
    for form in (like, None):
        batch = thaw(data, form, path)
        if batch is None or first not in _fingerprints(batch):
            continue
        with suppress(Exception):  # of a loss that takes batches of another form
            return batch, rows_of(source, batch)
    return None


def _fingerprints(batch: Any) -> list[str]:
    return [fingerprint(batch, named=named) for named in (False, True)]


def rows_of(source: RowSource, batch: Any) -> Tensor:
    """Return the rows of one batch, on the CPU."""
    found: list[Tensor] = []
    source.stream([batch], found.append)
    return found[0].cpu()

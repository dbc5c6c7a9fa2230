"""The file of a run's steps: one record behind the other, so that what a kill leaves is whole steps.

A record is its length, the checksum of its content, and a safetensors file.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ..files import read_header, serialize

FORMAT = "dropinf-step-2"
_PREFIX = 24  # bytes: the length, and a checksum of 16
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Step:
    """One step of an optimizer, on the mask.

    ``rows`` [n, K]: each sample's part of the gradient, before clipping. ``gradient`` [K]: what the optimizer got.
    ``clipped``: the factor between the two. ``groups``: the settings of each parameter group; ``counts``: of each
    layer, how many steps changed it, this one included, 0 where this one did not. ``share`` [n]: the weight of each
    sample's loss in the step's; ``losses`` [n], ``labels`` [n]: what is known of them. ``drawn`` [m, K]: rows of labels
    that were drawn from the model, with their ``drawn_share``; ``drawn_at``: the last step that has some, -1 for none.
    ``state``: the optimizer's, before the step; ``weights`` [K], before it. ``norm``: of all gradients, also of
    what is not recorded, before they were clipped; 0 where they were not.
    """

    rows: Tensor
    ids: Sequence[str]
    gradient: Tensor
    clipped: float
    groups: Sequence[Mapping[str, float]]
    counts: Sequence[int]
    share: Tensor | None = None
    losses: Tensor | None = None
    drawn: Tensor | None = None
    drawn_share: Tensor | None = None
    state: Sequence[Tensor] = field(default=())
    weights: Tensor | None = None
    drawn_at: int = -1
    norm: float = 0.0


_TENSORS = ("rows", "gradient", "share", "losses", "drawn", "drawn_share", "weights")


def _encoded(step: Step, number: int, before: str) -> bytes:
    tensors = {name: getattr(step, name) for name in _TENSORS if getattr(step, name) is not None}
    tensors |= {f"state{i}": x for i, x in enumerate(step.state)}
    about = {name: getattr(step, name) for name in ("clipped", "drawn_at", "norm")}
    about |= {name: list(getattr(step, name)) for name in ("ids", "groups", "counts")}
    return serialize(tensors, {"format": FORMAT, "number": number, "before": before, **about})


def _decoded(data: memoryview, path: Path, wanted: Sequence[str] | None, number: int, before: str) -> Step:
    """Return the step in a record, with the tensors that are ``wanted`` and empty rows in place of others.

    Raises ValueError where it is not the step of that number, behind the record with the checksum ``before``.
    """
    length = int.from_bytes(data[:8], "little")
    entries: dict[str, Any] = json.loads(bytes(data[8 : 8 + length]))
    header = read_header(entries.pop("__metadata__", None), path, FORMAT)
    if (header.get("number"), header.get("before")) != (number, before):
        raise ValueError(
            f"{path}: what stands there as step {number} was not written as that, behind step {number - 1}; a step is "
            "missing, was moved or written twice; restore a copy"
        )
    found = {}
    for name, entry in entries.items():
        start, stop = (8 + length + x for x in entry["data_offsets"])
        if wanted is None or name in wanted or name.startswith("state"):
            part = bytearray(data[start:stop])
            flat = torch.frombuffer(part, dtype=_DTYPES[entry["dtype"]]) if part else torch.empty(0)
            found[name] = flat.reshape(entry["shape"])
    states = sorted(name for name in found if name.startswith("state"))
    return Step(
        found.get("rows", torch.empty(0)),
        header["ids"],
        found["gradient"],
        header["clipped"],
        header["groups"],
        header["counts"],
        share=found.get("share"),
        losses=found.get("losses"),
        drawn=found.get("drawn"),
        drawn_share=found.get("drawn_share"),
        state=[found[name] for name in states],
        weights=found.get("weights"),
        drawn_at=header["drawn_at"],
        norm=header["norm"],
    )


class StepFile:
    """The steps in one file. Those that a kill cut short are not counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: list[tuple[int, int]] = []  # of each record's content: where it begins, and its bytes
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Find the steps that are in the file now."""
        at = self._end
        if not self.path.exists():
            return
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            while at + _PREFIX <= size:
                file.seek(at)
                length = int.from_bytes(file.read(8), "little")
                if at + _PREFIX + length > size:
                    break
                self._places.append((at + _PREFIX, length))
                at += _PREFIX + length

    @property
    def _end(self) -> int:
        return sum(self._places[-1]) if self._places else 0

    def append(self, step: Step) -> None:
        """Write a step behind the others."""
        data = _encoded(step, len(self), self._checksum(len(self) - 1))
        prefix = len(data).to_bytes(8, "little") + xxhash.xxh3_128_digest(data)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            at, left = self._end, memoryview(prefix + data)
            while left:
                written = os.pwrite(handle, left, at)
                at, left = at + written, left[written:]
        finally:
            os.close(handle)
        self._places.append((self._end + _PREFIX, len(data)))

    def _checksum(self, i: int) -> str:
        """Return what is noted as a record's checksum; empty where there is none."""
        if i < 0:
            return ""
        with open(self.path, "rb") as file:
            file.seek(self._places[i][0] - 16)
            return file.read(16).hex()

    def cut(self, count: int) -> None:
        """Keep the first steps alone, and nothing behind them."""
        del self._places[count:]
        if self.path.exists():
            os.truncate(self.path, self._end)

    def read(self, i: int, wanted: Sequence[str] | None = None) -> Step:
        """Return a step, with all of its tensors or, not compared with its checksum, those that are ``wanted``.

        Raises ValueError where its bytes are not those that were written.
        """
        at, length = self._places[i]
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            whole = memoryview(pages)
            data = whole[at : at + length]
            try:
                if wanted is None and xxhash.xxh3_128_digest(data) != whole[at - 16 : at]:
                    raise ValueError(
                        f"{self.path}: step {i} is damaged, its bytes have another checksum; restore a copy"
                    )
                before = bytes(whole[self._places[i - 1][0] - 16 : self._places[i - 1][0]]).hex() if i else ""
                return _decoded(data, self.path, wanted, i, before)
            except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
                message = f"{self.path}: step {i} is damaged, it cannot be read; restore a copy"
                raise ValueError(message) from error
            finally:
                data.release()
                whole.release()

"""The file that a refinement keeps its state in, after each step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import checksum, plain_name, read_header, serialize, write_whole
from ..workload import tensor_bytes

FORMAT = "refine 1"


class Held(NamedTuple):
    """What a file held."""

    tensors: dict[str, Tensor]
    batches: str  # digest of the training batches
    damping: float  # lambda
    scale: float  # of the curvature, relative to the preconditioner's Fisher matrix


class StateFile:
    """A file of one refinement, known by ``about``: what must be the same for it to go on."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path, self._about = path, dict(about)

    def write(self, held: Held) -> None:
        """Write the state atomically: under a temporary name, renamed once its bytes are on disk."""
        numbers = {"batches": held.batches, "damping": held.damping, "scale": held.scale}
        header = {"format": FORMAT, "about": self._about, "sums": _sums(held.tensors), **numbers}
        write_whole(self._path, serialize(held.tensors, header))

    def read(self) -> Held | None:
        """Return the state, or None where there is no file yet.

        Raises:
            ValueError: another kind of file, a damaged one, or one of other work.
        """
        if not self._path.exists():
            return None
        try:
            with plain_name(self._path) as name, safe_open(name, "pt") as file:
                header = read_header(file.metadata(), self._path, FORMAT)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about, sums = header["about"], header["sums"]
            held = Held(tensors, str(header["batches"]), float(header["damping"]), float(header["scale"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"out: {self._path} is not a whole file that refine wrote ({error}); delete it, or name another"
            ) from error
        if _sums(tensors) != sums:
            raise ValueError(f"out: {self._path} is damaged, its bytes do not match their checksums; delete it")
        for what, value in self._about.items():
            if about.get(what) != value:
                was = "" if isinstance(value, list) else f" ({about.get(what)!r:.20}, and now {value!r:.20})"
                raise ValueError(
                    f"out: {self._path} is of another refinement, which had another {what}{was}; pass what it was "
                    "begun with, or name another file"
                )
        return held


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: checksum(tensor_bytes(x)) for name, x in tensors.items()}

"""How rows of few bits are made: whitened, cut to the coordinates of most energy, rotated at random."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dropinf_kernels import dequantize_bits, quantize_bits

from ..files import checksum, is_sealed, metadata_of, read_header, sealed, whole_number, write_whole
from ..gradients import Gradients, GradientSource, Shapes, Sketched, block_rows, check_same_sketch, placed_blocks
from ..origin import check_one_model
from .fisher import CPU, Fisher, FisherKind, build_fisher
from .fisher import FORMAT as FISHER_FORMAT
from .rotation import Rotation

FORMAT = "dropinf.bits-1"
ROTATED = "rotated"  # the one layer of rotated rows
SCALE_BYTES = 2  # of a row's bfloat16 scale
Bits = Literal[1, 2, 4]


class BitCode:
    """What turns compressed gradients into rows of 1, 2 or 4 bits a coordinate, and queries into what multiplies them.

    A row is whitened by the Fisher matrix (its inner products with whitened queries are then influence scores), cut to
    the coordinates that have most energy over all layers, whitened again by what these have in common over layers, and
    rotated at random, so that each coordinate says equally much. Its codes and one scale are what is stored. The scale
    makes inner products unbiased over rotations: RaBitQ (Gao & Long 2024, arXiv 2405.12497; several bits: arXiv
    2409.09913). Queries stay float, and are shrunk where rows have little beside the error of their codes.

    Make one with :meth:`fit`. ``data``: what :meth:`to_bytes` gave. ``path`` is named in errors.
    """

    def __init__(self, data: bytes, path: str | os.PathLike[str] = "data") -> None:
        self._data = data
        try:
            tensors = load(data)
            header = read_header(metadata_of(data), Path(path), FORMAT)
            if not is_sealed(data, tensors, header):
                raise ValueError("its bytes do not match their checksum")
            self._take(header, tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{path}: truncated, damaged, or of another kind ({error}); save it again") from error

    def _take(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._headers, kept = header["parts"], tensors["kept"]
        self._placed = {CPU: self._read(tensors, CPU)}
        self._bits, self._kept = checked_bits(header["bits"]), kept
        self._error = float(header["error"])
        width = sum(map(math.prod, self.sketch_shapes.values()))
        if kept.dtype != torch.int64 or kept.ndim != 1 or not len(kept) or len(kept) * self._bits % 8:
            raise ValueError(f"kept is {kept.dtype} {list(kept.shape)}")
        if bool((kept.diff() <= 0).any()) or int(kept[0]) < 0 or int(kept[-1]) >= width:
            raise ValueError(f"the kept columns are not columns of {width}, in order")
        self._rotation = Rotation(len(kept), whole_number(header["seed"], "seed", 0))

    def _read(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Fisher]:
        def of(part: str) -> Callable[[str], Tensor]:
            return lambda name: tensors[f"{part}/{name}"].to(device)

        return {part: Fisher.read(about, of(part), device) for part, about in self._headers.items()}

    def _on(self, device: torch.device) -> dict[str, Fisher]:
        """Return the Fisher matrices on a device; each that gradients lie on keeps its own."""
        if device not in self._placed:
            self._placed[device] = self._read(load(self._data), device)
        return self._placed[device]

    @classmethod
    def fit(
        cls,
        train: GradientSource,
        fisher: Fisher | FisherKind = "kronecker",
        *,
        bits: Bits,
        bytes_per_sample: int | None = None,
        again: bool = True,
        shrink: bool = True,
        seed: int = 0,
    ) -> BitCode:
        """Return the code for rows like these.

        Args:
            train: gradients of the samples that are to be stored, or of some thousand of them; read a few times.
            fisher: of the same sketch; or a kind, "kronecker", "block" or "diagonal", built of ``train`` with damping
                "auto". "joint" is refused: codes of rows that it whitens keep little of the scores.
            bits: 1, 2 or 4. One at the smallest sizes; two where a quarter of the coordinates still fit.
            bytes_per_sample: of a stored row, its scale of 2 bytes included; the coordinates of least energy are cut.
                None: all coordinates are kept, but for what does not fill a byte.
            again: whiten what is kept once more, by one Fisher matrix over all layers. Scores then rank samples better
                by themselves, and are those of another matrix than ``fisher``: where the best are scored again by it
                (`dropinf.rerank`), recall them with ``again=False``.
            shrink: multiply queries by ``S (S + e I)^-1``, with S the second moments of the rows before they are
                rotated and e the mean squared error of their codes: what has little energy comes back as noise.
            seed: of the rotation.

        Raises:
            ValueError: other bits, a size that holds no byte of codes, a joint Fisher, one of another sketch or model,
                or fewer coordinates than fill a byte.
        """
        bits = checked_bits(bits)
        _check_fit(train, fisher, bytes_per_sample, seed)
        if "joint" in (fisher, getattr(fisher, "kind", None)):
            raise ValueError(
                'fisher is "joint"; codes of rows that it whitens keep half to four fifths of the quality of their '
                'scores: use "kronecker" or "block"'
            )
        first = build_fisher(train, fisher, "auto") if isinstance(fisher, str) else fisher
        first.check(train, "fisher and train")
        check_one_model([first, train], ["fisher", "train"], "Use build_fisher(train)")
        parts, kept = {"fisher": first}, _most(_energies(train, first), bits, bytes_per_sample)
        about: dict[str, Any] = {"bits": bits, "seed": seed, "error": 0.0}
        code = cls(_serialized(parts, kept, about))
        if again:
            parts["again"] = code._second_moments(train, Fisher("block", "auto"))
            code = cls(_serialized(parts, kept, about))
        if shrink:
            about["error"] = code._mean_error(train)
            parts["shrinking"] = code._second_moments(train, Fisher("block", about["error"], absolute=True))
            code = cls(_serialized(parts, kept, about))
        return code

    def _second_moments(self, train: GradientSource, made: Fisher) -> Fisher:
        """Return the second moments of the rows before they are rotated."""
        for _, part in placed_blocks(train, block_rows(train)):
            made.update(_as_gradients(self._whitened(part), "kept", ""))
        return made

    def _mean_error(self, train: GradientSource) -> float:
        """Return the mean squared error of a coordinate's code."""
        total = 0.0
        for _, part in placed_blocks(train, block_rows(train)):
            rows = self._rotation(self._whitened(part))
            codes, scale = quantize_bits(rows, self._bits)
            total += float((dequantize_bits(codes, scale, self._bits) - rows).square().sum(dtype=torch.float64))
        return total / (len(train) * self.width)

    @property
    def fisher(self) -> Fisher:
        """A copy of the Fisher matrix that whitens."""
        return copy.deepcopy(self._placed[CPU]["fisher"])

    @property
    def again(self) -> Fisher | None:
        """A copy of the Fisher matrix of the kept coordinates, by which they are whitened once more, or None."""
        return copy.deepcopy(self._placed[CPU].get("again"))

    @property
    def kept(self) -> Tensor:
        """Which columns of whitened rows are kept, int64 [K], ascending."""
        return self._kept.clone()

    @property
    def bits(self) -> Bits:
        """How many bits a coordinate has."""
        return self._bits

    @property
    def error(self) -> float:
        """The mean squared error of a coordinate's code; 0 where queries are not shrunk."""
        return self._error

    @property
    def width(self) -> int:
        """How many coordinates a row has, K."""
        return len(self._kept)

    @property
    def bytes_per_sample(self) -> int:
        """What a stored row takes: its codes and its scale."""
        return self.width * self._bits // 8 + SCALE_BYTES

    @property
    def shared_bytes(self) -> int:
        """What is stored once for all rows: the matrices and the numbers of the kept columns."""
        return len(self._data)

    @property
    def sketch_shapes(self) -> Shapes:
        """The layers of the gradients that it takes."""
        return self._placed[CPU]["fisher"].shapes

    @property
    def origins(self) -> tuple[tuple[str, str], ...]:
        """The models and losses of the gradients that it was fitted to, as `Fisher.origins`."""
        return self._placed[CPU]["fisher"].origins

    @property
    def shapes(self) -> Shapes:
        """The one layer of the rows that it makes."""
        return {ROTATED: (self.width,)}

    @property
    def digest(self) -> Mapping[str, str]:
        """The fingerprint of all that makes its rows, as `Gradients.digest`."""
        return {ROTATED: self._digest}

    @cached_property
    def _digest(self) -> str:
        return checksum(self._data)

    def rows(self, gradients: Gradients) -> Gradients:
        """Return whitened, cut and rotated rows [n, K], of which few bits are to be kept.

        In the dtype of the gradients, of which their precision is known, but for float16, which has not the range.

        Raises:
            ValueError: gradients of another sketch.
        """
        self.check(gradients, "code and gradients")
        flat = self._rotation(self._whitened(gradients))
        kept = torch.bfloat16 if gradients.dtype == torch.float16 else gradients.dtype
        return _as_gradients(flat.to(kept), ROTATED, self._digest, gradients.origin)

    def queries(self, gradients: Gradients) -> Gradients:
        """Return what multiplies such rows, [Q, K] in at least float32: the inner products are influence scores.

        Raises:
            ValueError: gradients of another sketch.
        """
        self.check(gradients, "code and query")
        white, shrinking = self._whitened(gradients), self._on(gradients.device).get("shrinking")
        if shrinking is not None:
            lost = shrinking.solve(_as_gradients(white, "kept", "")).flat
            white = white - self._error * lost.to(white)
        return _as_gradients(self._rotation(white), ROTATED, self._digest, gradients.origin)

    def check(self, gradients: Sketched, what: str = "code and gradients") -> None:
        """Raise ValueError where gradients are of another sketch than those that it was fitted to."""
        check_same_sketch(self._placed[CPU]["fisher"], gradients, what)

    def _whitened(self, gradients: Gradients) -> Tensor:
        """Return the kept coordinates of whitened rows [n, K]; whitened again, where the code has it so."""
        wide, parts = torch.promote_types(gradients.dtype, torch.float32), self._on(gradients.device)
        white = parts["fisher"].whiten(gradients).flat
        cut = white.index_select(1, self._kept.to(white.device)).to(wide)
        return parts["again"].whiten(_as_gradients(cut, "kept", "")).flat.to(wide) if "again" in parts else cut

    def to_bytes(self) -> bytes:
        """Return all of it as a safetensors file."""
        return self._data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, complete once it has its name."""
        write_whole(Path(path), self._data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BitCode:
        """Read a file that :meth:`save` wrote.

        Raises FileNotFoundError where there is none, ValueError for another kind of file or a damaged one.
        """
        return cls(Path(path).read_bytes(), path)

    def __reduce__(self) -> tuple[type[BitCode], tuple[bytes]]:
        return type(self), (self._data,)

    def __repr__(self) -> str:
        again = ", whitened again" if "again" in self._headers else ""
        size = f"{self.width} of {sum(map(math.prod, self.sketch_shapes.values()))} coordinates"
        kind = self._placed[CPU]["fisher"].kind
        return f"BitCode({self._bits} bits, {self.bytes_per_sample} bytes a sample, {size}, {kind}{again})"

    def __str__(self) -> str:
        return f"{self!r}; {self.shared_bytes:,} bytes for all samples together"


def _serialized(parts: Mapping[str, Fisher], kept: Tensor, about: Mapping[str, object]) -> bytes:
    """Return a code as a safetensors file."""
    tensors, headers = {"kept": kept}, {}
    for part, fisher in parts.items():
        data = fisher.to_bytes()
        headers[part] = read_header(metadata_of(data), Path(part), FISHER_FORMAT)
        tensors |= {f"{part}/{name}": x for name, x in load(data).items()}
    return sealed(tensors, {"format": FORMAT, "parts": headers, **about})


def _check_fit(train: GradientSource, fisher: object, bytes_per_sample: object, seed: object) -> None:
    """Raise TypeError or ValueError for arguments that no code is fitted with."""
    if not isinstance(fisher, Fisher) and fisher not in get_args(FisherKind):
        raise ValueError(f"fisher is {fisher!r}; it must be a Fisher, or 'kronecker', 'block' or 'diagonal'")
    if bytes_per_sample is not None and type(bytes_per_sample) is not int:
        raise ValueError(f"bytes_per_sample is {bytes_per_sample!r}; it must be a whole number, or None for all")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be a whole number of at least 0")
    if list(train.shapes) == [ROTATED]:
        raise ValueError("train: its rows were made by a code already; fit another to the gradients that these are of")


def _energies(train: GradientSource, fisher: Fisher) -> Tensor:
    """Return the mean square of each whitened coordinate, float64 [K]."""
    total = torch.zeros(sum(map(math.prod, train.shapes.values())), dtype=torch.float64, device=fisher.device)
    for _, part in placed_blocks(train, block_rows(train)):
        total += fisher.whiten(part).flat.square().sum(0, dtype=torch.float64)
    return total.cpu() / max(1, len(train))


def _most(energies: Tensor, bits: int, bytes_per_sample: int | None) -> Tensor:
    """Return the columns of most energy that fill whole bytes, int64 ascending."""
    room = len(energies) // (8 // bits)
    if bytes_per_sample is not None:
        if bytes_per_sample <= SCALE_BYTES:
            raise ValueError(
                f"bytes_per_sample is {bytes_per_sample}; a row has a scale of {SCALE_BYTES} bytes and at least one "
                "byte of codes"
            )
        room = min(room, bytes_per_sample - SCALE_BYTES)
    if room < 1:
        raise ValueError(f"train: {len(energies)} coordinates of {bits} bits do not fill a byte; store floats")
    order = energies.argsort(descending=True, stable=True)
    return order[: room * 8 // bits].sort().values


def checked_bits(bits: object) -> Bits:
    """Return a number of bits that codes have; raise ValueError for others."""
    if type(bits) is not int or bits not in get_args(Bits):
        raise ValueError(f"bits is {bits!r}; it must be one of {', '.join(map(str, get_args(Bits)))}")
    return bits  # type: ignore[return-value]


def _as_gradients(flat: Tensor, name: str, digest: str, origin: tuple[str, str] | None = None) -> Gradients:
    """Return rows as gradients of one layer."""
    return Gradients(flat.contiguous(), {name: (flat.shape[1],)}, {name: digest}, origin)

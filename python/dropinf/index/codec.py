"""How rows are stored: their dtype, and scales that keep small values beside large ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dropinf_kernels import dequantize_bits, quantize_bits, quantize_rows

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
BITS: dict[str, Literal[1, 2, 4]] = {"1bit": 1, "2bit": 2, "4bit": 4}  # of a coordinate, of rotated rows
CARRIERS = 16  # numbers whose lowest bits are a scale's bits
_BESIDE = 256  # numbers of a layer from which on its scale stands beside them
_PATTERN = 16  # layers of a pattern that is looked for: those of a block of a transformer
_BITS = 64  # smallest steps of a dtype that a layer's largest number must have: as precise as int8
NOISE = 4  # roundings of a row's largest number that a layer without a gradient may have
_MOST = 0.99 * torch.finfo(torch.float32).max  # what rounding up a scale still leaves finite
Where = Callable[[int], str]


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype of stored rows."""
    return next(name for name, found in DTYPES.items() if found == dtype)


def shown(dtype: str) -> str:
    """Return a dtype of stored rows, by its name, as its user writes it."""
    return repr(dtype) if dtype in BITS else f"torch.{dtype}"


def _of_batch(row: int) -> str:
    return f"sample {row}"


class Converted(NamedTuple):
    """Rows as they are stored, and what tells whether that holds them."""

    kept: dict[str, Tensor]
    dtype: torch.dtype  # of the rows that were converted
    largest: Tensor | None = None  # absolute value of each row and layer, [n, layers]; None: any value is held
    least: float | Tensor = 0.0  # that is held, of each row and layer
    most: float = math.inf

    def packed(self) -> tuple[Tensor, Callable[[Tensor], Converted]]:
        """Return all tensors as one piece of memory, and what makes these of a copy of it."""
        found = {**self.kept, "largest": self.largest, "least": self.least}
        named = {name: x for name, x in found.items() if isinstance(x, Tensor)}
        order = sorted(named, key=lambda name: -named[name].dtype.itemsize)  # so that each is aligned
        parts = [named[name].contiguous().view(-1).view(torch.uint8) for name in order]
        sizes, about = [len(part) for part in parts], {name: (named[name].dtype, named[name].shape) for name in order}

        def unpacked(data: Tensor) -> Converted:
            pieces = zip(about.items(), data.split(sizes), strict=True)
            back = {name: piece.view(dtype).view(shape) for (name, (dtype, shape)), piece in pieces}
            kept = {name: back[name] for name in self.kept}
            return self._replace(kept=kept, largest=back.get("largest"), least=back.get("least", self.least))

        return parts[0] if len(parts) == 1 else torch.cat(parts), unpacked


@dataclass(frozen=True)
class Codec:
    """How rows are stored: their dtype, and the layers that they are of.

    float16 rows are divided by a power of two each, so that small gradients do not underflow. int8 rows are divided by
    a scale for each of their layers, so that no layer depends on another, on other samples or on the first batch.

    Such a scale is a bfloat16, rounded up: 2 bytes. Beside a layer of 256 numbers or more this is 0.8 % of their bytes
    at most. Beside 16 numbers it would be 13 %: there, and up to 255, the 16 bits of the scale are the lowest bits of
    the layer's first 16 values, each rounded to the nearest value of that parity. These are right to one step, where
    others are right to half a step, and the layer takes no byte more. Smaller layers have their scales beside them.

    Rows of 1, 2 or 4 bits, whose one layer a `BitCode` made, are codes of `quantize_bits`, several in a byte, and a
    bfloat16 scale.

    ``sizes``: of int8 rows of the first format version alone, what each layer was divided by before the row had one
    scale for all its layers.
    """

    dtype: str
    names: tuple[str, ...]  # of the layers
    widths: tuple[int, ...]  # columns of each layer
    sizes: tuple[float, ...] | None = None

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def by_layer(self) -> bool:
        """Whether a row has a scale for each layer."""
        return self.dtype == "int8" and self.sizes is None

    @property
    def bits(self) -> Literal[1, 2, 4] | None:
        """How many bits a coordinate has; None where it has whole bytes."""
        return BITS.get(self.dtype)

    @property
    def scaled(self) -> bool:
        return self.bits is not None or self.dtype in ("float16", "int8")

    @cached_property
    def tensors(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The name of each tensor of stored rows -> its dtype, and its shape but for the number of rows."""
        if self.bits is not None:
            codes = (torch.uint8, (self.width * self.bits // 8,))
            return {"gradients": codes, "scale": (torch.bfloat16, ())}
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"gradients": (DTYPES[self.dtype], (self.width,))}
        if self.scaled and not self.by_layer:
            found["scale"] = (torch.float32, ())
        elif self._beside:
            found["scale"] = (torch.bfloat16, (len(self._beside),))
        return found

    @property
    def row_bytes(self) -> int:
        """The bytes that a stored row takes."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors.values())

    @property
    def decoded(self) -> torch.dtype:
        """The dtype that rows are read in."""
        return torch.float32 if self.scaled else DTYPES[self.dtype]

    def factors(self) -> Tensor | None:
        """Return what each stored column is multiplied by, [K], or None for 1."""
        if self.dtype != "int8" or self.sizes is None:
            return None
        return torch.repeat_interleave(torch.tensor(self.sizes, device="cpu"), torch.tensor(self.widths, device="cpu"))

    def encode(self, flat: Tensor, where: Where = _of_batch) -> dict[str, Tensor]:
        """Return what is stored of the rows [n, K], by the names of `tensors`.

        Raises:
            ValueError: values that the dtype cannot hold; it names sample and layer, the sample by `where`.
        """
        converted = self.convert(flat)
        self.check(converted, where)
        return converted.kept

    def convert(self, flat: Tensor) -> Converted:
        """Return what is stored of the rows [n, K], where they are, and what tells whether the dtype holds them.

        The host waits for nothing.
        """
        if self.bits is not None:
            return self._few_bits(flat, self.bits)
        if self.dtype == "float16":
            return self._scaled_half(flat)
        if flat.dtype == DTYPES[self.dtype]:
            return Converted({"gradients": flat}, flat.dtype)
        if self.by_layer:
            return self._by_layer(flat)
        if self.dtype == "int8":
            return self._by_row(flat)
        limits, kept = torch.finfo(DTYPES[self.dtype]), {"gradients": flat.to(DTYPES[self.dtype])}
        if limits.max >= torch.finfo(flat.dtype).max:
            return Converted(kept, flat.dtype)
        least = _BITS * limits.smallest_normal * limits.eps
        return Converted(kept, flat.dtype, self._largest(flat), least, limits.max)

    def decode(self, values: Tensor, scale: Tensor | None) -> Tensor:
        """Return rows [n, K] in `decoded`; `scale` as it is stored."""
        if not self.scaled:
            return values
        if self.bits is not None:
            assert scale is not None
            return dequantize_bits(values, scale.float(), self.bits)
        scales, rows = self.scales(values, scale), values.float()
        if not self.by_layer:
            assert scales is not None
            rows.mul_(scales.unsqueeze(1))
            factors = self.factors()
            return rows if factors is None else rows.mul_(factors)
        assert scales is not None
        return by_layers(rows, scales.view(len(rows), -1), self.widths)

    def scales(self, values: Tensor, scale: Tensor | None) -> Tensor | None:
        """Return what rows are multiplied by, float32: [n], [n, layers] or None for 1."""
        if not self.by_layer:
            return scale if scale is None else scale.float()
        found = torch.zeros(len(values), 0, device="cpu") if scale is None else scale.float()
        if self._within:
            pieces = [_carriers(values, *run) for run in self._runs_within]
            bits = (pieces[0] if len(pieces) == 1 else np.concatenate(pieces, 1)) & 1
            codes = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")).view(torch.bfloat16)
            found = torch.cat([found, codes.float()], 1)
            if self._beside:
                found = found.index_select(1, torch.tensor([*self._beside, *self._within], device="cpu").argsort())
        return found if len(self.widths) > 1 else found[:, 0]

    @cached_property
    def _beside(self) -> list[int]:
        """The layers whose scales stand beside their numbers, by position."""
        return [i for i, k in enumerate(self.widths) if self.by_layer and not CARRIERS <= k < _BESIDE]

    @cached_property
    def _within(self) -> list[int]:
        """The layers whose scales are the lowest bits of their first numbers, by position."""
        return [i for i, k in enumerate(self.widths) if self.by_layer and CARRIERS <= k < _BESIDE]

    @cached_property
    def _runs_within(self) -> list[tuple[int, int, int]]:
        """Their runs of one width: (first column, how many layers, width)."""
        runs = layer_runs(self.widths)
        return [(column, count, width) for column, layer, count, width in runs if layer in self._within]

    @cached_property
    def _carrying(self) -> Tensor:
        """The columns whose lowest bits are scales', layer by layer."""
        starts = list(accumulate(self.widths, initial=0))
        return torch.cat([torch.arange(starts[i], starts[i] + CARRIERS, device="cpu") for i in self._within])

    def _largest(self, flat: Tensor) -> Tensor:
        """Return the largest absolute value of each row and layer, [n, layers], in flat's dtype."""
        found = [
            torch.linalg.vector_norm(flat[:, column : column + count * width].view(-1, count, width), math.inf, 2)
            for column, _, count, width in layer_runs(self.widths)
        ]
        return torch.cat(found, 1)

    def check(self, converted: Converted, where: Where = _of_batch) -> None:
        """Raise ValueError for the first layer whose largest number lies below what the dtype holds, or above.

        What is below the normal numbers of the dtype that it was computed in counts as zero. Where layers share a
        scale, so does what is rounding beside the row's largest: the gradient of queries for a passage of one token.
        """
        _, dtype, largest, least, most = converted
        if largest is None:
            return
        limits = torch.finfo(dtype)
        small = (largest < least) & (largest >= limits.smallest_normal)
        if isinstance(least, Tensor):
            small &= largest > NOISE * limits.eps * largest.amax(1, keepdim=True)
        bad = (small | (largest > most)).nonzero()
        if len(bad):
            row, layer = bad[0].tolist()
            value, beside = float(largest[row, layer]), float(largest[row].max())
            why = f", beside {beside:.2g} in other layers" if isinstance(least, Tensor) and value < most else ""
            ways = "float32, bfloat16 or int8" if value < most and dtype != torch.float64 else "float64"
            raise ValueError(
                f"dtype: {self.dtype} cannot hold the gradient of {where(row)} in layer {self.names[layer]!r}, whose "
                f"largest number is {value:.2g}{why}; store another dtype, {ways}, or scale the loss"
            )

    def _by_layer(self, flat: Tensor) -> Converted:
        largest = self._largest(flat)
        # A bfloat16 is the upper half of a float32; rounded up, no value is beyond 127 steps.
        codes = ((largest.double() / 127).float().view(torch.int32) + 0xFFFF) >> 16
        scales = (codes << 16).view(torch.float32)
        rows = by_layers(
            flat.to(torch.float32, copy=True), torch.where(scales > 0, scales, 1.0), self.widths, divide=True
        )
        within, beside, carrying, places = self._columns(flat.device)
        carried = rows.index_select(1, carrying) if self._within else None
        kept = {"gradients": rows.round_().clamp_(-127, 127).to(torch.int8)}
        if carried is not None:
            bits = (codes.index_select(1, within).unsqueeze(2) >> places & 1).flatten(1).to(torch.int8)
            even = carried.sub_(bits).div_(2).round_().clamp_(-64, 63).to(torch.int8)
            kept["gradients"].index_copy_(1, carrying, even.mul_(2).add_(bits))
        if self._beside:
            kept["scale"] = codes.index_select(1, beside).to(torch.int16).view(torch.bfloat16)
        return Converted(kept, flat.dtype, largest, _BITS * 2.0**-133, _MOST)

    def _columns(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return, there, the layers whose scales lie within and beside, the columns that carry, the places of bits."""
        if device not in self._held:
            made = (torch.tensor(layers, dtype=torch.int64, device="cpu") for layers in (self._within, self._beside))
            carrying = self._carrying if self._within else torch.empty(0, dtype=torch.int64, device="cpu")
            every = (*made, carrying, torch.arange(CARRIERS, dtype=torch.int32, device="cpu"))
            within, beside, carrying, places = (x.to(device) for x in every)
            self._held[device] = within, beside, carrying, places
        return self._held[device]

    @cached_property
    def _held(self) -> dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]]:
        return {}

    def _by_row(self, flat: Tensor) -> Converted:
        """Return int8 rows of the first format version: one scale a row, after each layer was divided by its size."""
        assert self.sizes is not None
        largest = self._largest(flat)
        sizes = torch.tensor(self.sizes, dtype=torch.float64, device="cpu").to(flat.device)
        least = (largest.double() / sizes).amax(1, keepdim=True) / 254 * sizes  # rounded to 0
        factors = self.factors()
        assert factors is not None
        values, scale = quantize_rows(flat / factors.to(flat))
        return Converted({"gradients": values.contiguous(), "scale": scale}, flat.dtype, largest, least, _MOST)

    def _few_bits(self, flat: Tensor, bits: Literal[1, 2, 4]) -> Converted:
        codes, scale = quantize_bits(flat, bits)
        kept = {"gradients": codes, "scale": scale.to(torch.bfloat16)}
        return Converted(kept, flat.dtype, self._largest(flat), 0.0, _MOST / flat.shape[1])

    def _scaled_half(self, flat: Tensor) -> Converted:
        layers = self._largest(flat)
        largest = layers.amax(1).float()
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
        kept = {"gradients": (flat / scale.to(flat).unsqueeze(1)).half(), "scale": scale}
        return Converted(kept, flat.dtype, layers, (scale * (_BITS * 2.0**-24)).unsqueeze(1), _MOST)


def _carriers(values: Tensor, column: int, count: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the first numbers of each layer of a run, whose lowest bits are its scale's: [n, count * CARRIERS].

    Each layer's are copied as one item; an index of columns, which takes them one by one, was seen to take 30 times
    as long.
    """
    stored, row = values.contiguous().numpy(), values.shape[1]
    pieces: np.ndarray[Any, Any] = np.ndarray(
        (len(values), count), f"V{CARRIERS}", buffer=stored, offset=column, strides=(row, width)
    )
    return np.ascontiguousarray(pieces).view(np.uint8).reshape(len(values), count * CARRIERS)


@cache
def layer_runs(widths: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Return the runs of neighbouring layers of one width: (first column, first layer, how many layers, width)."""
    found, column, layer = [], 0, 0
    for width, group in groupby(widths):
        count = len(list(group))
        found.append((column, layer, count, width))
        column, layer = column + count * width, layer + count
    return found


def by_layers(rows: Tensor, scales: Tensor, widths: tuple[int, ...], *, divide: bool = False) -> Tensor:
    """Multiply rows [n, K] in place by a scale for each layer, [n, layers], or divide them."""
    row, step = rows.stride()
    for column, layer, count, width, columns, layers in _layer_groups(widths):
        part = rows.as_strided(
            (len(rows), count, width), (row, columns * step, step), rows.storage_offset() + column * step
        )
        scale = scales[:, layer : layer + count * layers : layers].unsqueeze(2)
        part.div_(scale) if divide else part.mul_(scale)
    return rows


class _Group(NamedTuple):
    """Layers of one width at equal distances."""

    column: int  # the first
    layer: int  # the first
    repeats: int
    width: int
    columns: int  # from one layer to the next
    layers: int


@cache
def _layer_groups(widths: tuple[int, ...]) -> list[_Group]:
    """Return the layers in few groups: runs of one width, and repeated patterns, such as a weight and its bias."""
    found: list[_Group] = []
    layer = column = 0
    while layer < len(widths):
        count, pattern = max(
            ((_repeats(widths, layer, size), widths[layer : layer + size]) for size in range(1, _PATTERN + 1)),
            key=lambda repeated: (repeated[0] - 1) * len(repeated[1]),
        )
        for i, before in enumerate(accumulate(pattern[:-1], initial=0)):
            found.append(_Group(column + before, layer + i, count, pattern[i], sum(pattern), len(pattern)))
        layer, column = layer + count * len(pattern), column + count * sum(pattern)
    return found


def _repeats(widths: tuple[int, ...], start: int, size: int) -> int:
    """Return how often the `size` widths from `start` on stand there, one after another."""
    stop = next((i for i in range(start + size, len(widths)) if widths[i] != widths[i - size]), len(widths))
    return max(1, (stop - start) // size)

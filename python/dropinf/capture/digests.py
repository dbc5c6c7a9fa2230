"""Checksums of tensors, without copying to the host what a GPU holds and was copied before."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import checksum
from ..workload import tensor_bytes

WORDS = 1 << 20  # of 32 bits, that are multiplied at once
MOST = 1 << 16  # checksums that are remembered
_Key = tuple[tuple[int, ...], torch.dtype, int, int]
_known: dict[_Key, str] = {}


def digests(tensors: Sequence[Tensor]) -> list[str]:
    """Return the checksum of each tensor's bytes. The host waits once for a GPU, whatever it holds."""
    plain = [x for x in tensors if x.layout == torch.strided and not hasattr(x, "__tensor_flatten__")]
    keys = _keys([x for x in plain if x.is_cuda])
    found = []
    for x in tensors:
        key = keys.get(id(x))
        digest = None if key is None else _known.get(key)
        if digest is None:
            digest = checksum(tensor_bytes(x))
        if key is not None:
            if len(_known) >= MOST:
                _known.clear()
            _known[key] = digest
        found.append(digest)
    return found


def _keys(tensors: Iterable[Tensor]) -> dict[int, _Key]:
    """Return what tells apart tensors on GPUs, by id: two sums of 64 bits, with the shape and the dtype."""
    with torch.no_grad():
        pairs = [(x, sums(x.detach())) for x in tensors]
    devices = {pair.device: [own for _, own in pairs if own.device == pair.device] for _, pair in pairs}
    read = {device: iter(torch.stack(own).tolist()) for device, own in devices.items()}
    return {id(x): (tuple(x.shape), x.dtype, *next(read[own.device])) for x, own in pairs}


def sums(x: Tensor) -> Tensor:
    """Return two sums [2] int64 of a tensor's 32-bit words, each times a random number of its place, modulo 2^64.

    Any two tensors of one shape and dtype have the same pair with a chance of about 2^-60, over the draw of numbers.
    """
    data = x.contiguous().reshape(-1).view(torch.uint8)
    short = -len(data) % 4
    if short or data.storage_offset() % 4:
        data = F.pad(data, (0, short))
    words = data.view(torch.int32)
    place, chunk = _numbers(x.device)
    total = torch.zeros(2, dtype=torch.int64, device=x.device)
    for at, part in enumerate(words.split(WORDS)):
        here = (part * place[:, : len(part)]).sum(1)
        # Halves, as the products of whole sums would lose their upper bits.
        low, high = here & 0xFFFFFFFF, here >> 32
        numbers = chunk[:, :, at % chunk.shape[2]] + 2 * (at // chunk.shape[2])
        total += low * numbers[0] + high * numbers[1]
    return total


@functools.lru_cache(16)
def _numbers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return odd random numbers of 64 bits: of the places in a chunk [2, WORDS], and of chunks [2, 2, 4096]."""
    draw = torch.Generator().manual_seed(0)
    sizes = (2, WORDS), (2, 2, 4096)
    place, chunk = (torch.randint(-(1 << 62), 1 << 62, size, generator=draw, device="cpu") for size in sizes)
    return (2 * place + 1).to(device), (2 * chunk + 1).to(device)

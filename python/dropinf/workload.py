"""What a user hands in: batches of any structure, a loss, ids, and the three together."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from .files import checksum

_DRAWN = 256  # samples that show whether a sampler draws another order
LossFn = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> losses [N]
Ids = Callable[[Any], Sequence[str]]  # of a batch's samples, in the order of its losses
CuSeqlens = Callable[[Any], Tensor]  # of a packed batch: int [N + 1]


@dataclass(frozen=True)
class Workload:
    """A model, its loss, and the batches that it is compressed on."""

    model: nn.Module
    loss_fn: LossFn
    batches: Sequence[Any]  # in a fixed order
    ids: Ids
    cu_seqlens: CuSeqlens | None = None  # where batches are packed


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return the same structure with every tensor replaced. Other leaves stay."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
        return mapped if type(batch) is dict else _rebuilt(batch, mapped)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, list | tuple):
        return _rebuilt(batch, [map_tensors(function, value) for value in batch])
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: map_tensors(function, getattr(batch, f.name)) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    return batch


def _rebuilt(batch: Any, values: Any) -> Any:
    """Return a container of a batch's kind with other members, and its own attributes, which a loss may read."""
    if type(batch) in (list, tuple):
        return type(batch)(values)
    try:
        if isinstance(batch, tuple):
            clone: Any = tuple.__new__(type(batch), values)
            vars(clone).update(vars(batch))
            return clone
        clone = copy.copy(batch)
        if getattr(batch, "__dict__", None) is batch:  # so that its members are attributes
            clone.__dict__ = clone
        if isinstance(batch, list):
            clone[:] = values
        else:
            for key, value in values.items():
                clone[key] = value
    except Exception:  # a class that cannot be copied, or that cannot be written to
        return tuple(values) if isinstance(batch, tuple) else values
    return clone


def tensors(batch: Any) -> list[Tensor]:
    """Return every tensor of a batch, in a fixed order."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(note, batch)
    return found


def replace_tensors(batch: Any, values: Iterator[Tensor]) -> Any:
    """Return the same structure with its tensors taken from ``values``, in the order of :func:`tensors`."""
    return map_tensors(lambda _: next(values), batch)


def check_model(model: object) -> None:
    """Raise TypeError where a model is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def check_loss(loss_fn: object) -> None:
    """Raise TypeError where a loss is no function."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function (model, batch) -> losses [N], got {loss_fn!r}")


def check_pair(model: object, loss_fn: object) -> None:
    """Raise TypeError where a model or a loss is none."""
    check_model(model)
    check_loss(loss_fn)


def check_ids_stay(ids: Ids, batch: Any) -> None:
    """Raise ValueError where samples get other names each time: what is resumed, or shared, asks again."""
    first, second = ids(batch), ids(batch)
    first, second = (x if isinstance(x, str) or x is None else list(x) for x in (first, second))
    if first != second:
        raise ValueError(
            f"ids: it gives the first batch {str(first)[:60]}, and then {str(second)[:60]}; names must come from the "
            "batch alone, such as lambda batch: batch['id']"
        )


def check_ids(ids: object) -> None:
    """Raise TypeError where ids are not a function: a list of them belongs to no batch."""
    if ids is not None and not callable(ids):
        raise TypeError(
            f"ids is a {type(ids).__name__}; it must be a function of a batch that returns a string for each of its "
            "samples, such as lambda batch: batch['id']"
        )


def check_batches(batches: object) -> None:
    """Raise TypeError where what should be batches is a single batch, or none at all."""
    what = None
    if isinstance(batches, Tensor):
        what = f"a tensor of shape {list(batches.shape)}, whose rows would each be taken for a batch"
    elif isinstance(batches, Mapping):
        what = f"a {type(batches).__name__} of {', '.join(map(repr, itertools.islice(batches, 5)))}"
    elif isinstance(batches, tuple) and any(isinstance(part, Tensor) for part in batches) and not _alike(batches):
        what = f"a tuple of {_shapes(batches)}"
    if what is not None:
        raise TypeError(
            f"batches: it is one batch, {what}; it must be an iterable of batches, such as a list or a DataLoader: "
            "pass [batch]"
        )
    if isinstance(batches, str | bytes) or not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        raise TypeError(
            f"batches: it is {type(batches).__name__}; it must be an iterable of batches, such as a list or a "
            "DataLoader; for a single batch pass [batch]"
        )


def _alike(batches: Sequence[Any]) -> bool:
    """Return whether these may be batches that are tensors, as `x.split(32)` gives them."""
    return (
        all(isinstance(b, Tensor) and b.ndim for b in batches) and len({(b.dtype, b.shape[1:]) for b in batches}) == 1
    )


def is_one_batch(batches: object) -> bool:
    """Return whether batches look like the parts of one: tensors of equal length, in a list of several kinds."""
    if not isinstance(batches, list | tuple) or len(batches) < 2 or not all(isinstance(b, Tensor) for b in batches):
        return False
    return len({len(b) if b.ndim else 0 for b in batches}) == 1 and (isinstance(batches, tuple) or not _alike(batches))


def shuffles(batches: object) -> bool:
    """Return whether batches are of a loader that draws another order each time, or gives each rank a part of one."""
    return any(_shuffles(sampler) for sampler in _samplers(batches))


def sampler_of_ranks(batches: object) -> str | None:
    """Return the name of a loader's sampler that gives each of several ranks a part, such as DistributedSampler."""
    for sampler in _samplers(batches):
        replicas = getattr(sampler, "num_replicas", None)
        if isinstance(replicas, int) and replicas > 1:
            return type(sampler).__name__
    return None


def _samplers(loader: object) -> Iterator[object]:
    """Yield the samplers of a DataLoader, and those that they draw from: a batch sampler's own, say."""
    if not isinstance(loader, DataLoader):
        return
    left, seen = [loader.sampler, loader.batch_sampler], list[object]()
    while left:
        sampler = left.pop()
        if sampler is None or any(sampler is other for other in seen):
            continue
        seen.append(sampler)
        left += [x for x in getattr(sampler, "__dict__", {}).values() if isinstance(x, Sampler)]
        yield sampler


def _shuffles(sampler: object) -> bool:
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        return True
    if isinstance(sampler, SequentialSampler) or not isinstance(sampler, Sampler):
        return False
    flag = getattr(sampler, "shuffle", None)
    if isinstance(flag, bool):  # DistributedSampler, and others that follow it
        return flag
    if type(sampler) is BatchSampler or isinstance(sampler, Iterator):
        return False
    with untouched_random():  # one of the user's own: it says what it does by doing it twice
        twice = [list(itertools.islice(iter(sampler), _DRAWN)) for _ in range(2)]
    return twice[0] != twice[1]


@contextmanager
def untouched_random() -> Iterator[None]:
    """Keep the random states of Python, NumPy and torch as they were."""
    state, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_torch)


def warn_shuffled(batches: object) -> None:
    """Raise a UserWarning where rows stand in an order that nothing keeps."""
    if shuffles(batches):
        warnings.warn(
            "batches: a shuffling DataLoader, so rows stand in an order that nothing keeps; make it with "
            "shuffle=False. Only an index keeps the name of each row, by out= and ids=, and it needs that too",
            stacklevel=3,
        )


def _shapes(parts: Iterable[Any]) -> str:
    return ", ".join(f"tensor {list(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in parts)


def samples_of(batch: Any) -> int | None:
    """Return the length of a list of samples that were not collated: pairs, dicts, or two and more tensors of a kind.

    None for any other batch.
    """
    if not isinstance(batch, list) or not batch:
        return None
    if all(isinstance(sample, list | tuple | Mapping) and tensors(sample) for sample in batch):
        return len(batch)
    kinds = {(s.ndim, s.is_floating_point()) if isinstance(s, Tensor) and s.ndim else None for s in batch}
    return len(batch) if len(batch) > 1 and len(kinds) == 1 and None not in kinds else None


def order_of(batches: object, order: Sequence[int] | Tensor | None = None) -> Tensor | None:
    """Return where each sample stands among all, in the order of the batches, int64 [N]; None: in just that order.

    `order`: a number for each sample, which rise as the samples are to stand; by default what batches have as `order`.

    Raises:
        TypeError: it is not a list of whole numbers.
        ValueError: a number is there twice.
    """
    given = order if order is not None else getattr(batches, "order", None)
    if given is None or callable(given):
        return None
    try:
        numbers = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        numbers = torch.empty(0, 0)
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"order is {type(given).__name__}; it must be whole numbers, one for each sample: [N]")
    found = numbers.long().argsort()
    if len(found) > 1 and not bool((numbers[found].diff() > 0).all()):
        raise ValueError("order has a number twice; each sample stands somewhere else")
    places: Tensor = found.argsort()
    return places


def check_order(order: Tensor, *rows: int) -> None:
    """Raise ValueError unless an order is of so many samples, or as many as one of these."""
    if len(order) not in rows:
        known = " or ".join(map(str, dict.fromkeys(rows)))
        raise ValueError(
            f"order: it is of {len(order)} samples, and the batches have {known}; it needs one number each"
        )


def check_order_before(order: Tensor | None, batches: object, cu_seqlens: CuSeqlens | None) -> None:
    """Raise ValueError where an order cannot be of the samples of batches, as far as these show how many they are."""
    if order is None or cu_seqlens is not None:
        return
    check_batches(batches)
    known = _samples_in(batches)
    if known:
        check_order(order, *known)


def _samples_in(batches: object) -> list[int]:
    """Return how many samples there are, and how many else there may be; nothing where batches do not show it."""
    if type(batches) is DataLoader:
        sampler = batches.batch_sampler
        if type(sampler) is not BatchSampler or batches.collate_fn is not default_collate:  # which may leave some out
            return []
        count = count_of(sampler.sampler) or 0
        return [count - (count % sampler.batch_size if sampler.drop_last else 0)] if count else []
    counts = [_samples_of(batch) for batch in batches] if isinstance(batches, list | tuple) else []
    if any(count[:2] == (None, None) for count in counts):
        return []
    return [sum(c for c in column if c is not None) for column in zip(*counts, strict=True) if None not in column]


def _samples_of(batch: Any) -> tuple[int | None, int | None, int | None]:
    """Return how many samples a batch may have: as a list of them, as its tensors are long, and as its sequences have
    in their second dimension, where time stands first."""
    found = [t for t in tensors(batch) if t.ndim]
    first, second = {len(t) for t in found}, {t.shape[1] for t in found if t.ndim > 1}
    if any(t.ndim == 2 and t.is_floating_point() for t in found):  # no sequences
        second = set()
    return samples_of(batch), first.pop() if len(first) == 1 else None, second.pop() if len(second) == 1 else None


def count_of(batches: object) -> int | None:
    """Return how many batches there are, or None where that is not known before, as of a stream."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def first_batch(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch, and all batches, the first included."""
    check_batches(batches)
    if isinstance(batches, Sequence):
        if not len(batches):
            raise ValueError("batches: it is empty; pass at least one batch")
        return batches[0], batches
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError("batches: it is empty (or an iterator that is used up); pass at least one batch") from None
    return first, itertools.chain([first], iterator) if iterator is batches else batches


def batch_checksum(batch: Any) -> str:
    """Return a checksum of a batch's tensors."""
    return checksum(b"".join(repr(tuple(t.shape)).encode() + tensor_bytes(t) for t in tensors(batch)))


def tensor_bytes(x: Tensor) -> memoryview:
    """Return the values of a tensor as bytes, row-major; no copy of what lies so already."""
    if x.layout != torch.strided:
        sparse = x.detach().to_sparse_coo().coalesce()
        return memoryview(b"".join(tensor_bytes(part) for part in (sparse.indices(), sparse.values())))
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

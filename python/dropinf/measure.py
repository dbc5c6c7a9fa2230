"""Losses to ask about: each function returns a ``loss_fn(model, batch) -> Tensor [N]`` for queries of a `Compressor`.

Training samples keep the loss that the model was trained with. Scores are positive where training on a sample lowers
what is measured here: all of these fall as a model gets better, but `probe`, which only points somewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .workload import LossFn, check_loss

LogitsOf = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> logits
Position = Literal["mean", "last"]


def margin(logits_of: LogitsOf | None = None) -> LossFn:
    """Return a loss that is minus the margin of the right class, ``logsumexp_{k != y} z_k - z_y``.

    That is ``log((1 - p_y) / p_y)``, minus the output function of TRAK (Park et al. 2023, arXiv 2303.14186, section
    3.1): unlike the cross entropy, its gradient does not vanish where the model is sure.

    Args:
        logits_of: ``logits_of(model, batch) -> Tensor [N, C]``, C at least 2; by default ``model(batch[0])``, or its
            ``logits``. Labels are ``batch[1]``, int64 [N].

    Raises:
        TypeError: `logits_of` is no function.
        ValueError: when called, logits or labels of another shape or dtype.
    """
    read = _reader(logits_of)

    def margins(model: nn.Module, batch: Any) -> Tensor:
        logits, labels = _wide(read(model, batch)), _part(batch, 1, "labels")
        _check_shape("logits", logits, ("N", "C"))
        _check_labels("batch[1]", labels, tuple(logits.shape[:1]))
        if logits.shape[1] < 2:
            raise ValueError(f"logits are {list(logits.shape)}; a margin needs at least 2 classes: [N, C]")
        if not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
            raise ValueError(
                f"batch[1]: labels are {labels.tolist()[:8]}...; they must lie within {logits.shape[1]} classes"
            )
        right = F.one_hot(labels, logits.shape[1]).bool()
        return logits.masked_fill(right, -torch.inf).logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]

    return margins


def completion(logits_of: LogitsOf | None = None) -> LossFn:
    """Return the negative log-likelihood of completions given their prompts, ``-sum_t log p(x_t | x_<t)``, in nats.

    The sum is over the tokens of the completion; those of the prompt, and what fills a row up, do not count. A batch is
    ``(ids [N, T], starts [N])`` or ``(ids, starts, ends [N])``, all int64: the completion of a row is
    ``ids[n, starts[n]:ends[n]]``, to the end of the row by default. A start is at least 1: the first token has no
    prediction.

    Args:
        logits_of: ``logits_of(model, batch) -> Tensor [N, T, V]``, at t of the token t + 1; by default
            ``model(batch[0])``, or its ``logits``.

    Raises:
        TypeError: `logits_of` is no function.
        ValueError: when called, parts of another shape or dtype; starts below 1; a completion without tokens.
    """
    read = _reader(logits_of)

    def completions(model: nn.Module, batch: Any) -> Tensor:
        ids, starts = _part(batch, 0, "ids"), _part(batch, 1, "starts")
        _check_shape("batch[0]", ids, ("N", "T"))
        ends = _part(batch, 2, "ends") if len(batch) > 2 else torch.full_like(starts, ids.shape[1])
        for name, x in (("batch[1]", starts), ("batch[2]", ends)):
            _check_labels(name, x, tuple(ids.shape[:1]))
        if not bool(((starts >= 1) & (starts < ends) & (ends <= ids.shape[1])).all()):
            raise ValueError(
                f"batch: completions go from {starts.tolist()} to {ends.tolist()} in rows of {ids.shape[1]} tokens; "
                "each must start at 1 or later, and have a token"
            )
        logits = _wide(read(model, batch))
        _check_shape("logits", logits, ("N", "T", "V"))
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"logits are {list(logits.shape)} for ids {list(ids.shape)}; they must be [N, T, V]")
        place = torch.arange(1, ids.shape[1], device=ids.device)
        counts = (place >= starts[:, None]) & (place < ends[:, None])
        if not bool(((ids[:, 1:] >= 0) & (ids[:, 1:] < logits.shape[2]))[counts].all()):
            raise ValueError(f"batch[0]: an id of a completion is none of {logits.shape[2]} words")
        # What does not count is no part of it, whatever its logits.
        chosen = logits[:, :-1].masked_fill(~counts[:, :, None], 0.0).mT
        losses = F.cross_entropy(chosen, ids[:, 1:].where(counts, 0), reduction="none")
        return losses.where(counts, 0.0).sum(1)

    return completions


def contrast(good: LossFn, bad: LossFn | None = None) -> LossFn:
    """Return the loss of what should have come minus that of what should not: ``good(batch[0]) - bad(batch[1])``.

    What lowers it makes the good one likelier relative to the bad one, as of two answers to one prompt:
    ``contrast(completion())``. A batch is a pair of batches, of N samples each; row n of both belong together.

    Args:
        good: ``good(model, batch[0]) -> Tensor [N]``.
        bad: ``bad(model, batch[1]) -> Tensor [N]``; by default as `good`.

    Raises:
        TypeError: `good` or `bad` is no function.
        ValueError: when called, a batch that is no pair, or losses of another number.
    """
    check_loss(good)
    check_loss(good if bad is None else bad)

    def contrasts(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ValueError(f"batch is a {type(batch).__name__}; it must be a pair: (batch of good, batch of bad)")
        one, two = good(model, batch[0]), (good if bad is None else bad)(model, batch[1])
        if one.shape != two.shape:
            raise ValueError(
                f"good has losses {list(one.shape)} and bad {list(two.shape)}; they must be of as many samples, [N]"
            )
        return one - two

    return contrasts


def probe(
    module: str, vector: Tensor, position: Position = "mean", run: Callable[[nn.Module, Any], Any] | None = None
) -> LossFn:
    """Return the projection of a module's output on a vector, ``<h_n, vector>``: what a linear probe reads there.

    Scores are positive where training on a sample moves the output against the vector.

    Args:
        module: name of a submodule, as in ``model.named_modules()``, which a forward calls once. Its output, or the
            first member of it, is [N, d], or [N, ..., d] with positions in between.
        vector: [d], floating point.
        position: "mean" over positions, or the "last" one.
        run: ``run(model, batch)`` calls the model; by default ``model(batch[0])``.

    Raises:
        TypeError: `vector` is no tensor, or `run` no function.
        ValueError: `vector` is not [d], or `position` another word; when called, no such module, one that is not called
            once, or an output of another size.
    """
    if not isinstance(vector, Tensor):
        raise TypeError(f"vector must be a tensor [d], got {type(vector).__name__}")
    if vector.ndim != 1 or not vector.is_floating_point():
        raise ValueError(f"vector is {vector.dtype} {list(vector.shape)}; it must be floating point, [d]")
    if position not in get_args(Position):
        raise ValueError(f"position is {position!r}; it must be one of {', '.join(map(repr, get_args(Position)))}")
    call = _forward if run is None else run
    if not callable(call):
        raise TypeError(f"run must be a function (model, batch), got {run!r}")

    def projections(model: nn.Module, batch: Any) -> Tensor:
        found: list[Any] = []
        named = dict(model.named_modules())
        if module not in named:
            raise ValueError(f"module: {module!r} is not in the model; it has {', '.join(list(named)[1:6])}, ...")
        handle = named[module].register_forward_hook(lambda _module, _inputs, output: found.append(_kept(output)))
        try:
            call(model, batch)
        finally:
            handle.remove()
        if len(found) != 1:
            raise ValueError(f"module: {module!r} was called {len(found)} times in a forward; it must be called once")
        output = found[0]
        if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[-1] != len(vector):
            what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"module: the output of {module!r} is {what}; it must be [N, ..., {len(vector)}]")
        rows = _wide(output).flatten(1, -2) if output.ndim > 2 else _wide(output)[:, None]
        rows = rows.mean(1) if position == "mean" else rows[:, -1]
        return rows @ vector.to(rows)

    return projections


def _kept(output: Any) -> Any:
    """Return a module's output, or its first member, which no op in place behind it changes."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first.clone() if isinstance(first, Tensor) else first


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(_part(batch, 0, "inputs"))


def _reader(logits_of: LogitsOf | None) -> LogitsOf:
    if logits_of is not None and not callable(logits_of):
        raise TypeError(f"logits_of must be a function (model, batch) -> logits, got {logits_of!r}")

    def read(model: nn.Module, batch: Any) -> Tensor:
        output = _forward(model, batch) if logits_of is None else logits_of(model, batch)
        logits: Any = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise ValueError(
                f"logits are {type(logits).__name__}; they must be a floating-point tensor: pass logits_of="
            )
        return logits

    return read


def _part(batch: Any, place: int, what: str) -> Tensor:
    if not isinstance(batch, list | tuple) or len(batch) <= place or not isinstance(batch[place], Tensor):
        raise ValueError(
            f"batch is a {type(batch).__name__}; it must be a tuple of tensors, with {what} at batch[{place}]"
        )
    part: Tensor = batch[place]
    return part


def _check_shape(name: str, x: Tensor, shape: tuple[str, ...]) -> None:
    if x.ndim != len(shape):
        raise ValueError(f"{name} is {list(x.shape)}; it must be [{', '.join(shape)}]")


def _check_labels(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.dtype != torch.int64 or tuple(x.shape) != shape:
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be int64 {list(shape)}")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

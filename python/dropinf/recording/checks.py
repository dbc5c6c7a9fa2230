"""What a recorded forward and backward must be, and what is said where they are not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.ladder import AttributionError
from ..capture.passes import Pass
from ..capture.samples import Rows, Samples
from ..workload import tensors

_ALONE = "leave it out with layers="


def check_failed(current: Pass) -> None:
    """Raise AttributionError where a module's rows cannot be captured."""
    for name, why in current.failed.items():
        raise AttributionError(f"layer {name}: its rows cannot be recorded ({why}); {_ALONE}")


def check_layouts(current: Pass) -> None:
    """Raise AttributionError where the rows of a layer stand in an order that the data decides."""
    for (name, _), layout in current.layouts.items():
        if isinstance(layout, Rows):
            raise AttributionError(
                f"layer {name}: which of its rows are whose follows the data (experts, say), and a recording finds "
                f"that out only beside the training; {_ALONE}, or compress the trained model with dropinf.Compressor"
            )


def mixed(current: Pass) -> AttributionError:
    """Return the error for samples that meet in a layer."""
    names = sorted({name for name, _ in current.several})
    return AttributionError(
        f"layer {names[0]}: its output belongs to several samples (a BatchNorm in train mode behind it, say), so no "
        "row is one sample's; replace what mixes them (GroupNorm, say), or pass mixing=True: a row is then the part "
        "of the gradient that comes through its sample's place in the batch"
    )


def wrong_layers(errors: Mapping[str, float]) -> AttributionError:
    """Return the error for rows whose weighted sums are not what plain autograd gives."""
    return AttributionError(
        f"{_worst(errors)}: weighted sums of its rows differ from plain autograd's gradient; does something else than "
        f"its module use the parameter? {_ALONE}"
    )


def unlike_step(errors: Mapping[str, float]) -> AttributionError:
    """Return the error for rows that do not sum to the gradient that the optimizer gets."""
    return AttributionError(
        f"{_worst(errors)}: its rows do not sum to the gradient that the optimizer gets. Is there a forward that "
        "run.samples(ids) did not name, a gradient of the step before (optimizer.zero_grad()), a term of the loss "
        "beside the model's outputs (a penalty on weights), or a use of the parameter beside its module? Without that "
        "layer in layers= others may be recorded"
    )


def _worst(errors: Mapping[str, float]) -> str:
    """Return the layer that is furthest off, by how much, and how many others are."""
    name = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    others = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
    return f"layer {name} (off by {errors[name]:.2g}{others})"


def of_samples(out: Any, samples: Samples) -> Tensor:
    """Return a number for each sample [n] that depends on all of a model's outputs for it.

    Raises AttributionError where no output has the samples in front.
    """
    n, found = samples.n, []
    for i, x in enumerate(x for x in outputs_in(out) if x.is_floating_point() and x.requires_grad and x.ndim):
        generator = torch.Generator().manual_seed(i)
        last = torch.randn(x.shape[-1], generator=generator, device="cpu") / x.shape[-1] ** 0.5
        if x.ndim == 1:
            last = torch.ones(1, device="cpu")
            x = x[:, None]
        rows = (x @ last.to(x)).to(torch.promote_types(x.dtype, torch.float32))
        if samples.cu_seqlens is not None:
            if rows.numel() % samples.packed:
                continue
            rows = rows.reshape(samples.packed, -1) if rows.shape[0] == samples.packed else rows.reshape(-1)[:, None]
            if len(rows) != samples.packed:
                continue
        elif len(rows) != n:
            continue
        else:
            rows = rows.reshape(n, -1)
        factors = 0.5 + torch.rand(rows.shape, generator=generator, device="cpu").to(rows)
        parts = (rows * factors).sum(1)
        if samples.cu_seqlens is not None:
            owner = torch.repeat_interleave(samples.cu_seqlens.diff().long().to(parts.device), output_size=len(parts))
            parts = parts.new_zeros(n).index_add(0, owner, parts)
        found.append(parts)
    if not found:
        raise AttributionError(
            f"model: none of its outputs has the {n} samples of run.samples(ids) in front, as logits [n, ...] do, so "
            "that nothing shows which rows are whose; return such an output beside the loss, and name as many ids as "
            "the forward has samples"
        )
    return torch.stack(found).sum(0)


def outputs_in(out: Any) -> list[Tensor]:
    """Return the tensors of an output, also of the dataclasses that transformers returns."""
    return tensors(dict(out.items()) if hasattr(out, "items") else out)


def check_eager(model: nn.Module) -> None:
    """Raise ValueError for a model that is compiled as a whole: hooks inside are then compiled away."""
    compiled = hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())
    if compiled:
        raise ValueError(
            "model: it is compiled as a whole (torch.compile), and what a compiled forward computes inside no hook "
            "sees; record the plain model, or compile functions that hold no tracked layer"
        )


def in_scaler() -> bool:
    """Return whether a GradScaler calls."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_maybe_opt_step":
            return True
    return False


def shown(names: Iterator[str] | list[str], most: int = 3) -> str:
    """Return names for a message: the first few, and how many more."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

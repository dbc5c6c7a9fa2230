"""What can be wrong with a model, a loss or a batch, and what to say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..workload import tensors


def check_losses(losses: Any, batch: Any, cu: Tensor | None) -> None:
    way_out = "return one loss per sample, not reduced (reduction='none', then summed within each sample)"
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        what = f"a tensor of shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss_fn must return a tensor of shape [N], it returned {what}; {way_out}")
    if not losses.is_floating_point():
        raise ValueError(f"loss_fn must return floating-point losses, it returned {losses.dtype}")
    if len(losses) == 0:
        raise ValueError("batches: a batch has no samples, its losses are of shape [0]; leave empty batches out")
    if cu is not None:
        if len(losses) != len(cu) - 1:
            raise ValueError(
                f"loss_fn returned {len(losses)} losses for the {len(cu) - 1} documents of cu_seqlens; {way_out}"
            )
        return
    sizes = {len(t) for t in tensors(batch) if t.ndim}
    if sizes and len(losses) not in sizes:
        raise ValueError(
            f"loss_fn returned {len(losses)} losses for a batch whose tensors have leading sizes {sorted(sizes)}; "
            f"{way_out}"
        )


def check_finite(store: Mapping[str, Tensor], where: Callable[[int], str]) -> None:
    """Raise ValueError where a batch's gradients are not finite. Wait for each device once, not once a layer."""
    sums: dict[torch.device, list[Tensor]] = {}
    for c in store.values():
        sums.setdefault(c.device, []).append(c.sum().float())
    if not all(bool(torch.stack(of_device).isfinite().all()) for of_device in sums.values()):
        for name, c in store.items():
            _check_layer(name, c, where)


def _check_layer(name: str, c: Tensor, where: Callable[[int], str]) -> None:
    bad = (~c.flatten(1).isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"layer {name}: the gradient of {where(int(bad[0]))} is not finite (NaN or inf), and of "
            f"{len(bad)} samples of its batch; look at that sample's loss, or compute in a wider dtype"
        )


def explain(model: nn.Module, batch: Any) -> ValueError | None:
    """Return the likely error behind a failed forward if the data is on another device than the model, else None."""
    here = {str(p.device) for p in model.parameters()}
    there = {str(t.device) for t in tensors(batch)}
    if there and not there & here:
        return ValueError(
            f"batch: its tensors are on {', '.join(sorted(there))} and the model is on {', '.join(sorted(here))}; "
            "move one of them, or let loss_fn move the batch"
        )
    return None


def check_batchnorm(model: nn.Module) -> None:
    """Raise ValueError where a batch norm mixes samples by batch statistics: no per-sample gradient exists then."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            state = "is in train mode" if module.training else "has no running statistics"
            raise ValueError(
                f"model: BatchNorm {name!r} {state}, so it mixes the samples of a batch and no per-sample gradient "
                "exists; call model.eval() (or replace it with GroupNorm) before compressing"
            )


def untied_message(name: str, shape: tuple[int, ...], n: int) -> str:
    """Return what to say of a tensor that cannot be tied to samples."""
    return (
        f"layer {name}: a tensor of shape {list(shape)} cannot be tied to the {n} samples of the batch; it must have "
        f"them in its leading dimension ([N, ...] or [N*T, d], row by row of each sample) and must not mix them. "
        f"Put the batch first (batch_first=True), or leave the layer out with layers="
    )

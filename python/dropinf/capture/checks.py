"""What can be wrong with a model, a loss or a batch, and what to say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..workload import tensors
from .layer import clean_name
from .moments import NotFinite
from .targets import Target


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
            f"{way_out}. Are documents, graphs or views packed into one tensor, say where each starts: cu_seqlens="
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
        raise NotFinite(
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


def check_current(model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Raise ValueError where the model has other parameters than when its compressor was made."""
    now = {clean_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    for target in targets.values():
        if now.get(target.parameter) is not target.tensor:
            what = "gone" if target.parameter not in now else "another object than it was"
            raise ValueError(
                f"model: its parameter {target.parameter} is {what} since the Compressor was made (a new head, "
                "weight_norm, load_state_dict(assign=True)); make a new Compressor"
            )


def mixing_message(name: str, pair: tuple[int, int] | None, n: int) -> str:
    """Return what to say of a loss that depends on several samples."""
    met = "several samples" if pair is None else f"samples {pair[0]} and {pair[1]}"
    return (
        f"layer {name}: the losses of {met} (of the {n} samples of the batch) depend on the same row of its output, so "
        "no sample has a gradient of its own. Must they mix (a contrastive loss, centred features), pass mixing=True: "
        "each gradient is then the derivative of one loss as it stands in its batch. Else compute each sample's loss "
        "from that sample alone, or leave the layer out with layers="
    )


def refused_message(name: str, error: float, n: int) -> str:
    """Return what to say of a layer that no way of the ladder gets right."""
    return (
        f"layer {name}: its per-sample gradients do not sum to what plain autograd gives for the batch of {n} "
        f"(relative error {error:.2g}), whichever way they are found. Likely the model draws numbers from a generator "
        "of its own, changes a state from call to call that no module holds, or has a hook that clips or normalises "
        "gradients; make it repeatable, or leave the layer out with layers="
    )


def cached_message(names: list[str]) -> str:
    """Return what to say of a model whose second backward fails; ``names``: layers that are used outside modules."""
    likely = f" (of {', '.join(names[:3])}, likely)" if names else ""
    return (
        f"model: it keeps what it computed from a weight{likely} from one call to the next, in a cache that no module "
        "holds, so that a second backward fails; clear the cache before each call, or compute it without one"
    )

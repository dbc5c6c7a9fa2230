"""What can be wrong with a model, a loss or a batch, and what to say of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..workload import samples_of, tensors
from .ladder import SamplesMix
from .layer import clean_name
from .moments import NotFinite
from .targets import Target


def check_losses(losses: Any, batch: Any, cu: Tensor | None, hint: int | None = None) -> None:
    """Raise ValueError where losses are not those of a batch's samples. ``hint``: how many it has by what is known."""
    way_out = "return one loss per sample, not reduced (reduction='none', then summed within each sample)"
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        what = f"a tensor of shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        alone = "; or is the batch a single sample? pass batches, as a DataLoader gives them" * is_alone(batch)
        raise ValueError(f"loss_fn must return a tensor of shape [N], it returned {what}; {way_out}{alone}")
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
    if len(losses) != hint:
        check_count(len(losses), batch, way_out)


def check_count(n: int, batch: Any, way_out: str) -> None:
    """Raise ValueError where a batch cannot have n samples by the sizes of its tensors.

    It may have as many as one of its tensors is long, as it is a list of, or, time first, as all of its sequences have
    in their second dimension: [T, N, d], or ids [T, N].
    """
    found = tensors(batch)
    sizes = {len(t) for t in found if t.ndim}
    sequences = all(t.ndim > 2 or not t.is_floating_point() for t in found if t.ndim > 1)
    time_first = n > 1 and sequences and {t.shape[1] for t in found if t.ndim > 1} == {n}
    if not sizes or n in sizes or n == samples_of(batch) or time_first:
        return
    packed = ""
    if 1 < n < max(sizes):
        packed = (
            ". Where it leaves samples out (labels of -100, say), give these a loss of 0 instead. Where several rows "
            "belong to a sample (nodes of graphs, tokens of packed documents), pass cu_seqlens=, which says where each "
            "sample starts and ends: lambda batch: int [N + 1]"
        )
    raise ValueError(
        f"loss_fn returned {n} losses for a batch whose tensors have leading sizes {sorted(sizes)}; {way_out}{packed}"
    )


def not_finite(store: Mapping[str, Tensor]) -> list[Tensor]:
    """Return whether gradients may not be finite: a truth value for each device."""
    sums: dict[torch.device, list[Tensor]] = {}
    for c in store.values():
        sums.setdefault(c.device, []).append(c.sum().float())
    return [~torch.stack(of_device).isfinite().all() for of_device in sums.values()]


def check_finite(store: Mapping[str, Tensor], where: Callable[[int], str]) -> None:
    """Raise ValueError where a batch's gradients are not finite."""
    for name, c in store.items():
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


def is_alone(batch: Any) -> bool:
    """Return whether a batch looks like one sample that was not collated: with a number where batches have a tensor."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    numbers = [isinstance(p, int | float) or (isinstance(p, Tensor) and p.ndim == 0) for p in parts]
    return any(numbers) and bool(tensors(batch))


def explain_batch(model: nn.Module, batch: Any, error: Exception) -> Exception | None:
    """Return what a batch's failure is likely due to, by its structure or the model's, or None."""
    if isinstance(error, SamplesMix) and (name := time_first(model)) is not None:
        return SamplesMix(
            f"{error}. Note that {name} has batch_first=False: it takes [T, N, d], and what it mixes stands along "
            "the first dimension; make it with batch_first=True, or transpose its inputs"
        )
    if type(error) not in (TypeError, AttributeError, KeyError, IndexError, ValueError):
        return None
    n, raised = samples_of(batch), f"loss_fn gets it as it is, and raised {type(error).__name__}: {error}"
    if n is not None and not isinstance(batch[0], Tensor):
        what = (
            f"batch: it is a list of {n} samples, each a {type(batch[0]).__name__}, that were not collated; {raised}. "
            "Have the DataLoader collate them (its default collate_fn does), or have loss_fn stack them itself"
        )
    elif is_alone(batch) and not isinstance(error, ValueError):
        what = (
            f"batch: it has a number where batches have a tensor; {raised}. If it is a single sample of a data set, "
            "pass batches, as DataLoader(dataset, batch_size=32) gives them"
        )
    else:
        return None
    return TypeError(what) if isinstance(error, TypeError) else ValueError(what)


def time_first(model: nn.Module) -> str | None:
    """Return the name of a module of the model that takes [T, N, d], or None."""
    for name, module in model.named_modules():
        if getattr(module, "batch_first", True) is False and isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            return f"{type(module).__name__} {name!r}"
    return None


def check_surroundings(what: str = "compressor") -> None:
    """Raise ValueError inside torch.func's transforms and under inference_mode: nothing can be backpropagated there.

    ``what`` is called, as the message has it.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            f"{what}: it is called inside torch.func (vmap, grad, jvp, jacrev ...); it must be called outside, on "
            "plain tensors. Inside loss_fn and the model these transforms work"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{what}: it is called under torch.inference_mode, where nothing has a gradient; call it outside, "
            "on tensors made outside"
        )


def check_batchnorm(model: nn.Module) -> None:
    """Raise ValueError where a batch norm mixes samples by batch statistics: no per-sample gradient exists then."""
    for name, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in getattr(module, "original_name", "")
        if not (scripted or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            continue
        if module.training or getattr(module, "running_mean", None) is None:
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


def check_shapes(targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where a parameter has another shape than when its compressor was made."""
    for name, target in targets.items():
        if target.shape != shapes[name]:
            raise ValueError(
                f"model: its parameter {target.parameter} is {list(target.shape)}, and was {list(shapes[name])} when "
                "the Compressor was made (a vocabulary that was resized, say); make a new Compressor"
            )


def mixing_message(name: str, pair: tuple[int, int] | None, n: int) -> str:
    """Return what to say of a loss that depends on several samples."""
    if pair is None:
        found = (
            f"layer {name}: rows of its output's gradient do not grow with the loss of one sample (of the {n} of the "
            "batch): either losses of several samples depend on the same row, so that no sample has a gradient of its "
            "own, or a hook or an autograd Function clips or normalises gradients, which has to be left out, or "
            "gradients are below what float16 holds: scale the loss up"
        )
    else:
        found = (
            f"layer {name}: the losses of samples {pair[0]} and {pair[1]} (of the {n} samples of the batch) depend on "
            "the same row of its output, so no sample has a gradient of its own"
        )
    return (
        f"{found}. Must they mix (a contrastive loss, centred features), pass mixing=True: "
        "each gradient is then the derivative of one loss as it stands in its batch. Else compute each sample's loss "
        "from that sample alone, or leave the layer out with layers=. A tensor that all samples share looks the same "
        "where it is as long as the batch: begin with a batch of another size"
    )


def refused_message(name: str, error: float, n: int, dtype: torch.dtype) -> str:
    """Return what to say of a layer of a dtype that no way of the ladder gets right."""
    rounding = "" if dtype.itemsize > 2 else "In half precision small gradients are rounded away: scale the loss up. "
    if math.isnan(error):
        rounding = "Plain autograd's are not finite: where a dtype cannot hold them, scale the loss down. "
    return (
        f"layer {name}: its per-sample gradients do not sum to what plain autograd gives for the batch of {n} "
        f"(relative error {error:.2g}), whichever way they are found. {rounding}Likely the model draws numbers from a "
        "generator of its own, changes a state from call to call that no module holds, is used by another thread "
        "meanwhile, or has a hook that clips or normalises gradients; make it repeatable, or leave the layer out with "
        "layers=. Or the batch has no gradient but rounding (a loss that is as small as it can be): leave it out"
    )


def late_message(wrong: Mapping[str, float], before: int) -> str:
    """Return what to say where an audit fails after batches of the same look whose rows were given out."""
    name = max(wrong, key=lambda n: wrong[n])
    return (
        f"layer {name}: its per-sample gradients do not sum to what plain autograd gives (relative error "
        f"{wrong[name]:.2g}), and those of the {before} batches before, which were found in the same way and not "
        "audited, may be wrong too. Which rows are whose follows the data in a way that was not seen, or another "
        "thread used the model meanwhile: delete what was written, and compress again with "
        f'audit="every", or with route={{"{name}": "backward"}}'
    )


def unrepeatable_message(apart: float) -> str:
    """Return what to say of a loss that gives other values in a second run."""
    return (
        f"loss_fn: another run of the same batch gives other losses (by {apart:.2g}), though model, batch and torch's, "
        "NumPy's and Python's random numbers are as they were. It depends on a state that is kept elsewhere, such as a "
        "counter in a closure or a generator of its own; keep it in the model or the batch, or compute it before"
    )


def restless_message(attempts: int) -> str:
    """Return what to say of a batch that runs in another way each time."""
    return (
        f"model: a batch was run {attempts} times and did something else each time, such as calling a function that is "
        "made anew in each forward in the place of one of torch's; have the model do the same for the same batch"
    )


def grown_message() -> str:
    """Return what to say of a batch with a tensor that was computed under autograd."""
    return (
        "batches: a tensor in one was computed from others that require a gradient, and each backward would go through "
        "what computed it, which the first one frees; detach it (x.detach()), or compute it in loss_fn"
    )


def cached_message(names: list[str]) -> str:
    """Return what to say of a model whose second backward fails; ``names``: layers that are used outside modules."""
    likely = f" (of {', '.join(names[:3])}, likely)" if names else ""
    return (
        f"model: it keeps what it computed from a weight{likely} from one call to the next, in a cache that no module "
        "holds, so that a second backward fails; clear the cache before each call, or compute it without one"
    )

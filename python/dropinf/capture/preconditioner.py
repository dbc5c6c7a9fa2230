"""The direction in which an optimizer would go by one sample's gradient, on a mask.

Source: LESS (Xia et al. 2024, arXiv 2402.04333), which takes Adam's update of each training sample's gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from .layer import Layer
from .targets import Target

Rows = Callable[[Any], tuple[dict[str, Tensor], int]]  # of a batch: rows by layer, and how many


@contextmanager
def directed(
    hooked: AbstractContextManager[Rows],
    optimizer: torch.optim.Optimizer | None,
    targets: Mapping[str, Target],
    layers: Mapping[str, Layer],
) -> Iterator[Rows]:
    """Have what a hooked model gives be the optimizer's updates, if there is one."""
    directions = None if optimizer is None else adam_direction(optimizer, targets, layers)
    with hooked as model:
        if directions is None:
            yield model
            return

        def rows(batch: Any) -> tuple[dict[str, Tensor], int]:
            store, n = model(batch)
            return directions(store), n

        yield rows


def direction_name(optimizer: torch.optim.Optimizer | None, targets: Mapping[str, Target]) -> str:
    """Return by what updates of an optimizer are told apart: its settings and its second moments."""
    if optimizer is None:
        return ""
    digest = hashlib.sha256(
        repr([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]).encode()
    )
    for target in targets.values():
        for value in optimizer.state.get(target.tensor, {}).values():
            digest.update(
                value.detach().float().cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
            )
    return f" by {type(optimizer).__name__} {digest.hexdigest()[:16]}"


def adam_direction(
    optimizer: torch.optim.Optimizer, targets: Mapping[str, Target], layers: Mapping[str, Layer]
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Return what makes of a batch's rows [n, *stored_shape], by layer, Adam's updates by them.

    Raises ValueError for another optimizer, for parameters it has no state of, and for sketches that mix coordinates.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise ValueError(
            f"preconditioner: it is {type(optimizer).__name__}; it must be an Adam or AdamW, whose second moments "
            "divide"
        )
    is_w = type(optimizer) is torch.optim.AdamW  # of which older releases of torch have no such entry
    for group in optimizer.param_groups:
        decays = group["weight_decay"] and not group.get("decoupled_weight_decay", is_w)
        for what, there in (("maximize", group["maximize"]), ("amsgrad", group["amsgrad"]), ("weight_decay", decays)):
            if there:
                raise ValueError(
                    f"preconditioner: its {what} is {group[what]}, which the direction leaves out; use an AdamW "
                    "without it"
                )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    held: dict[str, tuple[Tensor, Tensor, float, dict[str, Any]]] = {}
    for name, layer in layers.items():
        parameter = targets[name].tensor
        state = optimizer.state.get(parameter)
        if not layer.is_gather:
            raise ValueError(
                f"preconditioner: the sketch of layer {name} mixes coordinates, and Adam acts on each alone; use a "
                "Dropout"
            )
        if not state or "exp_avg_sq" not in state:
            raise ValueError(f"preconditioner: the optimizer has no state of layer {name}; let it make a step first")
        m, v = (layer.compress_exact(state[x].detach()[None])[0] for x in ("exp_avg", "exp_avg_sq"))
        held[name] = m, v, float(state["step"]) + 1, groups[id(parameter)]

    def directions(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, g in rows.items():
            m, v, step, group = held[name]
            (b1, b2), eps = group["betas"], group["eps"]
            first = (b1 * m.to(g) + (1 - b1) * g) / (1 - b1**step)
            second = (b2 * v.to(g) + (1 - b2) * g * g) / (1 - b2**step)
            found[name] = first / (second.sqrt() + eps)
        return found

    return directions
